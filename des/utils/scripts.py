"""Running the project's scripts."""

import runpy
import sys
from pathlib import Path

from des.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def run_script(path: str, *argv: object) -> None:
    """Run one of the project's scripts as its command line would, in this process so that libraries load once.

    Raises UserError with the script's own sentence where it stops with one.
    """
    saved = sys.argv
    sys.argv = [str(ROOT / path), *map(str, argv)]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            said = stop.code if isinstance(stop.code, str) else f"it ended with {stop.code}"
            raise UserError(f"{path}: {said.removeprefix('error: ')}") from None
    finally:
        sys.argv = saved
