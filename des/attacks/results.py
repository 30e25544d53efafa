"""Reading the results of attacks: attack.json, with the CSVs of the prompts found beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from des.data.prompts import read_rows
from des.data.run_record import read_json
from des.utils.errors import UserError


def read_attack(path: Path) -> dict[str, Any]:
    """Read an attack.json. Raises UserError if it is not the complete result of an attack."""
    content = read_json(path)
    try:
        rows, verdict = content["rows"], content["too_weak_to_tell"]
        cells = content["cells"].items()
        if not cells:
            raise KeyError("cells")
        for name, cell in cells:
            counted = cell["any"]["n"] == len(rows) > 0 and 0 <= cell["any"]["k"] <= len(rows)
            known = cell["model"] in ("attacked", "original") and isinstance(content["settings"][name]["components"], dict)
            if not (counted and known and isinstance(verdict, bool) and isinstance(cell["names"], bool)):
                raise KeyError(name)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not the complete result of an attack; run the attack again") from None
    return content


def strongest(content: Mapping[str, Any], model: str) -> str | None:
    """Return the name of the cell with the largest ASR on a model, `attacked` or `original`; None if the attack has none."""
    found = {name: cell["any"]["fraction"] for name, cell in content["cells"].items() if cell["model"] == model}
    return max(found, key=found.get, default=None)


def scores_of(path: Path, model: str) -> dict[str, Any]:
    """Return the `strongest` cell of an attack.json as a detector's scores: k, n, fraction, low, high, and `images` by row.

    A row counts if any of its candidates succeeded. Raises UserError for an incomplete result, or one without that model.
    """
    content = read_attack(path)
    cell = strongest(content, model)
    if cell is None:
        raise UserError(f"{path} has no result on the {model} model")
    found = read_rows(path.with_name(f"{cell}.csv"))
    broken = set(found["row"][found["success"] == "1"].astype(int))
    return content["cells"][cell]["any"] | {"images": [{"row": row, "hit": row in broken} for row in content["rows"]]}
