"""The files of a pipeline in a folder or on the hub, and which files of weights are read for each component.

A repository on the hub is named `owner/name`, or `owner/name@revision` for another revision than its main branch.
"""

import json
import re
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from des.models.families import DTYPES
from des.models.loading import loading
from des.utils.errors import UserError, not_found
from des.utils.files import write_json
from des.utils.logs import logger

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

INDEX = "model_index.json"
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".msgpack", ".onnx", ".gguf", ".h5", ".pb")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# A file that `from_pretrained` opens first: the weights themselves, or the index of their shards, with a variant in its name.
_HEAD = re.compile(
    r"(diffusion_pytorch_model|model|pytorch_model)(?:\.([\w-]+))?\.(safetensors|bin)(\.index(?:\.([\w-]+))?\.json)?"
)


def split_revision(model_path: str) -> tuple[str, str | None]:
    """Return the hub id and the revision of `owner/name@revision`; a folder, and an id without a revision, with None."""
    name, _, revision = model_path.partition("@")
    return (model_path, None) if not revision or Path(model_path).exists() else (name, revision)


def model_name(model_path: str) -> str:
    """Return the last part of a folder or hub id, without a revision."""
    return Path(split_revision(model_path)[0]).name


def is_local(model_path: str) -> bool:
    """Whether the path is a folder; UserError if it is neither a folder nor has the form of a hub id."""
    path, (name, revision) = Path(model_path), split_revision(model_path)
    if path.is_file():
        convert = f'StableDiffusionPipeline.from_single_file("{model_path}").save_pretrained("FOLDER")'
        raise UserError(
            f"{model_path} is a single file, but a pipeline's folder is needed; convert it with diffusers' class of this model: {convert}"
        )
    if revision and Path(name).exists():
        raise UserError(f"{name} is a folder, but only models of the hub have revisions; leave --revision out")
    if not path.exists() and not _HUB_ID.fullmatch(name):
        raise not_found("the model", path, "it is not a hub id either, which has the form `owner/name`")
    return path.is_dir()


def read_json(model_path: str, name: str) -> dict[str, Any]:
    """Read a JSON file of a folder or hub repository; UserError if it is missing or not a JSON object."""
    with loading(f"{name} of {model_path}", model_path):
        repository, revision = split_revision(model_path)
        file = Path(model_path) / name if is_local(model_path) else Path(hf_hub_download(repository, name, revision=revision))
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it is a JSON {type(content).__name__} instead of an object in braces")
        return content


def file_names(model_path: str) -> Collection[str]:
    """Return the names of the files in a pipeline and its components' folders, such as `vae/config.json`."""
    if not is_local(model_path):
        return _hub_names(model_path)
    return [path.relative_to(model_path).as_posix() for depth in ("*", "*/*") for path in sorted(Path(model_path).glob(depth))]


@cache  # one request per run
def _hub_names(model_path: str) -> tuple[str, ...]:
    repository, revision = split_revision(model_path)
    with loading(f"the list of files of {model_path}", model_path):
        try:
            return tuple(HfApi().list_repo_files(repository, revision=revision))
        except Exception as error:  # without a connection, the files of an earlier download are read
            try:
                folder = snapshot_download(repository, revision=revision, local_files_only=True)
            except Exception:
                raise error from None
            return tuple(file_names(folder))


@dataclass(frozen=True)
class Weights:
    """The weights of a component: their variant (None: files without one), and the file that `from_pretrained` opens first."""

    variant: str | None
    head: str


def find_weights(
    names: Iterable[str], what: str, variant: str | None = None, dtype: torch.dtype | None = None
) -> Weights | None:
    """Choose the weights among the names of the files in a component's folder; None if there are none.

    `variant` is taken first, or fp16 for that dtype, then the files without a variant, then the variant named like `dtype`, then the
    only one. The order of files is that of diffusers (an index of shards before a single file) and of transformers (the reverse),
    safetensors before pickles. Raises UserError, with `what`, if several variants are left.
    """
    heads: dict[str | None, str] = {}
    found = [match for name in names if "-of-" not in name and (match := _HEAD.fullmatch(name))]
    for match in sorted(found, key=_order):
        heads.setdefault(match[2] or match[5], match[0])
    if not heads:
        return None
    wanted = (
        variant or ("fp16" if dtype == torch.float16 else None),
        None,
        *(k for k, v in DTYPES.items() if f"torch.{v}" == str(dtype)),
    )
    chosen = next(each for each in (*wanted, *heads) if each in heads)
    if chosen not in wanted and len(heads) > 1:
        raise UserError(
            f"{what} has its weights only in the variants {', '.join(sorted(map(str, heads)))}; choose one with --variant"
        )
    return Weights(chosen, heads[chosen])


def _order(match: re.Match) -> tuple[bool, bool, bool]:
    """The key that sorts the files of one variant as they are looked for; an index's old name comes after its new one."""
    is_diffusers = match[1].startswith("diffusion")
    return match[3] == "bin", (match[4] is not None) != is_diffusers, match[4] is not None and match[2] is not None


def weight_files(folder: Path, variant: str | None = None, dtype: torch.dtype | None = None) -> list[Path]:
    """Return the files from which the weights of a component's folder are read, without an index; UserError if there are none."""
    weights = find_weights([path.name for path in folder.iterdir()], str(folder), variant, dtype)
    if weights is None:
        raise UserError(f"{folder} has no weight file in a supported format")
    return [folder / name for name in _shards(str(folder.parent), folder.name, weights.head)]


def copy_weights(source: Path, target: Path, variant: str | None) -> None:
    """Copy the weights of a component's folder and the index of their shards to names without a variant."""
    head = find_weights([path.name for path in source.iterdir()], str(source), variant).head
    for name in {head, *_shards(str(source.parent), source.name, head)}:
        plain = name.replace(f".{variant}", "")
        if name.endswith(".json"):
            index = read_json(str(source), name)
            names = {key: file.replace(f".{variant}", "") for key, file in index["weight_map"].items()}
            write_json(target / plain, index | {"weight_map": names})
        else:
            shutil.copyfile(source / name, target / plain)


def _shards(model_path: str, component: str, head: str) -> list[str]:
    """Return the names of the files that an index lists, sorted; the file itself if it is none."""
    if not head.endswith(".json"):
        return [head]
    listed = read_json(model_path, f"{component}/{head}").get("weight_map")
    names = sorted(map(str, set(listed.values()))) if isinstance(listed, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{component}/{head} of {model_path} is damaged: it does not list files of its folder")
    return names


def check_variant(model_path: str, variant: str | None) -> None:
    """Raise UserError for a variant that no component of a pipeline has; None stands for no choice."""
    found = (_HEAD.fullmatch(Path(name).name) for name in file_names(model_path) if "-of-" not in name)
    has = {match[2] or match[5] for match in found if match}
    if variant and variant not in has:
        variants = ", ".join(sorted(filter(None, has))) or "none"
        raise UserError(f"{model_path} has no weights of the variant {variant}; its variants: {variants}")


@dataclass(frozen=True)
class Files:
    """The folder with a pipeline's files, `model_path` itself or a snapshot in the hub's cache, and the variant of each component."""

    folder: Path
    variants: dict[str, str | None]  # of the components that have weights

    def variant(self, component: str) -> str | None:
        """Return the variant to open a component with; UserError if it has no weights."""
        if component not in self.variants:
            raise UserError(f"{self.folder / component} has no weights in a supported format, such as model.safetensors")
        return self.variants[component]


def fetch(
    model_path: str,
    components: Collection[str],
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    with_weights: bool = True,
) -> Files:
    """Choose the files of some components of a pipeline (see `find_weights`), and download those of a hub repository.

    Without a connection, the files in the hub's cache are used. Raises UserError for a download that fails.
    """
    names, wanted, variants = file_names(model_path), [INDEX], {}
    for component in components:
        inside = [name.partition("/")[2] for name in names if name.startswith(f"{component}/")]
        wanted += [f"{component}/{name}" for name in inside if name.endswith((".json", ".txt", ".model"))]
        what = f"the {component} of {model_path}"
        weights = find_weights(inside, what, variant, dtype) if with_weights else None
        if weights is not None:
            variants[component] = weights.variant
            wanted += [f"{component}/{name}" for name in _shards(model_path, component, weights.head)]
            if weights.variant != (variant or ("fp16" if dtype == torch.float16 else None)) and (variant or weights.variant):
                wanted_files = f"of the variant {variant}" if variant else "without a variant"
                logger.info("%s is read from %s, because it has no weights %s", what, weights.head, wanted_files)
    if is_local(model_path):
        return Files(Path(model_path), variants)
    repository, revision = split_revision(model_path)
    with loading(f"the files of {model_path}", model_path):
        return Files(Path(snapshot_download(repository, revision=revision, allow_patterns=wanted)), variants)
