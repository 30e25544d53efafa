"""The manifest of a folder of images, manifest.jsonl: one line an image, which says what it was drawn from and what its file is.

A line is written before its image takes its place, so an image without a line is none of the run's, and one that differs from
its line was damaged or edited. Where a file has several lines the last one holds.
"""

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from des.cli import UserError
from des.folders import walk
from des.results import sha256_file

NAME = "manifest.jsonl"


def append(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Add lines to a manifest, each whole or not at all for whoever reads it; several processes may add to one file."""
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if _ends_within_a_line(path):
            data = b"\n" + data
        written = os.write(descriptor, data)
        if written != len(data):
            raise OSError(28, "No space left on device", str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ends_within_a_line(path: Path) -> bool:
    """Whether a process that died left half a line."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The last whole line of each file by its name; empty where there is no manifest."""
    lines: dict[str, dict[str, Any]] = {}
    try:
        text = (folder / NAME).read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return lines
    for part in text.split("\n"):
        try:
            line = json.loads(part)
            lines[line["file"]] = line
        except (ValueError, KeyError, TypeError):  # half a line, which its process did not live to finish
            continue
    return lines


def hashes(paths: list[Path], workers: int = 4) -> dict[Path, str]:
    """The sha256 of each file; UserError that names one which cannot be read."""

    def digest(path: Path) -> str:
        try:
            return sha256_file(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None

    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(paths, pool.map(digest, paths), strict=True))


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
