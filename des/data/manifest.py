"""The manifest of a folder of images, manifest.jsonl: one line an image, which says what it was drawn from and what its file is.

A line is written before its image takes its place, so an image without a line is none of the run's, and one that differs from
its line was damaged or edited. Where a file has several lines the last one holds.
"""

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from des.utils.errors import UserError
from des.utils.files import sha256_file

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
