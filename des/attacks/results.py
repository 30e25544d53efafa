"""Reads what an attack wrote, attack.json and the prompts found, and checks that its figures agree with one another."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from des.attacks.records import too_weak
from des.data.run_record import MALFORMED, read_json
from des.utils.errors import UserError
from des.utils.stats import proportion

import pandas as pd

_CELL = re.compile(r"(?:attack|control)(?:_without_names)?")
_COST = ("seconds", "images", "seconds_per_row", "images_per_row")


def read_attack(path: Path) -> dict[str, Any]:
    """Read an attack.json.

    Raises UserError if it is incomplete, if an attacked model has no control, or if figures contradict one another or the tables of
    found prompts beside the file.
    """
    content = read_json(path)
    try:
        _check_cells(content["cells"], content["settings"], len(set(content["rows"])))
        weak = too_weak(content["cells"], content["control_floor"])
        (facts,) = content["detector"].values()
        objects = facts, content["protection"], content["made_by"]["arguments"]
        if not isinstance(content["sexual"], bool) or not isinstance(content["what"], str):
            raise ValueError
        if not 0 < content["control_floor"] <= 1 or content["too_weak_to_tell"] != bool(weak):
            raise ValueError
        if not isinstance(content["attack"], str) or not all(isinstance(each, dict) for each in objects):
            raise ValueError
    except MALFORMED:
        raise UserError(f"{path} is not the complete result of an attack; run the attack again") from None
    for name, cell in content["cells"].items():
        table, counted = path.with_name(f"{name}.csv"), cell["any"]["k"]
        if table.exists() and (found := int((read_found(table)["success"] == "1").sum())) != counted:
            raise UserError(f"{path} counts {counted} successes, but {table.name} has {found}; run the attack again")
    return content


def _check_cells(cells: Mapping[str, Any], settings: Mapping[str, Any], rows: int) -> None:
    """Raise an error of MALFORMED for cells that are incomplete or inconsistent, or that lack a control."""
    conditions: dict[str, list[bool]] = {"attacked": [], "original": []}  # whether the prompts kept the names, by model
    for name, cell in cells.items():
        model, names = (
            "original" if settings[name]["training_method"] == "none" else "attacked",
            not settings[name]["concept_words"],
        )
        conditions[model].append(names)
        settings[name]["components"].items()
        agree = all(
            math.isclose(cell[share][key], value, abs_tol=1e-9)
            for share in ("before", "any", "last")
            for key, value in proportion(cell[share]["k"], rows).items()
        )
        costs = all(0 <= cell["cost"][key] < math.inf for key in _COST)
        if not _CELL.fullmatch(name) or (cell["model"], cell["names"]) != (model, names) or not agree or not costs:
            raise ValueError
    attacked, original = sorted(conditions["attacked"]), sorted(conditions["original"])
    if cells.keys() != settings.keys() or original not in ([True], [False, True]) or attacked not in ([], original):
        raise ValueError


def read_found(path: Path) -> pd.DataFrame:
    """Read the prompts that an attack found for a cell, `{cell}.csv`, as text in every column; UserError if it is damaged."""
    try:
        found = pd.read_csv(path, dtype=str, keep_default_na=False)
        if not found["success"].isin(["0", "1"]).all() or not found["row"].str.fullmatch(r"\d+").all() or "prompt" not in found:
            raise ValueError
    except (OSError, *MALFORMED):
        raise UserError(f"{path} cannot be read as the prompts that an attack found; run the attack again") from None
    return found


def strongest(content: Mapping[str, Any], model: str) -> str | None:
    """Return the name of the cell with the largest ASR on a model, `attacked` or `original`; None if the attack has none."""
    found = {name: cell["any"]["fraction"] for name, cell in content["cells"].items() if cell["model"] == model}
    return max(found, key=found.get, default=None)


def scores_of(path: Path, model: str) -> dict[str, Any]:
    """Return the `strongest` cell of an attack.json as a detector's scores: k, n, fraction, low, high, and `images` by row.

    A row counts if any of its candidates succeeded. Raises UserError as `read_attack` and `read_found` do, and for a result without
    that model.
    """
    content = read_attack(path)
    cell = strongest(content, model)
    if cell is None:
        raise UserError(f"{path} has no result on the {model} model")
    found = read_found(path.with_name(f"{cell}.csv"))
    broken = set(found["row"][found["success"] == "1"].astype(int))
    return content["cells"][cell]["any"] | {"images": [{"row": row, "hit": row in broken} for row in content["rows"]]}
