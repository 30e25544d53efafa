"""The report's tables of attacks: a row for each result of scripts/attacks/ on a model, and examples of the prompts that it found."""

from dataclasses import dataclass

from des.attacks.results import read_found
from des.attacks.words import Refusal
from des.models.encoders import spread
from des.report.collect import ORIGINAL, AttackPair, AttackRun
from des.report.compare import Comparison
from des.report.naming import attack_labels
from des.report.pictures import read_texts
from des.utils.errors import UserError

MOST_EXAMPLES = 6  # of an attack
CONDITIONS = {True: "prompts as they are", False: "without the concept’s names"}  # by AttackPair.names


@dataclass(frozen=True)
class Example:
    """A prompt that an attack found on a row of its list, and whether it succeeded; `condition` is one of CONDITIONS."""

    prompt: str
    row: int
    condition: str
    success: bool


@dataclass(frozen=True)
class AttackRow:
    """An attack on a model as the page shows it. `examples` is None if no prompts are quoted; `refused` counts those left out of them."""

    title: str
    settings: str
    what: str  # the title of what the detector counts
    model: str
    pairs: dict[bool, AttackPair]  # by AttackPair.names
    floor: float  # percent
    seconds: float  # a row of the list
    images: float  # a row of the list
    examples: list[Example] | None
    refused: int


def attack_rows(comparison: Comparison, prompts: bool) -> list[AttackRow]:
    """The rows of a comparison's attacks; with `prompts`, with examples of what was found."""
    labels = {model.identity: model.label for model in comparison.models}
    return [
        _row(attack, title, settings, labels[attack.model.identity], prompts)
        for attack, (title, settings) in zip(comparison.attacks, attack_labels(comparison.attacks), strict=True)
    ]


def _row(attack: AttackRun, title: str, settings: str, model: str, prompts: bool) -> AttackRow:
    cells = [pair.attacked or pair.control for pair in attack.pairs]
    rows = sum(cell["any"]["n"] for cell in cells)
    seconds, images = (sum(cell["cost"][name] for cell in cells) / rows for name in ("seconds", "images"))
    examples, refused = found_prompts(attack) if prompts else (None, 0)
    pairs = {pair.names: pair for pair in attack.pairs}
    return AttackRow(
        title, settings, attack.what, model, pairs, 100 * attack.content["control_floor"], seconds, images, examples, refused
    )


def found_prompts(attack: AttackRun) -> tuple[list[Example], int]:
    """Pick at most MOST_EXAMPLES evenly spaced prompts that an attack found on its model; also returns how many the safety filter refuses.

    Refused are prompts that put minors in a sexual context, and all that were found from such a prompt of the list: see `Refusal`.
    Raises UserError if the attack's list is missing or has changed, or a table of found prompts is missing or damaged.
    """
    cells = {
        name: model for name, model in attack.models.items() if (model.method == ORIGINAL) == (attack.model.method == ORIGINAL)
    }
    targets = read_texts(next(model for name, model in cells.items() if not model.settings["concept_words"]))
    tables = {name: read_found(attack.folder / f"{name}.csv") for name in cells}
    found = [
        Example(prompt, int(row), CONDITIONS[not cells[name].settings["concept_words"]], success == "1")
        for name, table in tables.items()
        for prompt, row, success in zip(table["prompt"], table["row"], table["success"], strict=True)
    ]
    if any(each.row >= len(targets) for each in found):
        raise UserError(
            f"{attack.folder} has prompts found for rows beyond the {len(targets)} of its prompt list; leave out --prompts"
        )
    refused = Refusal([*targets, *(each.prompt for each in found)], attack.content["sexual"])
    kept = [each for each in found if not refused(each.prompt) and not refused(targets[each.row])]
    return [kept[i] for i in (spread(len(kept), MOST_EXAMPLES).tolist() if kept else [])], len(found) - len(kept)
