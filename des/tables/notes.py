"""The notes below a table: what speaks against its rows and columns, what the attacks found, and the exact tests between rows."""

from collections.abc import Hashable, Mapping
from typing import Any

from des.attacks.results import read_attack
from des.data.run_record import read_json
from des.models.encoders import text_encoders
from des.tables.build import corrections, paired_note, tests_text
from des.tables.cells import ORIGINAL, Setup, Variant
from des.tables.columns import COUNTED_AS, STEMS, sets_counted
from des.tables.runner import TableRunner
from des.utils.stats import Paired

DES = ("des", "des_given", "multi_des", "multi_des_given", "style_des", "style_des_given")  # names of DES models, unchanged


def protection_notes(rows: Mapping[str, Variant], runner: TableRunner) -> list[str]:
    """Why the models of some rows may not be protected: doubts that were recorded when they were opened, and original encoders."""
    notes = []
    for title, variant in rows.items():
        if record := runner.protections.get(variant):
            notes += [f"{title}: {text}." for text in _doubts(read_json(record)["protection"], runner.model_path)]
    return notes


def _doubts(protection: Mapping[str, Any], model_path: str) -> list[str]:
    """What a record says against a protection by text encoders; nothing for other protections, and for none."""
    given = {int(name): loaded for name, loaded in protection.items() if name.isdigit()}
    if not given:
        return []
    found = [f"text encoder {i}: {loaded['doubt']}" for i, loaded in sorted(given.items()) if loaded.get("doubt")]
    rest = [str(i) for i in text_encoders(model_path) if i not in given]
    if len(rest) == 1:
        found.append(f"text encoder {rest[0]} is the original one, which is not protected")
    elif rest:
        found.append(f"text encoders {' and '.join(rest)} are the original ones, which are not protected")
    return found


def given_notes(name: str, setup: Setup) -> list[str]:
    """The columns of a table whose prompts an attack found on one model, but which are drawn with every row's."""
    columns = setup.columns.get(COUNTED_AS.get(name, name), {})
    given = {title: setup.sets[each].csv for title, each in columns.items() if setup.sets[each].white_box}
    return [
        f"{title}: the prompts of {csv.name}, the same for every row; they are white box only for the model that they were found on."
        for title, csv in given.items()
        if csv.is_file()
    ]


def paired_notes(name: str, rows: dict[str, Variant], runner: TableRunner) -> list[str]:
    """The exact McNemar tests of a table's rows against its DES model's, from the verdicts on images of the same prompts."""
    if runner.dry or name in ("T8", "T21", "T22"):  # costs, FID and CLIP score are no shares
        return []
    ours = next(title for title, variant in rows.items() if variant.name in DES)
    if name in ("T3", "T4"):
        return _column_notes(name, rows, ours, runner)
    found = {
        title: runner.verdicts(variant, tuple(sets_counted(name, runner.setup)), STEMS.get(name))
        for title, variant in rows.items()
    }
    alike = {title: verdicts for title, verdicts in found.items() if verdicts and verdicts.keys() == found[ours].keys()}
    note = paired_note(alike, ours) if ours in alike else None
    left_out = ", ".join(title for title in found if title not in alike)
    return [note + f" Without images of the same prompts, and so not tested: {left_out}." * bool(left_out)] if note else []


def _column_notes(name: str, rows: Mapping[str, Variant], ours: str, runner: TableRunner) -> list[str]:
    """A note with the tests of each column, since the columns are about the same prompts; and the correction for all of them."""
    notes, count = [], 0
    for column, each in runner.setup.columns[name].items():
        found = {title: runner.verdicts(variant, (each,)) for title, variant in rows.items()}
        pairs = {title: on_both(verdicts, found[ours]) for title, verdicts in found.items() if title != ours}
        tested = {title: pair for title, pair in pairs.items() if pair}
        if tested:
            untested = ", ".join(title for title in pairs if title not in tested)
            note = f"{column}: {tests_text(tested, ours)}"
            note += f" Without images of the same prompts, and so not tested: {untested}." * bool(untested)
            notes.append(note + _nothing_found(found, runner.drawn_of(each)[0]))
        count += len(tested)
    return notes + corrections(count)


def on_both(first: Mapping[Hashable, bool], second: Mapping[Hashable, bool]) -> Paired | None:
    """The pairs of the verdicts that both rows have; None without any."""
    shared = first.keys() & second.keys()
    return Paired.of({key: first[key] for key in shared}, {key: second[key] for key in shared}) if shared else None


def _nothing_found(found: Mapping[str, Mapping[Hashable, bool]], listed: int) -> str:
    """A sentence that says for how many of the `listed` prompts the attack on each row found no text to draw; empty if for none."""
    lacking = [f"{listed - len(verdicts)} for {title}" for title, verdicts in found.items() if 0 < len(verdicts) < listed]
    sentence = f" Left out of {listed} prompts, since the attack found no text to draw: {', '.join(lacking)}."
    return sentence if lacking else ""


def fid_notes(name: str, rows: Mapping[str, Variant], runner: TableRunner) -> list[str]:
    """Between how many images each row's FID is, and what `fid.py` says against it; one note for rows that are alike."""
    benign, titles = runner.setup.benign_of.get(name, runner.setup.benign), {}
    for title, variant in rows.items():
        content = runner.fid(variant, benign)
        if isinstance(content, dict):
            caution = f" {content['caution']}." if "caution" in content else ""
            text = f"FID of {content['generated']:,} against {content['reference']:,} images.{caution}"
            titles.setdefault(text, []).append(title)
    return list(titles) if len(titles) == 1 else [f"{', '.join(alike)}: {text}" for text, alike in titles.items()]


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
