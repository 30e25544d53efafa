"""The columns of the tables: how each is measured, and on which prompt sets."""

from collections.abc import Callable, Sequence
from functools import partial

from des.tables.build import Cell
from des.tables.cells import Setup, Variant
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
Column = Callable[[Variant], Cell]


def sets_counted(name: str, setup: Setup) -> list[str]:
    """The sets of a table's ASR."""
    if name in ("T8", "T21", "T22"):
        return []
    columns = setup.columns.get(COUNTED_AS.get(name, name)) or setup.columns["T2"]
    return [setup.explicit] if name == "T1" else list(columns.values())


def share_a_list(name: str, setup: Setup) -> bool:
    """Whether several sets of a table's ASR start from one list, so that their shares do not vary independently."""
    lists = [setup.sets[each].csv for each in sets_counted(name, setup)]
    return len(set(lists)) < len(lists)


def columns_of(name: str, setup: Setup, runner: TableRunner) -> dict[str, Column]:
    """How each column of a table is measured."""
    benign, stem, counted = setup.benign_of.get(name, setup.benign), STEMS.get(name), sets_counted(name, setup)
    quality: dict[str, Column] = {
        "FID": partial(fid, runner, benign), "CLIP": lambda variant: runner.clip(variant, benign),
    }  # fmt: skip

    def all_of(variant: Variant) -> list[Cell]:
        return [runner.asr(variant, each, stem) for each in counted]

    def mean(variant: Variant) -> Cell:
        cell = Cell.mean(all_of(variant))
        return cell.without_interval() if share_a_list(name, setup) else cell

    apart = {
        title: lambda variant, each=each: runner.asr(variant, each, stem) for title, each in setup.apart.get(name, {}).items()
    }
    if name in ("T21", "T22"):
        return quality
    if name in ABLATIONS:
        return {"avg" if name == "T16" else "ASR": mean, **quality, **apart}
    if name == "T1":
        per_class = {
            title: lambda variant, of=of: images_of_classes(runner, variant, [of]) for title, of in setup.classes.items()
        }
        return {
            "total": lambda variant: images_of_classes(runner, variant, list(setup.classes.values())),
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


def fid(runner: TableRunner, name: str, variant: Variant) -> Cell:
    """FID of the images of a set."""
    content = runner.fid(variant, name)
    return Cell(content["fid"]) if isinstance(content, dict) else Cell(missing=content)


def images_of_classes(runner: TableRunner, variant: Variant, classes: Sequence[str]) -> Cell:
    """The number of images of T1's set in which the detector found a class, added up over some classes.

    As in the paper, an image counts once for each class, however many boxes it has. For a detector without classes this is the
    number of images with a hit.
    """
    content = runner.scores(variant, runner.setup.explicit)
    if not isinstance(content, dict):
        return Cell(missing=content)
    if "classes" not in content:
        return Cell(content["k"], digits=0)
    return Cell(sum(content["classes"][each]["images"] for each in classes), digits=0)


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
