"""The error that scripts print without a traceback."""

import contextlib
import difflib
from pathlib import Path


class UserError(Exception):
    """An error the user can fix. Scripts print it and exit with status 1, without a traceback."""


def not_found(what: str, path: Path, advice: str = "") -> UserError:
    """Return the error for an input `path` that is missing, or is a folder instead of a file or a file instead of a folder.

    `what` describes the input, such as "the prompt file". The error names the current folder if the path is relative, and the files
    (or the folders) beside the missing one whose names are most like it.
    """
    end = f"; {advice}" if advice else ""
    if path.exists():
        other = "a folder, but a file is needed" if path.is_dir() else "a file, but a folder is needed"
        return UserError(f"{what} {path} is {other}{end}")
    relative = "" if path.is_absolute() else f" in the current folder, {Path.cwd()}"
    return UserError(f"{what} {path} does not exist{relative}{names_beside(path)}{end}")


def names_beside(path: Path) -> str:
    """Return ` (FOLDER has A, B, C)`, the names beside a missing path, or beside its first missing folder, that are most like it.

    They are up to three files with its suffix or, for a name without a suffix, folders with similar names; "" if there are none.
    """
    missing = path.absolute()
    while not missing.parent.exists():
        missing = missing.parent
    beside: list[str] = []
    with contextlib.suppress(OSError):  # a folder that may not be listed
        shown = [each for each in sorted(missing.parent.iterdir()) if not each.name.startswith(".")]
        beside = [each.name for each in shown if (each.suffix == missing.suffix if missing.suffix else each.is_dir())]
    likely = difflib.get_close_matches(missing.name, beside, cutoff=0 if missing.suffix else 0.6)
    return f" ({missing.parent} has {', '.join(likely)})" if likely else ""
