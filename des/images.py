"""Image files: their names and rows, pairing with prompts, reading safely and in batches."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
from PIL import Image

from des.cli import UserError, progress
from des.prompts import never_drawn, read_rows

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_ROW = re.compile(r"_(\d+)p\.[a-z]+$", re.IGNORECASE)


def image_name(output_name: str, method: str, row: int) -> str:
    """The file name of the image of prompt row `row`, `{output}_{method}_{row}p.png`."""
    return f"{output_name}_{method}_{row}p.png"


def row_of(path: Path) -> int | None:
    """The prompt row in an image's file name, or None where it names none."""
    match = _ROW.search(path.name)
    return int(match[1]) if match else None


def image_files(folder: Path) -> list[Path]:
    """Every image file under `folder`, subfolders included, by row and then by name; UserError when there is none."""
    if not folder.is_dir():
        raise UserError(f"there is no image folder {folder}")
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    if not found:
        raise UserError(f"{folder} holds no image ({', '.join(SUFFIXES)})")
    rows = {path: row_of(path) for path in found}
    return sorted(found, key=lambda path: (rows[path] is None, rows[path] or 0, str(path)))


def pair_with_prompts(folder: Path, csv_path: Path) -> pd.DataFrame:
    """Pair the images of `folder` with the rows of a prompt CSV, by the row in each file's name.

    Returns the CSV's rows that are drawn at all, under their row numbers, with a column `image` of paths. Raises UserError
    that names missing, surplus, duplicate and unnumbered images.
    """
    rows = read_rows(csv_path)
    expected = set(rows.index) - set(never_drawn(rows["prompt"].tolist()))
    by_row: dict[int, list[Path]] = {}
    for path in image_files(folder):
        row = row_of(path)
        if row is None:
            raise UserError(f"{path} does not end in `_<row>p`, so its prompt is unknown")
        by_row.setdefault(row, []).append(path)
    twice = [f"{row} ({', '.join(path.name for path in paths)})" for row, paths in sorted(by_row.items()) if len(paths) > 1]
    problems = {
        "no image for": sorted(expected - by_row.keys()),
        "images beyond the list for": sorted(by_row.keys() - expected),
    }
    problems["more than one image for"] = twice
    told = [f"{what} row {_some(rows)}" for what, rows in problems.items() if rows]
    if told:
        raise UserError(f"{folder} does not match its {len(expected)} prompts: {'; '.join(told)}")
    return rows.loc[sorted(expected)].assign(image=lambda kept: [by_row[row][0] for row in kept.index])


def read_image(path: Path) -> Image.Image:
    """Read a whole image as RGB; UserError that names a file which is truncated or no image."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no readable image: {str(error).splitlines()[0]}") from None


def is_complete(path: Path) -> bool:
    """Whether `path` is there and can be read to its last pixel."""
    try:
        read_image(path)
    except UserError:
        return False
    return True


def image_batches(paths: list[Path], batch_size: int, desc: str, workers: int = 4) -> Iterator[list[Image.Image]]:
    """Read images in batches, in order, the next one decoded by `workers` threads while this one is used."""

    def read(start: int) -> list:
        return [pool.submit(read_image, path) for path in paths[start : start + batch_size]]

    with ThreadPoolExecutor(workers) as pool, progress(paths, desc=desc, unit="image") as bar:
        ahead = read(0)
        for start in range(0, len(paths), batch_size):
            batch, ahead = ahead, read(start + batch_size)
            images = [future.result() for future in batch]
            yield images
            bar.update(len(images))


def _some(rows: list) -> str:
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return ", ".join(map(str, rows[:5])) + more
