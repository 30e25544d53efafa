"""Run the project's scripts in this process."""

import runpy
import sys
from pathlib import Path

from des.utils.errors import UserError
from des.utils.logs import kept_handlers

ROOT = Path(__file__).resolve().parents[2]


def run_script(path: str, *argv: object) -> None:
    """Run one of the project's scripts with a command line, in this process so that libraries are imported once.

    Raises UserError with the script's error message if it fails. The log's handlers are restored.
    """
    saved = sys.argv
    sys.argv = [str(ROOT / path), *map(str, argv)]
    try:
        with kept_handlers():
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            reason = stop.code if isinstance(stop.code, str) else f"it ended with exit status {stop.code}"
            raise UserError(f"{path}: {reason.removeprefix('error: ')}") from None
    finally:
        sys.argv = saved
