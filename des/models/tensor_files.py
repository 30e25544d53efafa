"""Named tensors in files and folders of weights, read without running code in them; errors say what another file or folder is."""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from des.models.loading import check_finite, loading, read_pt
from des.utils.errors import UserError, not_found

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_FILES = (  # weights in a model's folder, in the order in which transformers looks for them
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_NESTS = ("model_state_dict", "state_dict", "unet")
_SCALES = (
    ".scale_weight",
    ".scale_input",
    ".weight_scale",
    ".weight_scale_inv",
    ".input_scale",
    ".comfy_quant",
)  # of quantized weights
_KINDS = {  # what files begin with, in lower case, that users take for checkpoints
    b"gguf": "a GGUF file, whose quantized weights are not supported; pass the .safetensors or .pt file it was made from",
    b"version https://git-lfs": "a pointer of Git LFS instead of the weights; run `git lfs pull` in its repository",
    b"<!doctype": "a web page instead of a checkpoint; download the file itself",
    b"<html": "a web page instead of a checkpoint; download the file itself",
}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read named tensors from a `.pt` or `.safetensors` file or a model's folder without running code in it.

    Raises UserError if it is missing, truncated, contains something other than tensors, or has NaN or infinite values in a weight.
    Tensors without a dot in their name are a sampler's schedule in single files (`alphas_cumprod`), not weights of a model.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise not_found("the checkpoint", path, "train_des.py and download_checkpoint.py print the paths of theirs")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else read_pt(path)
    except SafetensorError:
        content = None
    if content is None:
        raise UserError(f"{path} {_why_unreadable(path)}")
    nests = [name for name in _NESTS if isinstance(content, dict) and isinstance(content.get(name), dict)]
    state = content[nests[0]] if nests else content
    if not isinstance(state, dict) or not state or not all(map(_is_named_tensor, state.items())):
        raise UserError(f"{path} has no `model_state_dict` of tensors")
    odd = [name for name, tensor in state.items() if not _is_plain(tensor)]
    if odd:
        raise UserError(f"{path} contains {some(odd)}, which is not a dense tensor of real numbers")
    scales = [name for name in state if name.endswith(_SCALES) or name == "scaled_fp8"]
    if scales:
        raise UserError(
            f"{path} contains scaled fp8 weights ({some(scales)}), which are not supported; pass the same model in fp16, bf16 or "
            "unscaled fp8"
        )
    check_finite({name: tensor for name, tensor in state.items() if "." in name}, str(path))
    return state


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense, of a known real type, and stored completely (with a stride of 0, few bytes expand to terabytes)."""
    if tensor.is_meta or tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
        return False
    known = tensor.dtype in _FLOATS or not (tensor.is_floating_point() or tensor.is_complex())
    return known and tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def _why_unreadable(path: Path) -> str:
    """Say what a file is from which no tensors can be read: another kind of file, a pickle with other objects, or a damaged file."""
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    for start, kind in _KINDS.items():
        if head.startswith(start):
            return f"is {kind}"
    objects: Sequence[str] = ()
    with contextlib.suppress(Exception):  # damaged bytes raise errors of many classes
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(path)  # reads names only, and runs nothing
    if objects:
        return (
            f"contains Python objects beside tensors ({some(objects)}), and such objects can be code, so it is not loaded; if you made "
            "the file, save `model.state_dict()` alone"
        )
    return "is not a complete checkpoint of tensors: it is truncated, damaged, or contains code"


def refuse_integers(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError if weights are integers or booleans, which would load after a cast but be meaningless."""
    wrong = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if wrong:
        raise UserError(
            f"{path} contains {some(wrong)} as {tensors[wrong[0]].dtype}, but weights must be floating-point numbers"
        )


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a folder written by `save_pretrained`."""
    config = _json(folder / "config.json")
    if config.get("transformers_weights"):
        elsewhere = config["transformers_weights"]
        raise UserError(f"{folder / 'config.json'} takes its weights from {elsewhere}; pass that file instead of the folder")
    first = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if first is None:
        raise UserError(f"{folder} {_what_else(folder, config)}")
    files = [first.name]
    if first.suffix == ".json":
        with loading(f"the list of files {first}"):
            files = sorted(set(dict(_json(first)["weight_map"]).values()))
        if not all(isinstance(name, str) and Path(name).name == name for name in files):
            raise UserError(f"{first} names files that are not in its folder")
    return {name: tensor for file in files for name, tensor in read_tensors(folder / file).items()}


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one if there is no file."""
    if not path.is_file():
        return {}
    with loading(f"the file {path}"):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def _what_else(folder: Path, config: Mapping[str, Any]) -> str:
    """Say what a folder is that has no weights of a transformers model, and what to pass instead."""
    if (folder / "model_index.json").is_file():
        return f"is a whole pipeline; pass the folder of its text encoder, such as {folder / 'text_encoder'}"
    if (folder / "adapter_config.json").is_file():
        return (
            "is a peft adapter, which has only changes to a model; merge it with peft's `merge_and_unload` and save the encoder"
        )
    if any(folder.glob("diffusion_pytorch_model*")):
        kind = config.get("_class_name", "model")
        return f"is the folder of a {kind} of diffusers; pass a text encoder's folder, or for a defence of the UNet its weight file"
    inside = checkpoints_in(folder)
    if inside:
        more = f" and {len(inside) - 5} more" if len(inside) > 5 else ""
        return f"is not one checkpoint; pass one of those inside it: {', '.join(map(str, inside[:5]))}{more}"
    return "has no model.safetensors or pytorch_model.bin; pass the text encoder's folder"


def header_of(path: Path) -> dict[str, str]:
    """Return the metadata in the header of a .safetensors file or of a folder's first one; empty for other and unreadable files."""
    files = sorted(path.glob("model*.safetensors")) if path.is_dir() else [path]
    if not files or files[0].suffix != ".safetensors" or not files[0].is_file():
        return {}
    with contextlib.suppress(SafetensorError), safe_open(files[0], "pt") as opened:
        return opened.metadata() or {}
    return {}


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints at most three levels below a folder, in the order of their numbers.

    They are files and encoders' folders with metadata beside them or, if there are none, all files and folders of weights.
    """

    def is_weights(path: Path) -> bool:
        folders = [each for each in (path, path.parent) if any((each / name).is_file() for name in _FILES)]
        return path in folders if path.is_dir() else not folders and path.suffix in _SUFFIXES

    below = [path for depth in ("*", "*/*", "*/*/*") for path in folder.glob(depth) if not path.name.startswith(".")]
    found = [path for path in below if is_weights(path)]
    recorded = [path for path in found if metadata_path(path).is_file()]
    by_number = re.compile(r"(\d+)")
    return sorted(recorded or found, key=lambda path: [int(t) if t.isdecimal() else t for t in by_number.split(str(path))])


def metadata_path(path: Path) -> Path:
    """Return the path of the metadata of a checkpoint, which is a file or a folder."""
    named_by_stem = not path.is_dir() and path.suffix in _SUFFIXES
    stem = path.stem if named_by_stem else path.name  # `.3` of a folder `encoder_0.3` is not a suffix
    return path.with_name(f"{stem}-metadata.json")


def some(names: Sequence[str]) -> str:
    """Quote the first two names, and count the others."""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(f"`{name}`" for name in names[:2]) + more
