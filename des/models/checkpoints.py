"""Encoder checkpoints: written in the published format, and loaded only if every parameter matches.

Published files were written by transformers 4.x, which names CLIP's parameters `text_model.encoder…`; transformers 5.x names
those of a CLIPTextModel `encoder…`. A non-strict load of one into the other loads nothing and leaves the model unprotected.
Names are therefore normalised here, and missing or unknown parameters are errors.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from des.models.loading import loading
from des.models.tensor_files import metadata_path, read_tensors, refuse_integers, some
from des.models.weights import distance, same_weights, sketch
from des.utils.errors import UserError
from des.utils.files import replacing, sha256_file, sha256_tensors, sha256_texts, write_json
from des.utils.logs import logger

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROJECTION = "text_projection.weight"  # of a CLIPTextModelWithProjection; DES does not train it, and published files lack it
_PREFIX = "text_model."
_WRAPPERS = re.compile(  # what DataParallel, torch.compile, FSDP, whole pipelines and ComfyUI add to the names of parameters
    r"^(?:(?:module|_orig_mod|unet|text_encoders?|text_encoder_[23]|cond_stage_model|clip_[lg]|t5xxl|transformer)\.)+"
    r"|(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_BUFFERS = ("embeddings.position_ids",)  # a constant in old files
_TIED = ("shared.weight", "encoder.embed_tokens.weight")  # T5's two names of one tensor
# The other half of a whole CLIPModel, which some defences publish, and of a whole T5.
_OTHER_HALF = ("vision_model.", "visual_projection.", "logit_scale", "decoder.", "lm_head.")
_COMPUTATION = (  # entries of CLIP's and T5's config.json that change the output but no tensor's shape
    "hidden_act", "layer_norm_eps", "num_attention_heads", "num_hidden_layers",
    "d_kv", "dense_act_fn", "is_gated_act", "layer_norm_epsilon", "num_heads", "num_layers",
    "relative_attention_max_distance", "relative_attention_num_buckets",
)  # fmt: skip
_SAME_BASE = 0.003  # largest distance of two base encoders that differ in rounding only


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name parameters without transformers 4.x's `text_model.` prefix and without constant buffers."""
    plain = _renamed(state, lambda name: name.removeprefix(_PREFIX))
    return {name: tensor for name, tensor in plain.items() if name not in _BUFFERS}


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name a file's tensors without the prefixes of wrappers, such as `module.`, `_orig_mod.`, `text_encoder.` or `clip_l.transformer.`."""
    return _renamed(state, lambda name: _WRAPPERS.sub("", name))


def _renamed(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        if rename(name) in renamed:
            raise UserError(
                f"the checkpoint has `{rename(name)}` twice, with different prefixes; keep the tensors of one model in it"
            )
        renamed[rename(name)] = tensor
    return renamed


def published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name CLIP's parameters as transformers 4.x and the published checkpoints do; others keep their names."""
    stems = ("embeddings.", "encoder.layers.", "final_layer_norm.")
    named = {_PREFIX + name if name.startswith(stems) else name: tensor for name, tensor in plain_names(state).items()}
    return {name: tensor for name, tensor in named.items() if name != PROJECTION}


def save_published(model: "PreTrainedModel", folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Save an encoder (or its `state`) with `save_pretrained` under the published names, which all versions of transformers read.

    By default, transformers 5 keeps the names of the files that the model was loaded from. Files that it saved itself lack
    `text_model.`, so transformers 4 would load none of the weights and run a random encoder with only a warning.
    """
    state = plain_names(model.state_dict() if state is None else state)
    named = published_names(state) | {name: state[name] for name in (PROJECTION,) if name in state}
    model.save_pretrained(folder, state_dict=named, save_original_format=False)


def fingerprint(encoder: nn.Module) -> str:
    """Return the sha256 of an encoder's parameters, which does not depend on their naming or device."""
    return sha256_tensors(plain_names(encoder.state_dict()))


def checkpoint_path(path: Path, save_format: str) -> Path:
    """Return the file or folder that `save_checkpoint` writes for `path`."""
    return path if save_format == "hf" else path.with_name(f"{path.name}.{save_format}")


def save_checkpoint(
    path: Path, model: "PreTrainedModel", state: Mapping[str, Tensor], metadata: Mapping[str, Any], save_format: str = "pt"
) -> Path:
    """Write an encoder's `state` atomically to `path` with its format's suffix, and `{name}-metadata.json` beside it.

    `pt` is the published format, a dict with the encoder as `model_state_dict`; `safetensors` has the same names; `hf` is a
    folder for `from_pretrained` of any transformers version. Returns the path written. Raises UserError, and keeps the folder, if
    a folder with that name exists and does not match its metadata.
    """
    encoder_sha256 = sha256_tensors(plain_names(state))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    target = checkpoint_path(path, save_format)
    metadata_file, before = path.with_name(f"{path.name}-metadata.json"), check_replaceable(target)
    size = sum({tensor.data_ptr(): tensor.nbytes for tensor in state.values()}.values())  # tied tensors are written once
    with replacing(target, replace_folder=before is not None, size=size) as temporary:
        if save_format == "hf":
            save_published(model, temporary, state)
        elif save_format == "safetensors":
            named = published_names(state)
            save_file({name: tensor for name, tensor in named.items() if name != _TIED[1]}, temporary, {"format": "pt"})
        else:
            torch.save({"model_state_dict": published_names(state)}, temporary)
        digests = {"encoder_sha256": encoder_sha256, "file_sha256": _sha256_files(temporary)}
        if before:
            digests["replaced_sha256"] = before
        # Written before the checkpoint is renamed into place, so that an interrupted run leaves no checkpoint without metadata.
        write_json(metadata_file, {**metadata, **digests})
    return target


def base_sketch(encoder: nn.Module) -> str:
    """Return the `des.models.weights.sketch` of an encoder before training, for its checkpoints' metadata."""
    return sketch(_base_weights(encoder))


def _base_weights(encoder: nn.Module) -> dict[str, Tensor]:
    """Return the weights that base encoders are compared by: without the projection, which one may lack, and T5's tied copy."""
    state = plain_names(encoder.state_dict())
    return {name: tensor for name, tensor in state.items() if name not in (PROJECTION, _TIED[1])}


def read_metadata(path: Path) -> dict[str, Any]:
    """Read `{name}-metadata.json` beside a checkpoint; empty if the file is missing, UserError if it is damaged."""
    file = metadata_path(path)
    if not file.is_file():
        return {}
    with loading(f"the metadata {file}"):
        metadata = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(metadata, dict):
        raise UserError(f"{file} is not a checkpoint's metadata; move it away to load {path.name} without metadata")
    return metadata


def check_replaceable(folder: Path) -> str | None:
    """Return the sha256 of a checkpoint's folder, or None if there is no folder.

    Raises UserError for a folder that this program did not write, or that was changed since.
    """
    if not folder.is_dir():
        return None
    metadata = read_metadata(folder)
    digest = None if any(each.is_dir() for each in folder.iterdir()) else _sha256_files(folder)
    if digest is None or digest not in (metadata.get("file_sha256"), metadata.get("replaced_sha256")):
        raise UserError(
            f"{folder} was changed or not written by this program, so it is not replaced; move it away, or choose another folder"
        )
    return digest


def is_as_recorded(path: Path) -> bool:
    """Whether a checkpoint's files have the hash recorded in its metadata."""
    try:
        return path.exists() and read_metadata(path).get("file_sha256") == _sha256_files(path)
    except UserError:
        return False


def _sha256_files(path: Path) -> str:
    """Return the sha256 of a file, or of a folder's file names and contents."""
    if path.is_file():
        return sha256_file(path)
    files = [each for each in sorted(path.iterdir()) if each.is_file() and not each.name.startswith(".")]
    return sha256_texts(f"{each.name} {sha256_file(each)}" for each in files)


def load_checkpoint(encoder: nn.Module, path: Path) -> dict[str, Any]:
    """Load a checkpoint into `encoder` in place, cast to its dtype, or raise UserError and change nothing.

    Names and shapes of all parameters must match, except that `text_projection` may be missing (the encoder keeps its weights) or
    surplus. The weights must differ from the encoder's by more than rounding. The config.json of a folder must describe the same
    computation, and metadata beside the checkpoint must describe these weights. Logs a warning if it was trained from another
    base encoder. Returns the metadata with `file`, `file_sha256`, `encoder_sha256` and, if measured, `base_distance`.
    """
    loaded, own, metadata = plain_names(unwrapped(read_tensors(path))), plain_names(encoder.state_dict()), read_metadata(path)
    loaded = {name: tensor for name, tensor in loaded.items() if not name.startswith(_OTHER_HALF)}
    refuse_integers(loaded, path)
    _reconcile(loaded, own, path)
    missing, surplus = sorted(own.keys() - loaded.keys()), sorted(loaded.keys() - own.keys())
    shapes = [name for name in own.keys() & loaded.keys() if own[name].shape != loaded[name].shape]
    if shapes:
        name = min(shapes)
        theirs, ours = tuple(loaded[name].shape), tuple(own[name].shape)
        raise UserError(
            f"{path} was made for another encoder: `{name}` has shape {theirs} in the checkpoint and {ours} in the model; use it "
            "with the text encoder that it was trained from"
        )
    if missing or surplus:
        problems = [f"lacks {some(missing)}"] if missing else []
        problems += [f"has the unknown tensor {some(surplus)}"] if surplus else []
        raise UserError(f"{path} does not fit the model's text encoder: it {' and '.join(problems)}")
    _check_configuration(encoder, path)
    file_sha256 = _check_metadata(path, loaded, metadata)
    if same_weights(own, {name: tensor for name, tensor in loaded.items() if name != PROJECTION}):
        raise UserError(
            f"this checkpoint does not change the encoder: the weights in {path} equal the model's up to rounding, so nothing "
            "would be protected"
        )
    cast = {name: tensor.to(own[name].dtype) for name, tensor in loaded.items()}
    broken = [name for name, tensor in cast.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{path} does not fit into {own[broken[0]].dtype}: {some(broken)} overflows; use --dtype bf16 or fp32")
    apart = _distance_of_bases(encoder, path, metadata)
    stored_name = {name.removeprefix(_PREFIX): name for name in encoder.state_dict()}
    encoder.load_state_dict({stored_name[name]: tensor for name, tensor in cast.items()}, strict=True)
    arrived = plain_names(encoder.state_dict())
    if not all(torch.equal(arrived[name].cpu(), tensor) for name, tensor in cast.items()):
        raise UserError(f"the weights of {path} were not loaded into the model's text encoder")
    measured = {} if apart is None else {"base_distance": apart}
    facts = {"file": str(path), "file_sha256": file_sha256, "encoder_sha256": fingerprint(encoder)}
    return {**metadata, **measured, **facts}


def _check_configuration(encoder: nn.Module, path: Path) -> None:
    """Raise UserError if a checkpoint folder's config.json describes a different computation than the model's encoder.

    Only the folder's weights are loaded, so an encoder trained with another activation would give wrong embeddings.
    """
    file, own = path / "config.json", getattr(encoder, "config", None)
    if own is None or not file.is_file():
        return
    with loading(f"the configuration {file}"):
        given = type(own).from_pretrained(path)
    for name in _COMPUTATION:
        ours, theirs = getattr(own, name, None), getattr(given, name, None)
        if ours != theirs:
            raise UserError(
                f"{path} was made for another encoder: its config.json has {name} {theirs}, and the model's encoder has {ours}; "
                "use it with the model that it was trained from"
            )


def _check_metadata(path: Path, loaded: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Return the sha256 of a checkpoint's files. Raises UserError if the metadata beside them describes other weights.

    The same weights in another format match by `encoder_sha256`. Metadata without hashes is accepted.
    """
    digest = _sha256_files(path)
    if metadata.get("file_sha256") not in (None, digest) and metadata.get("encoder_sha256") != sha256_tensors(loaded):
        raise UserError(
            f"{path} is not the checkpoint that {metadata_path(path)} describes; restore the matching file, or move the metadata "
            "away to load the checkpoint without it"
        )
    return digest


def _distance_of_bases(encoder: nn.Module, path: Path, metadata: Mapping[str, Any]) -> float | None:
    """Return the distance of the model's `encoder` from the one that a checkpoint was trained from, None if it is not recorded.

    Logs a warning if the weights differ. SD 1.5, SDXL, SD3 and FLUX share one CLIP-L, in different dtypes.
    """
    apart = None
    if isinstance(metadata.get("base_sketch"), str):
        apart = distance(metadata["base_sketch"], _base_weights(encoder))
        if apart is not None and apart > _SAME_BASE:
            warning = (
                "%s was trained from another base encoder than the model's, so it may not protect this model: the relative"
            )
            logger.warning(warning + " difference of the weights is %.3g (about 1.4 for unrelated encoders)", path, apart)
    elif metadata.get("base_encoder_sha256"):  # of an earlier version, which hashed CLIP in fp32 without the projection
        own = encoder.state_dict()
        comparable = PROJECTION not in own and _TIED[0] not in own and all(t.dtype == torch.float32 for t in own.values())
        if comparable and metadata["base_encoder_sha256"] != fingerprint(encoder):
            logger.warning("%s was trained from another base encoder than the model's: their hashes differ", path)
    return apart


def _reconcile(loaded: dict[str, Tensor], own: dict[str, Tensor], path: Path) -> None:
    """Add to or remove from `loaded` the tensors that valid files may lack or have: the projection and T5's tied copy."""
    if PROJECTION in own:
        loaded.setdefault(PROJECTION, own[PROJECTION].cpu())
    elif any(name.startswith("embeddings.") for name in own):
        loaded.pop(PROJECTION, None)
    for name, other in (_TIED, _TIED[::-1]):
        if name in own and other in loaded:
            loaded.setdefault(name, loaded[other])
    if set(_TIED) <= loaded.keys() and not torch.equal(*(loaded[name].float() for name in _TIED)):
        raise UserError(f"{path} is damaged: `{_TIED[0]}` and `{_TIED[1]}` must be equal in T5, but differ")
