"""Logging and progress bars."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from des.utils.errors import UserError

from tqdm import tqdm

logger = logging.getLogger("des")
_FORMAT = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
_LOG_LINE = re.compile(r"\d\d:\d\d:\d\d ")


def progress(items: Iterable | None, **options) -> tqdm:
    """A tqdm bar, which is shown on a terminal only: elsewhere log lines show the progress."""
    return tqdm(items, disable=None, dynamic_ncols=True, **options)


class _BesideBars(logging.StreamHandler):
    """Writes log lines to stderr without breaking progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _is_log(path: Path) -> bool:
    """Whether a file is empty or starts as a log does."""
    with path.open(encoding="utf-8", errors="replace") as file:
        start = file.read(9)
    return not start or bool(_LOG_LINE.match(start))


def _file_handler(path: Path) -> logging.Handler:
    """A handler that appends to a log file. Raises UserError if the file has other content than log lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and not _is_log(path):
        raise UserError(f"{path} exists and is not a log file; name another file")
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_FORMAT)
    return handler


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Append the log lines of this block, and the error that ends it, to a file as well. Raises UserError as `setup_logging`."""
    handler = _file_handler(path)
    logger.addHandler(handler)
    try:
        yield
    except UserError as error:
        handler.handle(logging.makeLogRecord({"msg": f"error: {error}", "levelno": logging.ERROR}))
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()


@contextmanager
def kept_handlers() -> Iterator[None]:
    """Restore the log's handlers at the end of this block, in which a script may call `setup_logging`."""
    before, logger.handlers[:] = logger.handlers[:], []
    try:
        yield
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers[:] = before


def setup_logging(log_file: Path | None = None, quiet: bool = False) -> None:
    """Send the project's log lines to stderr, and to a file if one is given, which gets those of level DEBUG too.

    With `quiet`, for all processes but the main one, log errors only and write no file. Raises UserError if the file has other
    content than log lines.
    """
    handlers: list[logging.Handler] = [_BesideBars()]
    handlers[0].setLevel(logging.ERROR if quiet else logging.INFO)
    handlers[0].setFormatter(_FORMAT)
    if log_file and not quiet:
        handlers.append(_file_handler(log_file))
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    warnings.filterwarnings("ignore", module="huggingface_hub")  # these are about its internals
    _silence_libraries()


def _silence_libraries() -> None:
    """Turn off the messages and progress bars of transformers and diffusers, whether they are imported already or later."""
    from huggingface_hub.utils import disable_progress_bars

    os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error")
    disable_progress_bars()  # transformers asks for this when it is loaded
    for name in ("transformers", "diffusers"):
        if library := sys.modules.get(f"{name}.utils.logging"):
            library.set_verbosity_error()
            library.disable_progress_bar()
