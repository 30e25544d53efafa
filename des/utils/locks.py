"""Locks of output files, held by living processes only: the operating system drops them when a process dies."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from des.utils.errors import UserError

_descriptors: dict[Path, int] = {}  # stay open: closing any descriptor of a file drops all locks that the process has on it


@contextmanager
def locked(path: Path, what: str, start: int = 0, length: int = 0, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock of the file `path`, which stays behind empty; UserError at once where another process has it.

    With `wait`, wait for that process instead. `what` says in the error what is being made in the file's folder. With a `length`,
    only the bytes from `start` on are locked, so that processes with disjoint ranges share one file. Locks keep processes apart,
    not parts of one process.
    """
    descriptor = _descriptor(path)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), length, start)
    except (BlockingIOError, PermissionError):
        told = f"another process is making {what} in {path.parent}"
        raise UserError(f"{told}; wait until it ends, or name another folder") from None
    try:
        yield
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN, length, start)


def _descriptor(path: Path) -> int:
    """The one descriptor that this process has of a lock file, which is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.resolve()
    known = _descriptors.get(path)
    if known is None or not path.exists() or not os.path.samestat(os.fstat(known), path.stat()):
        _descriptors[path] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if known is not None:
            os.close(known)  # of a file that was removed
    return _descriptors[path]
