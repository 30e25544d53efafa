"""Locks on folders and files that two processes must not work on at once; the system drops them when their process ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from des.cli import UserError

_OPEN: dict[Path, int] = {}  # POSIX locks end when their process closes any descriptor of the file, so each is opened once


@contextlib.contextmanager
def locked(path: Path, what: str, start: int = 0, length: int = 0, wait: bool = False) -> Iterator[None]:
    """Hold `path`, a lock file that stays there, or only `length` of its bytes from `start`; `what` names it in the error.

    Raises UserError where another process that lives holds any of them, unless it is to `wait` for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.resolve()
    if path not in _OPEN:
        _OPEN[path] = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(_OPEN[path], fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), length, start)
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process is at work on {what}; wait for it, or stop it") from None
    try:
        yield
    finally:
        fcntl.lockf(_OPEN[path], fcntl.LOCK_UN, length, start)
