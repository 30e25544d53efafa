"""Locks of output files, held by living processes only: the operating system drops them when a process dies."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from des.utils.errors import UserError
from des.utils.logs import logger

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_REFUSED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)  # what NFS and Lustre answer where they do not lock
_descriptors: dict[Path, int] = {}  # stay open: closing any descriptor of a file drops all locks that the process has on it


@contextmanager
def locked(path: Path, what: str, start: int = 0, length: int = 0, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock of the file `path`, which stays behind empty; UserError at once where another process has it.

    With `wait`, wait for that process instead. `what` says in the error what is being made in the file's folder. With a `length`,
    only the bytes from `start` on are locked, so that processes with disjoint ranges share one file. Locks keep processes apart,
    not parts of one process. Where the file system refuses locks, a warning names the file and the block runs without one.
    """
    if fcntl is None:
        raise UserError(
            "Windows has no file locks of the kind that this program needs; run it in WSL, the Windows Subsystem for Linux"
        )
    descriptor, held = _descriptor(path), True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), length, start)
    except (BlockingIOError, PermissionError):
        raise UserError(
            f"another process is making {what} in {path.parent}; wait until it ends, or name another folder"
        ) from None
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        held = False
        logger.warning("%s cannot be locked on this file system: start no second process that makes %s there", path, what)
    try:
        yield
    finally:
        if held:
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
