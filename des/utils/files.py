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


if TYPE_CHECKING:
    import torch

_NOT_WRITTEN = ("inline_container", "iostream", "I/O error")
RESERVED = ("run", "manifest", "clipscore", "metrics")  # files that a folder of images or a run has by these names
_OF_A_RESULT = (".txt", ".json", ".csv")


class ResultPaths(NamedTuple):
    """The files of one result: a readable text, its numbers, and a table with one row an image where there is one."""

    text: Path
    json: Path
    csv: Path


def result_paths(output: Path) -> ResultPaths:
    """The three files of a result named `output`, with or without one of their suffixes or .md.

    Another suffix is a part of the name: the numbers of `fid_0.3` are in `fid_0.3.json`. The text is in `output` itself, unless
    that is the name of the numbers or the table.
    """
    suffix = output.suffix.lower()
    stem = output.name[: -len(suffix)] if suffix in (*_OF_A_RESULT, ".md") else output.name
    text, numbers, table = (output.with_name(stem + each) for each in _OF_A_RESULT)
    return ResultPaths(text if suffix in (".json", ".csv") else output, numbers, table)


def is_reserved(stem: str) -> bool:
    """Whether a result of this name would take the place of another file of an image folder, an image's card included."""
    return stem.lower() in RESERVED or bool(re.search(r"_\d+p(_\d+)?$", stem))


@contextlib.contextmanager
def replacing(path: Path, replace_folder: bool = False) -> Iterator[Path]:
    """Give a temporary name beside `path` for a file or folder; it replaces `path` on success, and is removed on failure.

    A folder at `path` is replaced only with `replace_folder`, for a caller that knows that this program made it; otherwise UserError
    is raised and the folder is kept. What torch and safetensors raise where they cannot write becomes an OSError.
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
        if _is_write_error(error) and any(sign in str(error) for sign in _NOT_WRITTEN):
            raise OSError(f"{path} could not be written, perhaps because the disk is full") from None
        raise
    finally:
        _remove(temporary)


def _is_write_error(error: Exception) -> bool:
    """Whether an error is of a class that torch (RuntimeError) or safetensors raise where they cannot write."""
    return isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"


def _refuse_folder(path: Path, replace_folder: bool) -> None:
    if path.is_dir() and not replace_folder:
        raise UserError(f"{path} is a folder, which is not replaced; give another name, or move it away")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; a file name's bytes that are not UTF-8 become `\\udc..`, which JSON reads back."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; paths and devices become strings."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_texts(texts: Iterable[str]) -> str:
    """The sha256 of a list of texts; order counts, and no two different lists share one."""
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=True).encode()).hexdigest()


def sha256_tensors(tensors: Mapping[str, "torch.Tensor"], dtype: "torch.dtype | None" = None) -> str:
    """The sha256 of named tensors, cast to `dtype` if given: names, types, shapes and values, whatever their order or device."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor if dtype is None else tensor.to(dtype)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def findings_sha256(content: Mapping[str, Any]) -> str:
    """The checksum of a detector's result (its JSON): its images with their findings, and the detector's facts."""
    return sha256_texts([json.dumps([content["images"], content["detector"]], sort_keys=True, default=str)])
