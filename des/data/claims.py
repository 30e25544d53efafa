"""The images that a folder must hold to be complete: the rows and copies that generate.py recorded in run.json before drawing.

The entry `claimed` lists, for each copy, ranges [first row, row after the last]. Records of earlier versions lack the entry; the
images of such a folder are those of its manifest.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from des.data import manifest
from des.utils.errors import UserError
from des.utils.folders import walk

Key = tuple[int, int]  # row and copy
RECORD = "run.json"


def packed(keys: Iterable[Key]) -> list[list[list[int]]]:
    """Encode keys for run.json: for each copy, counted from 0, a list of half-open ranges of rows."""
    rows_of: dict[int, list[int]] = {}
    for row, copy in sorted(set(keys)):
        rows_of.setdefault(copy, []).append(row)
    claimed: list[list[list[int]]] = [[] for _ in range(max(rows_of, default=-1) + 1)]
    for copy, rows in rows_of.items():
        for row in rows:
            if claimed[copy] and claimed[copy][-1][1] == row:
                claimed[copy][-1][1] = row + 1
            else:
                claimed[copy].append([row, row + 1])
    return claimed


def unpacked(claimed: list[list[list[int]]]) -> set[Key]:
    """Decode what `packed` returned."""
    return {(row, copy) for copy, ranges in enumerate(claimed) for first, end in ranges for row in range(first, end)}


def claimed_keys(folder: Path, record: dict[str, Any]) -> set[Key]:
    """Return the keys that a folder's record claims, without the rows that are never drawn; UserError if the record is damaged."""
    try:
        claimed = record.get("claimed")
        keys = keys_of_manifest(folder) if claimed is None else unpacked(claimed)
        never = set(record.get("left_out", []))
        return {(row, copy) for row, copy in keys if row not in never}
    except (ValueError, TypeError, AttributeError):
        raise _unreadable(folder) from None


def keys_of_manifest(folder: Path) -> set[Key]:
    """Return the keys in a folder's manifest, including images that were discarded after scoring."""
    return {(line["row"], line.get("copy", 0)) for line in manifest.read(folder).values() if "row" in line}


def read_record(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's run.json, empty if the file is missing; UserError if it cannot be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise _unreadable(folder)
    return record


def left_out(folder: Path) -> set[int]:
    """Return the rows that a folder's run skipped because they are never drawn."""
    rows = read_record(folder).get("left_out", [])
    if not isinstance(rows, list) or not all(isinstance(row, int) for row in rows):
        raise _unreadable(folder)
    return set(rows)


def check_complete(folder: Path, option: str | None = "--expected") -> None:
    """Raise UserError if a run in or below `folder` has not drawn every image that its record claims.

    The error suggests `option`, which takes the number of images; it is None for scripts without such an option.
    """
    claimed = lacking = 0
    first: tuple[str, int] | None = None
    for place, _, files in walk(folder):
        if RECORD not in files:
            continue
        keys = claimed_keys(place, read_record(place))
        missing = keys - keys_of_manifest(place)
        claimed, lacking = claimed + len(keys), lacking + len(missing)
        if missing and first is None:
            first = str(place / RECORD), min(missing)[0]
    if first:
        otherwise = f", or give the number of images to expect with {option}" if option else ""
        raise UserError(
            f"{lacking} of the {claimed} images that {first[0]} lists are missing from {folder} (row {first[1]} first); run the same "
            f"generate.py command again to draw them{otherwise}"
        )


def _unreadable(folder: Path) -> UserError:
    return UserError(f"{folder / RECORD} cannot be read, so the images that belong in the folder are unknown; draw them again")
