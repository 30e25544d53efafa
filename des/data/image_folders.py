"""Folders of images: listing the files, checking them against their manifest, and pairing them with prompts."""

from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from des.data import claims, manifest
from des.data.images import OTHER_SUFFIXES, SUFFIXES, is_complete, row_and_copy, row_of
from des.data.manifest import NAME, read
from des.data.prompts import never_drawn, read_rows
from des.utils.errors import UserError, not_found
from des.utils.files import sha256_texts
from des.utils.folders import walk
from des.utils.logs import logger

import pandas as pd


def image_hashes(folder: Path, expected: int | None = None, skip_unreadable: bool = False) -> dict[Path, str]:
    """Return the sha256 of every image file under `folder` and its subfolders, ordered by row and name.

    Hidden files and folders, such as `.ipynb_checkpoints`, are skipped. Raises UserError if there is no image, or not `expected`
    images; for a symbolic link to an image or folder; for a name of an image that is not a file; and if an image does not match the
    manifest of the run that drew it (`check`), unless `skip_unreadable` is set and the image is damaged.
    """
    if not folder.is_dir():
        raise not_found("the image folder", folder, "generate.py draws images")
    found, others = [], []
    for path in (place / name for place, folders, files in walk(folder) for name in folders + files):
        named = path.suffix.lower() in SUFFIXES
        if path.is_symlink() and (named or path.is_dir()):
            raise UserError(f"{path} is a symbolic link; copy the image itself into the folder")
        if named and not path.is_file():
            raise UserError(f"{path} has the name of an image but is not a file; rename it or move it away")
        if named:
            found.append(path)
        elif path.suffix.lower() in OTHER_SUFFIXES:
            others.append(path)
    if others:
        suffixes = ", ".join(sorted({path.suffix.lower() for path in others}))
        logger.warning("%s: %d files (%s) are not read and do not count; save them as PNG", folder, len(others), suffixes)
    if not found:
        raise UserError(f"{folder} contains no images ({', '.join(SUFFIXES)})")
    if expected is not None and len(found) != expected:
        raise UserError(
            f"{folder} contains {len(found)} images instead of the expected {expected}; draw the others first, or check the number"
        )
    rows = {path: row_of(path) for path in found}
    digests = manifest.hashes(sorted(found, key=lambda path: (rows[path] is None, rows[path] or 0, str(path))))
    check(folder, digests, (lambda path: not is_complete(path)) if skip_unreadable else (lambda path: False))
    return digests


def pair_with_prompts(
    folder: Path,
    csv_path: Path,
    expected: int | None = None,
    skip_unreadable: bool = False,
    other_prompts: bool = False,
) -> pd.DataFrame:
    """Pair the images of `folder` with the rows of a prompt CSV, by the row in each file's name.

    Returns the CSV's rows, indexed by row number, with columns `image` (path) and `sha256`, without rows that are never drawn. A
    row with several images is repeated for each; all rows must have the same number of images. If `expected` is given, rows
    without an image are left out. `attrs` of the result holds facts for the scorer's result, see `pairing_notes`.

    Raises UserError if the manifest says that an image was drawn from a prompt other than its row's (unless `other_prompts` is
    set); if images are missing, surplus, duplicate or without a row; and as `image_hashes` and `claims.check_complete` do.
    """
    rows = read_rows(csv_path)
    never = set(never_drawn(rows["prompt"].tolist()))
    digests = image_hashes(folder, expected, skip_unreadable)
    found = _by_key(digests)
    differ = _other_prompts(digests, rows["prompt"])
    if differ and not other_prompts:
        raise UserError(
            f"{csv_path} is not the list that drew {folder}: {len(differ)} of its prompts differ from those that the images were "
            f"drawn from, first in row {differ[0]} (counted from 0); pass the list that drew the images, or --other_prompts to "
            "score by this one"
        )
    if expected is None:
        claims.check_complete(folder)
    digests, excluded = without_never_drawn(digests, never)
    found = {key: left for key, paths in found.items() if (left := [path for path in paths if path in digests])}
    left_out = set().union(*(claims.left_out(place) for place in {path.parent for path in digests}))
    order = _matched(folder, found, set(rows.index) - never - left_out, partly=expected is not None)
    images = [found[key][0] for key in order]
    paired = rows.loc[[row for row, _ in order]].assign(image=images, sha256=[digests[path] for path in images])
    paired.attrs = {"never_drawn": [str(path.relative_to(folder)) for path in excluded]} if excluded else {}
    if differ:
        paired.attrs |= {"other_prompts": len(differ), "other_prompts_sha256": sha256_texts(rows["prompt"])}
    return paired


def without_never_drawn(digests: dict[Path, str], rows: Set[int] = frozenset()) -> tuple[dict[Path, str], list[Path]]:
    """Split images into those to score and those of rows that are never drawn, and log the latter.

    Rows are never drawn if they are in `rows` or left out by the run.json beside an image. Raises UserError if no image is left.
    """
    left_out = {place: claims.left_out(place) for place in {path.parent for path in digests}}
    never = [path for path in digests if row_of(path) in rows | left_out[path.parent]]
    if never:
        logger.warning(
            "%d images are not scored: their prompts put minors in a sexual context and are never drawn (%s)",
            len(never), _some([path.name for path in never]),
        )  # fmt: skip
    kept = {path: digest for path, digest in digests.items() if path not in set(never)}
    if not kept:
        raise UserError("no image is left to score: all are of prompts that are never drawn")
    return kept, never


def pairing_notes(facts: Mapping[str, Any]) -> list[str]:
    """Describe how images were paired with prompts, for printed results, from the `attrs` of `pair_with_prompts`.

    `never_drawn` lists the images that are not scored, `other_prompts` is the number of rows whose prompt differs from the one
    that drew the image, and `other_prompts_sha256` is the hash of the list of prompts used for scoring.
    """
    notes = [f"by other prompts than drew the images in {facts['other_prompts']} rows"] if "other_prompts" in facts else []
    if "never_drawn" in facts:
        notes.append(f"{len(facts['never_drawn'])} images of prompts that are never drawn are not counted")
    return notes


def _by_key(digests: Iterable[Path]) -> dict[tuple[int, int], list[Path]]:
    """Group images by row and copy; UserError for a name without a row."""
    found: dict[tuple[int, int], list[Path]] = {}
    for path in digests:
        key = row_and_copy(path)
        if key is None:
            raise UserError(
                f"the name of {path} does not end in `_<row>p`, so its prompt is unknown; rename it or move it away"
            )
        found.setdefault(key, []).append(path)
    return found


def _other_prompts(digests: Iterable[Path], prompts: pd.Series) -> list[int]:
    """Return the rows whose prompt differs from the one in the manifest of their image; images without a manifest are skipped."""
    lines = {place: manifest.read(place) for place in {path.parent for path in digests}}
    differ = set()
    for path in digests:
        row, digest = row_of(path), lines[path.parent].get(path.name, {}).get("prompt_sha256")
        if digest and row in prompts.index and digest != sha256_texts([prompts[row]]):
            differ.add(row)
    return sorted(differ)


def _matched(folder: Path, found: dict[tuple[int, int], list[Path]], drawn: set[int], partly: bool) -> list[tuple[int, int]]:
    """Return the sorted keys of the images of all `drawn` rows; UserError if `found` has others or, unless `partly`, lacks some."""
    copies = 1 + max(copy for _, copy in found)
    wanted = {(row, copy) for row in drawn for copy in range(copies)}
    twice = [f"{row} ({', '.join(path.name for path in paths)})" for (row, _), paths in sorted(found.items()) if len(paths) > 1]
    problems = {
        "no image for": [] if partly else sorted({row for row, _ in wanted - found.keys()}),
        "images beyond the list for": sorted({row for row, _ in found.keys() - wanted}),
        "more than one image for": twice,
    }
    parts = [f"{what} row {_some(rows)}" for what, rows in problems.items() if rows]
    if parts:
        raise UserError(f"{folder} does not match its {len(wanted)} prompts: {'; '.join(parts)}")
    return sorted(wanted & found.keys())


def image_of_row(folder: Path, rows: list[int]) -> dict[int, Path]:
    """Return the image of each given row, from files named `{row}.png` or `…_{row}p.png`; UserError if one is missing."""
    found: dict[int, Path] = {}
    for path in image_hashes(folder):
        row = int(path.stem) if path.stem.isdecimal() else row_of(path)
        if row in found:
            raise UserError(f"{folder} has two images for row {row}: {found[row].name} and {path.name}")
        if row is not None:
            found[row] = path
    missing = [row for row in rows if row not in found]
    if missing:
        raise UserError(f"{folder} has no image for row {_some(missing)}; files are named {{row}}.png or ..._{{row}}p.png")
    return {row: found[row] for row in rows}


def check(folder: Path, digests: dict[Path, str], forgive: Callable[[Path], bool] = lambda path: False) -> None:
    """Compare all images below `folder`, given with their sha256, with the manifests of the runs that drew them.

    Folders without run.json and manifest were not drawn by this program and are not checked. Raises UserError if an image is not
    in its manifest, is missing, or was changed (unless `forgive(path)`); if a folder has a run.json but no manifest; and if the
    images were drawn with more than one set of encoders and settings.
    """
    settings: dict[str, Path] = {}
    for place in sorted({path.parent for path in digests} | {place for place, _, files in walk(folder) if NAME in files}):
        lines = read(place)
        if not lines and not (place / "run.json").exists():
            continue
        if not lines:
            raise UserError(f"{place} has a run.json without its {NAME}, so its images are of unknown origin; draw them again")
        mine = {path.name: digest for path, digest in digests.items() if path.parent == place}
        _compare(place, mine, lines, forgive)
        settings |= {lines[name]["settings_sha256"]: place for name in mine}
        if len(settings) > 1:
            raise UserError(
                f"{folder} contains images of several encoders or settings, some of them in {place}; score each run separately"
            )


def _compare(place: Path, mine: dict[str, str], lines: dict[str, dict[str, Any]], forgive: Callable[[Path], bool]) -> None:
    kept = {name: line["sha256"] for name, line in lines.items() if line["sha256"]}
    changed = {name for name in mine.keys() & kept.keys() if mine[name] != kept[name] and not forgive(place / name)}
    problems = {
        "not of this run": mine.keys() - kept.keys(),
        "changed since they were drawn": changed,
        "missing": kept.keys() - mine.keys(),
    }
    counts = [f"{len(names)} {what} ({min(names)} first)" for what, names in problems.items() if names]
    if counts:
        raise UserError(f"the images in {place} do not match its {NAME}: {'; '.join(counts)}; draw them again")


def _some(rows: list) -> str:
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return ", ".join(map(str, rows[:5])) + more
