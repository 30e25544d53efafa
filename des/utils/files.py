"""Writing files atomically, and the sha256 of files, texts and tensors."""

import contextlib
import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from des.utils.errors import UserError

if TYPE_CHECKING:
    import torch

_NOT_WRITTEN = ("inline_container", "iostream", "I/O error")  # in messages of torch and safetensors when a write fails
_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_A_RESULT = (".txt", ".json", ".csv")


class ResultPaths(NamedTuple):
    """The files of one result: a text, its numbers, and for some results a table with one row per image."""

    text: Path
    json: Path
    csv: Path


def result_paths(output: Path) -> ResultPaths:
    """The three files of a result named `output`, with or without one of their suffixes or .md.

    Another suffix is part of the name: the numbers of `fid_0.3` are in `fid_0.3.json`. The text is in `output` itself, unless that
    ends in .json or .csv.
    """
    suffix = output.suffix.lower()
    stem = output.name[: -len(suffix)] if suffix in (*_OF_A_RESULT, ".md") else output.name
    text, numbers, table = (output.with_name(stem + each) for each in _OF_A_RESULT)
    return ResultPaths(text if suffix in (".json", ".csv") else output, numbers, table)


def is_reserved(stem: str) -> bool:
    """Whether a result of this name would overwrite another file of an image folder, such as the JSON file of an image."""
    return stem.lower() in ("run", "manifest", "clipscore", "metrics") or bool(re.search(r"_\d+p(_\d+)?$", stem))


@contextlib.contextmanager
def replacing(path: Path, replace_folder: bool = False, size: int = 0) -> Iterator[Path]:
    """Yield a temporary path beside `path` for a file or folder; it is renamed to `path` on success, and removed on failure.

    Files and folders get the permissions that the umask gives new ones. `size` is the number of bytes that will be written.
    Raises UserError if `path` is a folder, unless `replace_folder` is set, which is for folders that this program made, and
    OSError as `writing` and `check_room` do.
    """
    _refuse_folder(path, replace_folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_room(path, size)
    temporary, old = (path.with_name(f".{path.name}.{suffix}") for suffix in ("tmp", "old"))
    _remove(temporary)
    try:
        with writing(path, size, temporary):
            temporary.touch()  # shows the umask, which cannot be read without changing it for all threads
            mode = temporary.stat().st_mode & 0o777
            temporary.unlink()
            yield temporary
            _set_mode(temporary, mode)
        _refuse_folder(path, replace_folder)
        if path.is_dir():
            _remove(old)
            path.replace(old)  # a folder cannot be renamed onto one that holds files
            try:
                temporary.replace(path)
            except BaseException:
                old.replace(path)
                raise
        else:
            temporary.replace(path)
        _remove(old)
    finally:
        _remove(temporary)


def _set_mode(path: Path, mode: int) -> None:
    """Give a file, or all files and folders in a folder, the permissions of new files; safetensors gives them to the owner alone."""
    for each in [path, *path.rglob("*")] if path.is_dir() else [path]:
        with contextlib.suppress(OSError):  # some network file systems have no permissions
            if not each.is_symlink():
                wanted = mode | (mode & 0o444) >> 2 if each.is_dir() else mode
                each.chmod(each.stat().st_mode & ~0o777 | wanted)


@contextlib.contextmanager
def writing(path: Path, size: int = 0, temporary: Path | None = None) -> Iterator[None]:
    """Turn a failed write inside this block into an OSError that names `path`, and for a full disk the bytes free and needed.

    Writes into an open file raise errors without its name, torch and safetensors raise errors of other classes, and
    `shutil.copytree` raises a list of tuples. `size` is the number of bytes to be written, `temporary` the place of `path` until then.
    """
    try:
        yield
    except shutil.Error as error:
        source, _, reason = error.args[0][0]
        full = "No space left" in reason or "quota exceeded" in reason
        text = f"the disk is full ({_room(path, size)})" if full else f"{source} could not be copied, {reason}"
        raise OSError(errno.ENOSPC if full else errno.EIO, text, str(path)) from None
    except OSError as error:
        if error.errno not in (*_FULL, errno.EIO, errno.EFBIG):
            raise
        text, where = error.strerror, str(error.filename or path)
        if error.errno in _FULL and not text.startswith("the disk is full"):  # as `check_room` says inside the block
            text = f"the disk is full ({_room(path, size)})"
        raise OSError(error.errno, text, where.replace(str(temporary), str(path)) if temporary else where) from None
    except Exception as error:
        library = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"
        if library and any(sign in str(error) for sign in _NOT_WRITTEN):
            raise OSError(errno.ENOSPC, f"the disk may be full ({_room(path, size)})", str(path)) from None
        raise


def check_room(path: Path, size: int) -> None:
    """Raise OSError if the file system of the folder of `path` has less than `size` bytes free."""
    usage = shutil.disk_usage(path.parent)
    if usage.total and usage.free < size:  # some network file systems report nothing
        raise OSError(errno.ENOSPC, f"the disk is full ({_room(path, size)})", str(path))


def _room(path: Path, size: int) -> str:
    free = f"{shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free"
    return f"{size / 1e6:,.1f} MB are needed, {free}" if size else free


def _refuse_folder(path: Path, replace_folder: bool) -> None:
    if path.is_dir() and not replace_folder:
        raise UserError(f"{path} is a folder, which is not replaced; choose another name, or move it away")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; bytes of file names that are not UTF-8 are written as `\\udc..`, which JSON reads back."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically; paths and devices become strings."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_texts(texts: Iterable[str]) -> str:
    """The sha256 of a list of texts. It depends on the order, and on where one text ends and the next begins."""
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=True).encode()).hexdigest()


def sha256_tensors(tensors: Mapping[str, "torch.Tensor"], dtype: "torch.dtype | None" = None) -> str:
    """The sha256 of named tensors (names, dtypes, shapes, values), cast to `dtype` if given; order and device do not matter."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor if dtype is None else tensor.to(dtype)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
