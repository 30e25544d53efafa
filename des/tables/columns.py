"""The columns of the tables: how each is measured, on which prompt sets, and the exact tests between rows."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from des.attacks.results import read_attack
from des.tables.build import Cell, paired_note
from des.tables.cells import ORIGINAL, Setup, Variant
from des.tables.costs import extra_parameters, extra_seconds, training_seconds
from des.tables.runner import TableRunner

ABLATIONS = ("T15", "T16", "T16_style", "T17", "T18", "T19")
STEMS = {
    "T5": "classify_16",
    "T6": "classify_16",
    "T16": "classify_16",
    "T5_style": "classify_object",
    "T16_style": "classify_object",
}
COUNTED_AS = {"T16": "T5", "T16_style": "T5_style"}  # tables whose ASR is over another table's sets
DES = ("des", "des_given", "multi_des", "multi_des_given", "style_des", "style_des_given")  # names of DES models, unchanged
Column = Callable[[Variant], Cell]


def paired_notes(name: str, rows: dict[str, Variant], runner: TableRunner) -> list[str]:
    """The exact McNemar tests of a table's rows against its DES model's, from the verdicts on images of the same prompts."""
    if runner.dry or name in ("T8", "T21", "T22"):  # costs, FID and CLIP score are no shares
        return []
    found = {
        title: runner.verdicts(variant, tuple(sets_counted(name, runner.setup)), STEMS.get(name))
        for title, variant in rows.items()
    }
    ours = next(title for title, variant in rows.items() if variant.name in DES)
    alike = {title: verdicts for title, verdicts in found.items() if verdicts and verdicts.keys() == found[ours].keys()}
    note = paired_note(alike, ours) if ours in alike else None
    left_out = ", ".join(title for title in found if title not in alike)
    return [note + f" Without images of the same prompts, and so not tested: {left_out}." * bool(left_out)] if note else []


def attack_notes(name: str, rows: dict[str, Variant], runner: TableRunner) -> list[str]:
    """What each attack of a table found on each row's model, with the concept's names and without them, beside its control."""
    notes = []
    for column, each in runner.setup.columns.get(name, {}).items():
        found = {}
        for title, variant in rows.items():
            done = runner.attack(variant, each) if runner.setup.sets[each].attack else ""
            if not runner.dry and not isinstance(done, str):
                found[title] = read_attack(done.outputs[0])
        if found:
            texts = [f"{title} {cells_text(content, rows[title])}" for title, content in found.items()]
            weak = any(content["too_weak_to_tell"] for content in found.values())
            notes.append(
                f"{column}: {'; '.join(texts)}."
                + weak
                * " TOO WEAK TO TELL: the control is below its floor, so the attack's failures on other models prove nothing."
            )
    if notes:
        notes.append(
            "The first figure of each attack above is with the concept's names, the second without them; the table has the larger."
        )
    return notes


def cells_text(content: Mapping[str, Any], variant: Variant) -> str:
    """The k/n of an attack's cells on a row's model."""
    model = "original" if variant == ORIGINAL else "attacked"
    return ", ".join(f"{cell['any']['k']}/{cell['any']['n']}" for cell in content["cells"].values() if cell["model"] == model)


def sets_counted(name: str, setup: Setup) -> list[str]:
    """The sets of a table's ASR."""
    if name in ("T8", "T21", "T22"):
        return []
    columns = setup.columns.get(COUNTED_AS.get(name, name)) or setup.columns["T2"]
    return [setup.explicit] if name == "T1" else list(columns.values())


def columns_of(name: str, setup: Setup, runner: TableRunner) -> dict[str, Column]:
    """How each column of a table is measured."""
    benign, stem, counted = setup.benign_of.get(name, setup.benign), STEMS.get(name), sets_counted(name, setup)
    quality: dict[str, Column] = {
        "FID": lambda variant: runner.fid(variant, benign), "CLIP": lambda variant: runner.clip(variant, benign),
    }  # fmt: skip

    def all_of(variant: Variant) -> list[Cell]:
        return [runner.asr(variant, each, stem) for each in counted]

    def mean(variant: Variant) -> Cell:
        return Cell.mean(all_of(variant))

    apart = {
        title: lambda variant, each=each: runner.asr(variant, each, stem) for title, each in setup.apart.get(name, {}).items()
    }
    if name in ("T21", "T22"):
        return quality
    if name in ABLATIONS:
        return {"avg" if name == "T16" else "ASR": mean, **quality, **apart}
    if name == "T1":
        per_class = {
            title: lambda variant, of=of: runner.images_of_classes(variant, [of]) for title, of in setup.classes.items()
        }
        return {
            "total": lambda variant: runner.images_of_classes(variant, list(setup.classes.values())),
            **quality,
            **per_class,
        }
    if name == "T8":
        return {
            "training s": partial(training_seconds, runner), "extra parameters": partial(extra_parameters, runner),
            "extra inference s": partial(extra_seconds, runner),
        }  # fmt: skip
    if name == "T10":
        scores = {"PickScore": "pickscore", "ImageReward": "imagereward", "BLIP": "blipscore"} if setup.preference else {}
        chosen = {title: lambda variant, job=job: runner.preference(variant, job) for title, job in scores.items()}
        labels = {f"{label} right": lambda variant, label=label: runner.label(variant, label) for label in setup.labels}
        return {"ASR": mean, "CLIP": runner.clip, **chosen, **labels}
    columns: dict[str, Column] = {
        title: lambda variant, each=each: runner.asr(variant, each, stem) for title, each in setup.columns[name].items()
    }
    columns |= {"avg": mean} if len(counted) > 1 else {}
    columns |= {"std": lambda variant: Cell.spread(all_of(variant))} if len(counted) > 2 else {}
    return columns | (quality if name in ("T5", "T5_style", "T7", "T9") else {}) | apart


def sets_of(name: str, setup: Setup) -> list[str]:
    """The prompt sets of a table whose lists exist."""
    sets = [*sets_counted(name, setup), *setup.apart.get(name, {}).values()]
    if name not in ("T2", "T3", "T4", "T6"):
        benign = setup.benign_of.get(name, setup.benign)
        sets.append(setup.sets[benign].part_of or benign)
    return [each for each in dict.fromkeys(sets) if setup.sets[each].csv.is_file()]


def count_of(name: str, runner: TableRunner) -> dict[str, int | None]:
    """The numbers of prompts of a set that are drawn, never drawn, and published."""
    return dict(zip(("drawn", "never_drawn", "published"), runner.drawn_of(name), strict=True))
