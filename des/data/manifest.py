"""manifest.jsonl of a folder of images: one line per image with its row, seed, settings and hashes of its prompt and file.

Each line is written before its image. An image without a line was not drawn by the run; an image whose hash differs from its
line was damaged or edited. If a file has several lines, the last one counts.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from des.utils.errors import UserError
from des.utils.files import sha256_file
from des.utils.resume import Journal

NAME = "manifest.jsonl"


def append(folder: Path, line: dict[str, Any]) -> None:
    """Append a line to a folder's manifest; safe for several processes at once."""
    Journal(folder / NAME).append([line])


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the last complete line of each file by name; empty without a manifest."""
    return {line["file"]: line for line in Journal(folder / NAME).lines() if isinstance(line.get("file"), str)}


def hashes(paths: list[Path], workers: int = 4) -> dict[Path, str]:
    """Return the sha256 of each file; UserError for a file that cannot be read."""

    def digest(path: Path) -> str:
        try:
            return sha256_file(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None

    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(paths, pool.map(digest, paths), strict=True))
