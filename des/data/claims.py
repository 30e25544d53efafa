"""The images that a run of generate.py claims: the rows and copies in its run.json, which a scorer expects in the folder.

run.json holds them as `claimed`: for each copy of a row a list of ranges [first row, row after the last]. A record without the
entry is of an earlier version; its images are then those of its manifest.
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
    """Keys as run.json holds them: for each copy, from 0 on, ranges of rows with their ends left out."""
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
    """The keys of `packed`."""
    return {(row, copy) for copy, ranges in enumerate(claimed) for first, end in ranges for row in range(first, end)}


def claimed_keys(folder: Path, record: dict[str, Any]) -> set[Key]:
    """The images that a folder's record claims; UserError where it cannot be understood.

    Rows that are never drawn are not among them, even where an earlier version drew them.
    """
    try:
        claimed = record.get("claimed")
        keys = keys_of_manifest(folder) if claimed is None else unpacked(claimed)
        never = set(record.get("left_out", []))
        return {(row, copy) for row, copy in keys if row not in never}
    except (ValueError, TypeError, AttributeError):
        raise _unreadable(folder) from None


def keys_of_manifest(folder: Path) -> set[Key]:
    """The images of a folder's manifest, those that were scored and discarded too."""
    return {(line["row"], line.get("copy", 0)) for line in manifest.read(folder).values() if "row" in line}


def read_record(folder: Path) -> dict[str, Any]:
    """run.json of a folder; empty where there is none, UserError where it cannot be read."""
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
    """The rows that a folder's run left out because they are never drawn."""
    rows = read_record(folder).get("left_out", [])
    if not isinstance(rows, list) or not all(isinstance(row, int) for row in rows):
        raise _unreadable(folder)
    return set(rows)


def check_complete(folder: Path, option: str | None = "--expected") -> None:
    """Raise UserError where a run in or below `folder` has not drawn all the images that its record claims.

    `option` is the one with which the user gives the number of images, if there is one.
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
        otherwise = f", or name the number of images that are meant with {option}" if option else ""
        raise UserError(
            f"{folder} lacks {lacking} of the {claimed} images that {first[0]} claims (row {first[1]} first); run the same "
            f"generate.py command again to draw them{otherwise}"
        )


def _unreadable(folder: Path) -> UserError:
    return UserError(f"{folder / RECORD} cannot be read, so the images that belong in the folder are unknown; draw them again")
