"""Logging and progress bars."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from des.utils.errors import UserError

from tqdm import tqdm

logger = logging.getLogger("des")
_LOG_LINE = re.compile(r"\d\d:\d\d:\d\d ")


def progress(items: Iterable | None, **options) -> tqdm:
    """A tqdm bar on a terminal; nothing in a pipe, where log lines show the progress."""
    return tqdm(items, disable=None, dynamic_ncols=True, **options)


class _BesideBars(logging.StreamHandler):
    """Writes log lines to stderr above progress bars instead of into them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _is_log(path: Path) -> bool:
    """Whether a file is empty or starts as a log does."""
    with path.open(encoding="utf-8", errors="replace") as file:
        start = file.read(9)
    return not start or bool(_LOG_LINE.match(start))


def setup_logging(*log_files: Path | None, quiet: bool = False) -> None:
    """Send the project's log lines to stderr and to files (None is none), which get the details (DEBUG) that stderr omits.

    `quiet`, for all processes but the main one, logs errors only and writes no file. Raises UserError for a
    file with other content than such lines.
    """
    handlers: list[logging.Handler] = [_BesideBars()]
    for log_file in () if quiet else filter(None, log_files):
        log_file.parent.mkdir(parents=True, exist_ok=True)
        if log_file.is_file() and not _is_log(log_file):
            raise UserError(f"{log_file} holds something else than a log; give another file")
        handlers.append(logging.FileHandler(log_file, encoding="utf-8", errors="backslashreplace"))
    handlers[0].setLevel(logging.ERROR if quiet else logging.INFO)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    warnings.filterwarnings("ignore", module="huggingface_hub")  # about its own internals
    _silence_libraries()


def _silence_libraries() -> None:
    """Turn off the messages and progress bars of transformers and diffusers, whether they are loaded already or load later."""
    from huggingface_hub.utils import disable_progress_bars

    os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error")
    disable_progress_bars()  # transformers asks for this when it is loaded
    for name in ("transformers", "diffusers"):
        if library := sys.modules.get(f"{name}.utils.logging"):
            library.set_verbosity_error()
            library.disable_progress_bar()
