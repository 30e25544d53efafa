"""Encoder checkpoints: written in the published form, loaded only when every parameter is accounted for.

Published files were written by transformers 4.x, which calls CLIP's parameters `text_model.encoder…`; transformers 5.x calls
them `encoder…`. A non-strict load of one into the other loads nothing and leaves the model unprotected, so names are brought
to one form here and everything left over on either side is an error.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from des.cli import UserError
from des.loading import read_pt
from des.results import replacing, sha256_tensors, write_json

_PREFIX = "text_model."
_BUFFERS = ("embeddings.position_ids",)  # a constant that old files carry


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name parameters without transformers 4.x's `text_model.` prefix and without constant buffers."""
    plain = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
    if len(plain) < len(state):
        raise UserError("the checkpoint names parameters twice, with and without the prefix `text_model.`")
    return {name: tensor for name, tensor in plain.items() if name not in _BUFFERS}


def published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name CLIP's parameters as transformers 4.x and the published checkpoints do; others keep their names."""
    stems = ("embeddings.", "encoder.layers.", "final_layer_norm.")
    return {_PREFIX + name if name.startswith(stems) else name: tensor for name, tensor in plain_names(state).items()}


def fingerprint(encoder: nn.Module) -> str:
    """The sha256 of an encoder's parameters: the same for either naming, on any device."""
    return sha256_tensors(plain_names(encoder.state_dict()))


def save_checkpoint(path: Path, encoder: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Write `path` (a dict whose `model_state_dict` holds the encoder) and `{stem}-metadata.json` beside it, atomically."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in published_names(encoder.state_dict()).items()}
    with replacing(path) as temporary:
        torch.save({"model_state_dict": state}, temporary)
    write_json(path.with_name(f"{path.stem}-metadata.json"), {**metadata, "encoder_sha256": fingerprint(encoder)})


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the encoder's tensors from a `.pt` or `.safetensors` file, under plain names; no code in it is run.

    Raises UserError for a file that is missing, truncated, not made of tensors, or holds NaN or infinite values.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint file {path}")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else read_pt(path)
    except SafetensorError:
        content = None
    if content is None:
        raise UserError(f"{path} is no complete checkpoint of tensors: it is truncated, damaged, or holds code")
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
        raise UserError(f"{path} has no `model_state_dict` of tensors")
    broken = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{path} has NaN or infinite values in {_some(broken)}")
    return plain_names(state)


def load_checkpoint(encoder: nn.Module, path: Path) -> dict[str, Any]:
    """Load a checkpoint into `encoder` in place, cast to its dtype, or raise UserError and change nothing.

    Every parameter must be there with its shape, none may be left over, and the weights must differ from the encoder's
    own. Returns `{"file", "encoder_sha256"}` and what `{stem}-metadata.json` says.
    """
    loaded, own = read_checkpoint(path), plain_names(encoder.state_dict())
    missing, surplus = sorted(own.keys() - loaded.keys()), sorted(loaded.keys() - own.keys())
    shapes = [name for name in own.keys() & loaded.keys() if own[name].shape != loaded[name].shape]
    if shapes:
        name = min(shapes)
        theirs, ours = tuple(loaded[name].shape), tuple(own[name].shape)
        raise UserError(f"{path} was made for another encoder: `{name}` is {theirs} there and {ours} in the model")
    if missing or surplus:
        lacks = [f"lacks {_some(missing)}"] * bool(missing) + [f"has the unknown {_some(surplus)}"] * bool(surplus)
        raise UserError(f"{path} does not fit the model's text encoder: it {' and '.join(lacks)}")
    if all(torch.equal(own[name].cpu(), loaded[name].to(own[name].dtype)) for name in own):
        raise UserError(f"this checkpoint does not change the encoder: the weights in {path} are the model's own")
    own_name = {name.removeprefix(_PREFIX): name for name in encoder.state_dict()}
    encoder.load_state_dict({own_name[name]: tensor for name, tensor in loaded.items()}, strict=True)
    arrived = plain_names(encoder.state_dict())
    if not all(torch.equal(arrived[name].cpu(), loaded[name].to(arrived[name].dtype)) for name in own):
        raise UserError(f"the weights of {path} did not arrive in the model's text encoder")
    metadata = path.with_name(f"{path.stem}-metadata.json")
    told = json.loads(metadata.read_text(encoding="utf-8")) if metadata.is_file() else {}
    return {**told, "file": str(path), "encoder_sha256": fingerprint(encoder)}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(f"`{name}`" for name in names[:2]) + more
