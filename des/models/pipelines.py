"""Opening a diffusers pipeline for generation, and putting protected text encoders into it."""

import contextlib
import copy
import re
from pathlib import Path
from typing import Any

from des.models.checkpoints import fingerprint
from des.models.encoders import TextEncoder, encoder_class, family_of, read_index, reading_for, text_encoders
from des.models.families import DIFFUSION, ENCODER_CLASSES, MOST_ENCODERS, REFINER_CLASS, Family
from des.models.families import DTYPES as _DTYPES
from des.models.identity import component_sha256s, scheduler_sha256
from des.models.loading import check_dtype, dtype_option, load_model, loading, torch_dtype
from des.models.shift import embedding_of, load_measured
from des.utils.errors import UserError
from des.utils.logs import logger

import diffusers
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline, SchedulerMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from transformers import PreTrainedTokenizerBase

DTYPES = {name: torch_dtype(name) for name in _DTYPES}
_FROM_PIPE = {"image": AutoPipelineForImage2Image, "inpaint": AutoPipelineForInpainting}
LATENT_DIFFUSION = {  # from Stable Diffusion's published scheduler files; without them, latents would be clipped to -1..1
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def dtype_for(family: Family, device: torch.device, asked: str | None) -> torch.dtype:
    """Return the dtype asked for, or the family's; a default of fp16 becomes fp32 on CPUs, which compute it slowly."""
    if asked is None and family.dtype == "fp16" and device.type == "cpu":
        logger.info("on a CPU this model is drawn in fp32 instead of fp16; --dtype chooses otherwise")
        return torch.float32
    return DTYPES[asked or family.dtype]


def open_pipeline(
    model_path: str, dtype: torch.dtype, model_type: str | None = None, scheduler: str | None = None, mode: str = "text"
) -> DiffusionPipeline:
    """Open the pipeline of a folder or hub id on the CPU, with every weight from its files.

    The default `scheduler` is the paper's: DDIM for SD 1.x, Euler for SD 2.x, and the one in the model's files for others. `mode`
    is one of MODES. Raises UserError for unsupported classes, a family other than `model_type`, and incomplete files.
    """
    family, index = family_of(model_path), read_index(model_path)
    if model_type and model_type != family.name:
        raise UserError(f"--model_type is {model_type}, but {model_path} is a {family.name}")
    if scheduler and scheduler not in family.schedulers:
        raise UserError(f"--scheduler {scheduler} does not suit a {family.name}, which takes {', '.join(family.schedulers)}")
    if mode not in family.modes:
        raise UserError(f"{model_path} is a {family.name}, which draws from text only; leave --init_images out")
    variant = _variant(model_path, dtype)
    encoders = {}
    for name in text_encoders(model_path).values():
        model_class, _ = encoder_class(index[name][1], f"{name} of {model_path}")
        options = {"subfolder": name, "variant": variant}
        encoders[name] = load_model(model_class, model_path, "cpu", f"the {name} of", dtype, **options)
    with loading(f"the pipeline {model_path}"):
        pipeline_class = getattr(diffusers, index["_class_name"])
        pipe = pipeline_class.from_pretrained(
            model_path, variant=variant, **dtype_option("diffusers", dtype), **family.options, **encoders
        )
    check_dtype(pipe.components, dtype, model_path)
    _check_complete(pipe, model_path)
    scheduler = scheduler or family.scheduler
    if scheduler:
        pipe.scheduler = as_scheduler(pipe.scheduler, getattr(diffusers, family.schedulers[scheduler]))
    if mode in _FROM_PIPE:
        pipe = _FROM_PIPE[mode].from_pipe(pipe, **family.options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def as_scheduler(source: SchedulerMixin, target: type[SchedulerMixin]) -> SchedulerMixin:
    """Return a scheduler of class `target` with the noise schedule, prediction type and steps of `source`.

    `from_config` alone uses the target's defaults for entries missing in the model's file, even if the source's class or the
    pipeline's corrections (`clip_sample`, `steps_offset`) set other values. Here the source's effective values are used, so that
    incomplete and complete files draw the same images. Options that the source's class lacks come from LATENT_DIFFUSION.
    """
    effective = {name: value for name, value in source.config.items() if name != "_use_default_values"}
    return target.from_config(LATENT_DIFFUSION | effective if target.__name__ in DIFFUSION.values() else effective)


def open_refiner(refiner_path: str, base: DiffusionPipeline) -> DiffusionPipeline:
    """Open SDXL's refiner with the base's VAE and text encoder 2, so that it is protected like the base."""
    index = read_index(refiner_path)
    if index is None or index["_class_name"] != REFINER_CLASS:
        raise UserError(f"{refiner_path} is not an SDXL refiner, whose class is {REFINER_CLASS}")
    dtype = base.dtype
    shared = {"text_encoder_2": base.text_encoder_2, "tokenizer_2": base.tokenizer_2, "vae": base.vae}
    options = {"variant": _variant(refiner_path, dtype), "add_watermarker": False}
    with loading(f"the refiner {refiner_path}"):
        pipe = getattr(diffusers, REFINER_CLASS).from_pretrained(
            refiner_path, **dtype_option("diffusers", dtype), **options, **shared
        )
    check_dtype(pipe.components, dtype, refiner_path)
    if pipe.text_encoder is not None:
        raise UserError(f"{refiner_path} has a text encoder besides text_encoder_2, which would be unprotected")
    _check_complete(pipe, refiner_path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def place(pipe: DiffusionPipeline, device: torch.device, cpu_offload: bool = False, attention_slicing: bool = False) -> None:
    """Move a pipeline to its device, with the memory-saving options; UserError if one has no effect."""
    if attention_slicing:
        if not any(hasattr(module, "set_attention_slice") for module in pipe.components.values()):
            raise UserError(f"--attention_slicing does nothing for a {type(pipe).__name__}")
        pipe.enable_attention_slicing()
    if cpu_offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)


def _variant(model_path: str, dtype: torch.dtype) -> str | None:
    """Return `fp16` if that dtype is asked for and the pipeline has files of that variant (tested by its text encoders)."""
    if dtype != torch.float16:
        return None
    for name in ("text_encoder/model.fp16.safetensors", "text_encoder_2/model.fp16.safetensors"):
        if (Path(model_path) / name).is_file():
            return "fp16"
        if not Path(model_path).is_dir():
            with loading(f"{name} of {model_path}"), contextlib.suppress(EntryNotFoundError):
                hf_hub_download(model_path, name)
                return "fp16"
    return None


def _check_complete(pipe: DiffusionPipeline, model_path: str) -> None:
    """Raise UserError if a component's files lack weights, which diffusers leaves on the device "meta"."""
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module):
            empty = [key for key, tensor in module.state_dict().items() if tensor.is_meta]
            if empty:
                raise UserError(f"the {name} of {model_path} lacks {len(empty)} weights, `{empty[0]}` first")


def encoder_modules(pipe: DiffusionPipeline) -> dict[int, nn.Module]:
    """Return the text encoders of a pipeline by 1-based index."""
    names = {i: _encoder_name(i) for i in range(1, 1 + MOST_ENCODERS)}
    return {i: getattr(pipe, name) for i, name in names.items() if getattr(pipe, name, None) is not None}


def text_encoder(pipe: DiffusionPipeline, index: int, embedding: str = "last_hidden_state") -> TextEncoder:
    """Return text encoder `index` (1-based) of an opened pipeline with its tokenizer, like `load_encoder`."""
    name = _encoder_name(index)
    model, tokenizer = getattr(pipe, name), getattr(pipe, name.replace("text_encoder", "tokenizer"))
    base_class = re.sub("Img2Img|Inpaint", "", type(pipe).__name__)
    masked = bool(getattr(model.config, "use_attention_mask", False))
    reading = reading_for(base_class, index, type(model).__name__, embedding, masked)
    length = reading.length or tokenizer.model_max_length
    return TextEncoder(pipe.name_or_path, index, name, model, tokenizer, embedding, reading, length)


def readers(pipe: DiffusionPipeline, max_sequence_length: int | None = None) -> dict[str, tuple[PreTrainedTokenizerBase, int]]:
    """Return the tokenizer of each text encoder of a pipeline, and how many tokens of a prompt it reads."""
    encoders = [text_encoder(pipe, i, "pipeline") for i in encoder_modules(pipe)]
    long = {each.index for each in encoders if max_sequence_length and ENCODER_CLASSES[type(each.model).__name__].any_length}
    return {each.subfolder: (each.tokenizer, max_sequence_length if each.index in long else each.length) for each in encoders}


def _encoder_name(index: int) -> str:
    return "text_encoder" if index == 1 else f"text_encoder_{index}"


def protect(pipe: DiffusionPipeline, checkpoints: dict[int, Path]) -> dict[int, dict[str, Any]]:
    """Load a checkpoint into each given text encoder, or raise UserError; returns `load_measured`'s result for each."""
    encoders = encoder_modules(pipe)
    lacking = sorted(checkpoints.keys() - encoders.keys())
    if lacking:
        has = ", ".join(map(str, encoders))
        raise UserError(f"a checkpoint is given for text encoder {lacking[0]}, but the pipeline has only {has}")
    loaded = {i: load_measured(text_encoder(pipe, i, embedding_of(path)), path) for i, path in checkpoints.items()}
    rest = [str(i) for i in encoders if i not in checkpoints]
    if rest:
        logger.warning("text encoder %s of the pipeline is the original, NOT protected", " and ".join(rest))
    return loaded


def protected_twin(
    pipe: DiffusionPipeline, checkpoints: dict[int, Path]
) -> tuple[DiffusionPipeline, dict[int, dict[str, Any]]]:
    """Return a copy of a pipeline with these checkpoints in its text encoders, and `protect`'s result; raises as `protect` does.

    `pipe` is not changed. Both share all other components, including scheduler and denoiser, so draw with one at a time.
    """
    twin = copy.copy(pipe)
    for i in checkpoints.keys() & encoder_modules(pipe).keys():
        setattr(twin, _encoder_name(i), copy.deepcopy(encoder_modules(pipe)[i]))
    return twin, protect(twin, checkpoints)


def is_distilled(pipe: DiffusionPipeline) -> bool:
    """Whether a pipeline was distilled without guidance, like FLUX.1-schnell, and ignores the guidance scale."""
    transformer = getattr(pipe, "transformer", None)
    return transformer is not None and not transformer.config.get("guidance_embeds", True)


def encoder_sha256s(pipe: DiffusionPipeline) -> dict[str, str]:
    """Return the fingerprint of each text encoder of a pipeline, as `text_encoder_sha256`, `text_encoder_2_sha256`, ..."""
    encoders = encoder_modules(pipe)
    return {f"text_encoder{'' if i == 1 else f'_{i}'}_sha256": fingerprint(encoder) for i, encoder in encoders.items()}


def component_identities(
    pipe: DiffusionPipeline, model_path: str, refiner: DiffusionPipeline | None = None, refiner_path: str | None = None
) -> dict[str, str]:
    """Return the identities of an opened pipeline's components (`des.models.identity`), the refiner's prefixed with `refiner_`."""
    found = component_sha256s(pipe, model_path, _variant(model_path, pipe.dtype))
    if refiner is not None:
        shared = {name for name, part in refiner.components.items() if part is getattr(pipe, name, None)}
        unshared = component_sha256s(refiner, refiner_path, _variant(refiner_path, refiner.dtype), without=shared)
        found |= {f"refiner_{name}": digest for name, digest in unshared.items()}
        found["refiner_scheduler"] = scheduler_sha256(refiner.scheduler)
    return found
