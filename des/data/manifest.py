"""The manifest of a folder of images, manifest.jsonl: one line an image, with its prompt, seed and settings and the hash of its file.

The line is written before the image. An image without a line is not of the run; one that differs from its line was damaged or
edited. Where a file has several lines, the last one counts.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from des.utils.errors import UserError
from des.utils.files import sha256_file
from des.utils.resume import Journal

NAME = "manifest.jsonl"


def append(folder: Path, line: dict[str, Any]) -> None:
    """Add a line to a folder's manifest; several processes may do so at once."""
    Journal(folder / NAME).append([line])


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The last whole line of each file by its name; empty where there is no manifest."""
    return {line["file"]: line for line in Journal(folder / NAME).lines() if isinstance(line.get("file"), str)}


def hashes(paths: list[Path], workers: int = 4) -> dict[Path, str]:
    """The sha256 of each file; raises UserError for a file that cannot be read."""

    def digest(path: Path) -> str:
        try:
            return sha256_file(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None

    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(paths, pool.map(digest, paths), strict=True))
