"""What results depend on, by content: hashes of files and folders, and the record of the inputs that an output folder was made with."""

import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from des.data.images import SUFFIXES
from des.data.run_record import read_json
from des.utils.errors import UserError
from des.utils.files import sha256_file, sha256_texts, write_json

from huggingface_hub import try_to_load_from_cache

NAME = "inputs.json"
_MODEL_FILES = ("model_index.json", "config.json", "open_clip_config.json")  # one of them makes a folder a model's


def identity(path: Path) -> str | None:
    """The sha256 of a file, or of the names and contents of a folder's files; None where there is neither.

    In a pipeline's or model's folder every file that may be loaded counts; in any other folder every image, subfolders included,
    but no hidden one.
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
    """The identity of a model's folder, or a hub id with the commit of its files in the cache where they are there already."""
    if Path(model).exists():
        return identity(Path(model)) or ""
    cached = try_to_load_from_cache(model, "model_index.json")
    return f"{model}@{Path(cached).parent.name}" if isinstance(cached, str) else model


def check_inputs(out: Path, inputs: Mapping[str, str]) -> None:
    """Raise UserError where `out` was made with other inputs than these (by option), each of which decides every image.

    What only one side has is not compared, so that a later call may add options.
    """
    before = _recorded(out)
    changed = [
        f"{option} was {_short(before[option])} and is now {_short(value)}"
        for option, value in inputs.items()
        if before.get(option, value) != value
    ]
    if changed:
        raise UserError(f"{out} was made with other inputs ({'; '.join(changed)}), so give another --out, or the same inputs")


def record_inputs(out: Path, inputs: Mapping[str, str]) -> None:
    """Add inputs to the record in `out`, after `check_inputs`."""
    write_json(out / NAME, _recorded(out) | dict(inputs))


def _recorded(out: Path) -> dict[str, str]:
    if (out / NAME).exists():
        return read_json(out / NAME)
    for path in (out / "jobs").glob("draw-*.json"):  # folders of earlier versions have the seed in their jobs' records only
        argv = read_json(path)["argv"]
        return {"--seed": argv[argv.index("--seed") + 1]}
    return {}


def _model_files(folder: Path) -> list[Path]:
    """The files at the top and one level below, as pipelines and models are laid out."""
    files = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file()]
    return sorted(path for path in files if not _hidden(path, folder))


def _images(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    return sorted(path for path in found if not _hidden(path, folder))


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _sha256(path: Path) -> str:
    """The hash of a file, read again when its status changed.

    A program can set a file's time of modification back, but not its ctime, so no change of content passes unseen.
    """
    status = path.stat()
    return _sha256_of(path, (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))


@functools.cache
def _sha256_of(path: Path, status: tuple[int, ...]) -> str:
    return sha256_file(path)


def _short(value: str) -> str:
    return value[:12] if len(value) == 64 else value
