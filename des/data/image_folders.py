"""Folders of images: finding them, checking them against their manifest, and pairing them with prompts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from des.data import claims, manifest
from des.data.images import SUFFIXES, is_complete, row_and_copy, row_of
from des.data.manifest import NAME, read
from des.data.prompts import never_drawn, read_rows
from des.utils.errors import UserError
from des.utils.files import sha256_texts
from des.utils.folders import walk
from des.utils.logs import logger

import pandas as pd


def image_files(folder: Path, expected: int | None = None) -> list[Path]:
    """Every image file under `folder`, subfolders included, by row and then by name, checked as `image_hashes` does."""
    return list(image_hashes(folder, expected))


def image_hashes(folder: Path, expected: int | None = None, skip_unreadable: bool = False) -> dict[Path, str]:
    """The sha256 of every image file under `folder`, subfolders included, by row and then by name.

    Nothing counts whose path below `folder` has a name that starts with a dot, such as `.ipynb_checkpoints/x_0p.png`.
    Raises UserError when there is none, or another number than `expected`; for what would make the number doubtful: a symbolic
    link to an image or folder, and an image's name on what is no file; and where a run drew them whose manifest says otherwise
    (`check`); with `skip_unreadable` damaged images pass.
    """
    if not folder.is_dir():
        raise UserError(f"there is no image folder {folder}; generate.py draws one, and says where")
    found = []
    for path in _walk(folder):
        named = path.suffix.lower() in SUFFIXES
        if path.is_symlink() and (named or path.is_dir()):
            raise UserError(f"{path} is a symbolic link; only images that are in the folder themselves count, so copy it there")
        if named and not path.is_file():
            raise UserError(f"{path} has the name of an image but is no file; rename it or move it away")
        if named:
            found.append(path)
    if not found:
        raise UserError(f"{folder} holds no image ({', '.join(SUFFIXES)})")
    if expected is not None and len(found) != expected:
        raise UserError(
            f"{folder} holds {len(found)} images, and {expected} are expected; draw the others first, or check the number"
        )
    rows = {path: row_of(path) for path in found}
    digests = manifest.hashes(sorted(found, key=lambda path: (rows[path] is None, rows[path] or 0, str(path))))
    check(folder, digests, (lambda path: not is_complete(path)) if skip_unreadable else (lambda path: False))
    return digests


def _walk(folder: Path) -> Iterator[Path]:
    """Everything under a folder that is not hidden."""
    for place, folders, files in walk(folder):
        yield from (place / name for name in folders + files)


def pair_with_prompts(
    folder: Path,
    csv_path: Path,
    expected: int | None = None,
    skip_unreadable: bool = False,
    other_prompts: bool = False,
) -> pd.DataFrame:
    """Pair the images of `folder` with the rows of a prompt CSV, by the row in each file's name.

    Returns the CSV's rows that are drawn at all, under their row numbers, with columns `image` (path) and `sha256`; a row with
    several images comes several times, and all rows must have the same number. With `expected` images in the folder, rows without
    an image are left out. `attrs` of the result are what a scorer's result records beside its scores: see `pairing_notes`.

    Raises UserError where an image was drawn from another prompt than its row's by the manifest (unless `other_prompts`), that
    names missing, surplus, duplicate and unnumbered images, and as `image_hashes` and `claims.check_complete` do.
    """
    rows = read_rows(csv_path)
    never = set(never_drawn(rows["prompt"].tolist()))
    digests = image_hashes(folder, expected, skip_unreadable)
    found = _by_key(digests)
    differ = _other_prompts(digests, rows["prompt"])
    if differ and not other_prompts:
        raise UserError(
            f"{csv_path} is not the list that drew {folder}: its row {differ[0]} (counted from 0) is another prompt than that "
            f"image was drawn from, as are {len(differ) - 1} further rows; give the list that drew the images, or "
            "--other_prompts if another one is meant"
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
    """Separate the images of rows that are never drawn, which are not scored; a log line names them.

    Those are `rows`, and the rows that the run.json beside an image leaves out. Raises UserError where no other image is left.
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
        raise UserError("no image is left to score: every one is of a prompt that is never drawn")
    return kept, never


def pairing_notes(facts: Mapping[str, Any]) -> list[str]:
    """What people must know about how images were paired with prompts, from the `attrs` of `pair_with_prompts`.

    `never_drawn` are the images that are not scored; `other_prompts` is the number of rows whose prompt is another than the one
    that drew the image, and `other_prompts_sha256` the hash of that list.
    """
    notes = [f"by other prompts than drew the images in {facts['other_prompts']} rows"] if "other_prompts" in facts else []
    if "never_drawn" in facts:
        notes.append(f"{len(facts['never_drawn'])} images of prompts that are never drawn are not counted")
    return notes


def _by_key(digests: Iterable[Path]) -> dict[tuple[int, int], list[Path]]:
    """Images by row and copy; UserError for one whose name has none."""
    found: dict[tuple[int, int], list[Path]] = {}
    for path in digests:
        key = row_and_copy(path)
        if key is None:
            raise UserError(f"{path} does not end in `_<row>p`, so its prompt is unknown")
        found.setdefault(key, []).append(path)
    return found


def _other_prompts(digests: Iterable[Path], prompts: pd.Series) -> list[int]:
    """The rows whose prompt is another than the one that their image was drawn from; images without a manifest have none."""
    lines = {place: manifest.read(place) for place in {path.parent for path in digests}}
    differ = set()
    for path in digests:
        row, digest = row_of(path), lines[path.parent].get(path.name, {}).get("prompt_sha256")
        if digest and row in prompts.index and digest != sha256_texts([prompts[row]]):
            differ.add(row)
    return sorted(differ)


def _matched(folder: Path, found: dict[tuple[int, int], list[Path]], drawn: set[int], partly: bool) -> list[tuple[int, int]]:
    """The keys of all `drawn` rows' images, sorted (`partly`: of those found); UserError where `found` is not exactly these."""
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
    """The image of each of the given rows, from files named `{row}.png` or `…_{row}p.png`; UserError where one is missing."""
    found: dict[int, Path] = {}
    for path in image_files(folder):
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
    """Compare all images below `folder` (with their sha256) with the manifests there; a changed one may be forgiven.

    Folders without a record of a run are the user's own and pass. Raises UserError where an image is not of the run in its folder,
    was changed since, or is missing; where a run's record is incomplete; and where images of several encoders or settings are
    together.
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
                f"{folder} holds images of several encoders or settings, some of them in {place}; score each run alone"
            )


def _compare(place: Path, mine: dict[str, str], lines: dict[str, dict[str, Any]], forgive: Callable[[Path], bool]) -> None:
    kept = {name: line["sha256"] for name, line in lines.items() if line["sha256"]}
    changed = {name for name in mine.keys() & kept.keys() if mine[name] != kept[name] and not forgive(place / name)}
    problems = {
        "not of this run": mine.keys() - kept.keys(),
        "changed since drawn": changed,
        "missing": kept.keys() - mine.keys(),
    }
    told = [f"{len(names)} {what} ({min(names)} first)" for what, names in problems.items() if names]
    if told:
        raise UserError(f"the images in {place} are not those of its {NAME}: {'; '.join(told)}; draw them again")


def _some(rows: list) -> str:
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return ", ".join(map(str, rows[:5])) + more
