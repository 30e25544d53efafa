"""Identities of a pipeline's components: hashes of the loaded files and configurations, whatever their paths.

Weights are identified by the sha256 of their files. In the hub's cache, it is the name of a file's blob. Other hashes are stored
in the user's cache folder, because pipelines may have tens of gigabytes.
"""

import inspect
import json
import os
import re
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from des.models.encoders import read_index
from des.utils.errors import UserError
from des.utils.files import sha256_file, sha256_texts
from des.utils.logs import logger

from diffusers import DiffusionPipeline, SchedulerMixin
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from transformers import PreTrainedModel, PreTrainedTokenizerBase

CACHED_FROM = 64 * 2**20  # bytes; hashes of smaller files are not cached
_UNSETTLED = 2.0  # seconds in which a file may change again without a new time stamp
_VERSIONS = ("transformers_version", "torch_dtype", "dtype")  # entries of config.json without effect; --dtype sets the last two
_WEIGHTS = "diffusion_pytorch_model"
_TOKENIZER_FILES = (".json", ".txt", ".model")


def component_sha256s(
    pipe: DiffusionPipeline, model_path: str, variant: str | None = None, without: Collection[str] = ()
) -> dict[str, str]:
    """Return the identity of each component of an opened pipeline except the scheduler, and of `model_index.json` as `pipeline`.

    UNet, transformer and VAE are identified by configuration and weight files, tokenizers by their files. Text encoders are
    identified by their configuration only; their weights may come from a checkpoint and are hashed by
    `des.models.checkpoints.fingerprint`. `variant` is that of the opened files; components in `without` are skipped.
    """
    folder = Path(model_path)
    if not folder.is_dir():  # a hub id: the folder is the snapshot in the hub's cache
        cached = try_to_load_from_cache(model_path, "model_index.json")
        folder = Path(cached if isinstance(cached, str) else hf_hub_download(model_path, "model_index.json")).parent
    index = read_index(model_path) or {}
    options = {name: value for name, value in index.items() if name == "_class_name" or not isinstance(value, list)}
    found = {"pipeline": _sha256_config(options)}
    for name in sorted(pipe.components):
        component, place = pipe.components[name], folder / name
        if component is None or isinstance(component, SchedulerMixin) or name in without or not place.is_dir():
            continue
        if isinstance(component, PreTrainedTokenizerBase):
            files = [path for path in sorted(place.iterdir()) if path.suffix in _TOKENIZER_FILES and path.is_file()]
            found[name] = sha256_texts(f"{path.name} {_sha256_small(path)}" for path in files)
        elif isinstance(component, PreTrainedModel):
            found[name] = _sha256_small(place / "config.json")
        elif hasattr(component, "state_dict"):
            files = weight_files(place, variant)
            found[name] = sha256_texts([_sha256_small(place / "config.json"), *map(sha256_of, files)])
    return found


def scheduler_sha256(scheduler: SchedulerMixin) -> str:
    """Return the hash of a scheduler's class and effective configuration, whether or not its file repeats the defaults."""
    parameters = inspect.signature(type(scheduler).__init__).parameters
    changed = {
        name: scheduler.config[name]
        for name, parameter in parameters.items()
        if name in scheduler.config and scheduler.config[name] != parameter.default
    }
    return sha256_texts([type(scheduler).__name__, json.dumps(changed, sort_keys=True, default=str)])


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Return the files from which diffusers reads the weights of a component; UserError if there are none.

    The order is that of `ModelMixin.from_pretrained`: files of the variant before others, shards listed in an index before a
    single file, safetensors before pickles.
    """
    for kind in dict.fromkeys((variant, None)):
        dot = f".{kind}" if kind else ""
        indices = (f"{_WEIGHTS}.safetensors.index{dot}.json", f"{_WEIGHTS}{dot}.safetensors.index.json")
        for index in map(folder.joinpath, indices):
            if index.is_file():
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                return [folder / name for name in sorted(set(names))]
        for file in map(folder.joinpath, (f"{_WEIGHTS}{dot}.safetensors", f"{_WEIGHTS}{dot}.bin")):
            if file.is_file():
                return [file]
    raise UserError(f"{folder} has no weight file in a supported format, so the model cannot be identified")


def _sha256_small(path: Path) -> str:
    """Return the hash of a small file; a JSON object is hashed by content, without versions and paths."""
    if path.suffix == ".json":
        try:
            return _sha256_config(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            pass
    return sha256_file(path)


def _sha256_config(content: Any) -> str:
    if isinstance(content, dict):
        kept = {name: value for name, value in content.items() if name not in _VERSIONS}
        content = {name: value for name, value in kept.items() if name == "_class_name" or not name.startswith("_")}
    return sha256_texts([json.dumps(content, sort_keys=True)])


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file: its name in the hub's cache, the hash cached by an earlier run, or else computed."""
    real = path.resolve()
    if path.is_symlink() and real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    before = _stamp(real)
    if before[0] < CACHED_FROM:
        return sha256_file(real)
    known = _remembered().get(str(real))
    if isinstance(known, list) and known[:-1] == before and isinstance(known[-1], str):
        return known[-1]
    logger.info("hashing %s", path)
    digest = sha256_file(real)
    if _stamp(real) == before and time.time() - real.stat().st_mtime > _UNSETTLED:
        _remember(str(real), [*before, digest])
    return digest


def _stamp(path: Path) -> list[int]:
    """Return the facts that change with a file's content. Programs can set the modification time, but not the inode's change time."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "des" / "sha256.json"


def _remembered() -> dict[str, Any]:
    """Return the cache's entries; empty if it is missing, damaged or unreadable, since hashes can be computed again."""
    try:
        content = json.loads(_cache().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: the home folder is unknown
        return {}
    return content if isinstance(content, dict) else {}


def _remember(path: str, entry: list[Any]) -> None:
    """Add an entry. Processes replace the whole file, so an entry of another one may be lost and is then computed again."""
    try:
        cache = _cache()
        cache.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in _remembered().items() if Path(name).is_file()}
        descriptor, temporary = tempfile.mkstemp(dir=cache.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({**kept, path: entry}, file)
            Path(temporary).replace(cache)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except (OSError, RuntimeError, UnicodeError) as error:
        logger.debug("the cache of hashes could not be written: %s", error)
