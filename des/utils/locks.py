"""Locks of output folders. The operating system releases a lock when its process ends, however it ends."""

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

_REFUSED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)  # errors of NFS and Lustre without lock support
_descriptors: dict[Path, int] = {}  # they stay open, because closing one releases all locks of the process on that file


@contextmanager
def locked(path: Path, what: str, start: int = 0, length: int = 0, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` inside this block; the file is made empty and stays behind.

    Raises UserError if another process holds the lock; with `wait`, waits for it instead. `what` names in the error what is being
    made in the file's folder. With a `length`, only that many bytes from `start` on are locked, so that processes with disjoint
    ranges can share one file. A lock does not exclude other threads of the same process. On a file system without locks a warning
    is logged, and the block runs unlocked.
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
        logger.warning("%s cannot be locked on this file system: do not start a second process that makes %s there", path, what)
    try:
        yield
    finally:
        if held:
            fcntl.lockf(descriptor, fcntl.LOCK_UN, length, start)


def _descriptor(path: Path) -> int:
    """This process's descriptor of a lock file, which is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.resolve()
    known = _descriptors.get(path)
    if known is None or not path.exists() or not os.path.samestat(os.fstat(known), path.stat()):
        _descriptors[path] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if known is not None:
            os.close(known)  # of a file that was removed
    return _descriptors[path]
