"""Walking folders of images and results. Files and folders whose name starts with a dot are hidden, and are skipped."""

import os
from collections.abc import Iterator
from pathlib import Path


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, as `.ipynb_checkpoints`, `.DS_Store` and macOS's `._image.png` are."""
    return name.startswith(".")


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield `folder` and every folder below it, each with the sorted names of its subfolders and files, without hidden ones.

    `folder` itself may be hidden. Symbolic links are listed, and not followed. Raises OSError if a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not is_hidden(name))  # in place, because os.walk reads this list
        yield Path(place), list(folders), sorted(name for name in files if not is_hidden(name))


def visible(folder: Path, pattern: str) -> list[Path]:
    """The paths in `folder` that match a glob pattern and are not hidden, sorted."""
    return sorted(path for path in folder.glob(pattern) if not is_hidden(path.name))
