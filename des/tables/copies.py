"""Copies of images: those of another program, and those of a part of a prompt list."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from des.data.image_folders import image_of_row
from des.data.images import SUFFIXES
from des.tables.inputs import identity


def copy_images(source: Path, rows: Iterable[int], folder: Path) -> None:
    """Make `folder` hold copies of the images of some rows, numbered from 0, and no other image; equal copies are left as they are.

    The images of `source` are named `{row}.png` or `…_{row}p.png`. Raises UserError if one is missing, or a row has two.
    """
    images = image_of_row(source, list(rows)).values()
    copies = {folder / f"{folder.name}_{i}p{path.suffix.lower()}": path for i, path in enumerate(images)}
    folder.mkdir(parents=True, exist_ok=True)
    for path in set(folder.iterdir()) - copies.keys():
        if path.suffix.lower() in SUFFIXES:
            path.unlink()
    for copy, path in copies.items():
        if identity(copy) != identity(path):
            shutil.copyfile(path, copy)


def copied_inputs(options: Sequence[str | Path], rows: Sequence[int], folder: Path, dry: bool) -> tuple[str | Path, ...]:
    """Return options of generate.py whose start images and masks are copies of some rows in `folder`, numbered from 0.

    With `dry`, nothing is copied. Raises UserError if an image is missing.
    """
    made = list(options)
    for option in ("--init_images", "--mask_images"):
        if option in made:
            place, copy = made.index(option) + 1, folder / option.removeprefix("--")
            if not dry:
                copy_images(Path(made[place]), rows, copy)
            made[place] = copy
    return tuple(made)
