"""Writing files atomically, and the sha256 of files, texts and tensors."""

import contextlib
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
def replacing(path: Path, replace_folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path` for a file or folder; it is renamed to `path` on success, and removed on failure.

    Raises UserError if `path` is a folder, unless `replace_folder` is set, which is for folders that this program made. Errors of
    torch and safetensors for a failed write become an OSError.
    """
    _refuse_folder(path, replace_folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{suffix}") for suffix in ("tmp", "old"))
    _remove(temporary)
    try:
        yield temporary
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
    except Exception as error:
        of_torch = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"
        if of_torch and any(sign in str(error) for sign in _NOT_WRITTEN):
            raise OSError(f"{path} could not be written, perhaps because the disk is full") from None
        raise
    finally:
        _remove(temporary)


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
