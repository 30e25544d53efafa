"""Hashes of the files and folders that results depend on, and inputs.json, which records them in the output folder."""

import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from des.data.images import SUFFIXES
from des.data.run_record import read_json
from des.models.model_files import split_revision
from des.utils.errors import UserError
from des.utils.files import sha256_file, sha256_texts, write_json

from huggingface_hub import try_to_load_from_cache

NAME = "inputs.json"
_MODEL_FILES = ("model_index.json", "config.json", "open_clip_config.json")  # a folder with one of these is a model


def identity(path: Path) -> str | None:
    """The sha256 of a file, or of the names and contents of a folder's files; None if the path does not exist.

    For a pipeline or model, all files that may be loaded count; for any other folder, all images, including subfolders. Hidden
    files are ignored.
    """
    if path.is_file():
        return _sha256(path)
    if not path.is_dir():
        return None
    files = _model_files(path) if any((path / name).is_file() for name in _MODEL_FILES) else _images(path)
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(_sha256, files))
    return sha256_texts(f"{file.relative_to(path)} {digest}" for file, digest in zip(files, digests, strict=True))


def model_identity(model: str) -> str:
    """The `identity` of a model's folder, or a hub id with the commit of its cached files, if there are any."""
    if Path(model).exists():
        return identity(Path(model)) or ""
    repository, revision = split_revision(model)
    cached = try_to_load_from_cache(repository, "model_index.json", revision=revision)
    return f"{repository}@{Path(cached).parent.name}" if isinstance(cached, str) else model


def check_inputs(out: Path, inputs: Mapping[str, str]) -> None:
    """Raise UserError if `out` was made with other values of these inputs (by option), on which all images depend.

    Inputs that only one side has are not compared, so a later call may add options.
    """
    before = _recorded(out)
    changed = [
        f"{option} was {_short(before[option])} and is now {_short(value)}"
        for option, value in inputs.items()
        if before.get(option, value) != value
    ]
    if changed:
        raise UserError(f"{out} was made with other inputs ({'; '.join(changed)}), so give another --out or the same inputs")


def record_inputs(out: Path, inputs: Mapping[str, str]) -> None:
    """Add inputs to the record in `out`, after `check_inputs`."""
    write_json(out / NAME, _recorded(out) | dict(inputs))


def _recorded(out: Path) -> dict[str, str]:
    if (out / NAME).exists():
        return read_json(out / NAME)
    for path in (out / "jobs").glob("draw-*.json"):  # earlier versions recorded the seed only in the jobs
        argv = read_json(path)["argv"]
        return {"--seed": argv[argv.index("--seed") + 1]}
    return {}


def _model_files(folder: Path) -> list[Path]:
    """The files of a pipeline or model: those in the folder and one level below."""
    files = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file()]
    return sorted(path for path in files if not _hidden(path, folder))


def _images(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    return sorted(path for path in found if not _hidden(path, folder))


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _sha256(path: Path) -> str:
    """The hash of a file, cached until the file's status changes.

    A program can reset a file's modification time, but not its ctime, so every change of content is detected.
    """
    status = path.stat()
    return _sha256_of(path, (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))


@functools.cache
def _sha256_of(path: Path, status: tuple[int, ...]) -> str:
    return sha256_file(path)


def _short(value: str) -> str:
    return value[:12] if len(value) == 64 else value
