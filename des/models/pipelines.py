"""Opening a diffusers pipeline for generation, and putting protected text encoders into it."""

import copy
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from des.models.checkpoints import fingerprint
from des.models.encoders import TextEncoder, components_of, encoder_class, family_of, read_config, read_index, reading_for
from des.models.families import DIFFUSION, ENCODER_CLASSES, MOST_ENCODERS, REFINER_CLASS, Family, find_family
from des.models.families import DTYPES as _DTYPES
from des.models.identity import component_sha256s, scheduler_sha256
from des.models.loading import check_dtype, dtype_option, load_model, loading, release, torch_dtype
from des.models.model_files import check_variant, fetch, read_json
from des.models.shift import embedding_of, load_measured
from des.models.tokenizers import load_tokenizer, tokenizer_name
from des.utils.errors import UserError
from des.utils.logs import logger

import diffusers
import torch
import transformers
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {name: torch_dtype(name) for name in _DTYPES}
_ENCODER_PART = re.compile("text_encoder|tokenizer")
_FROM_PIPE = {"image": AutoPipelineForImage2Image, "inpaint": AutoPipelineForInpainting}
MOST_TRAINING_STEPS = 100_000  # of a scheduler's training; published ones have 1000
LATENT_DIFFUSION = {  # from Stable Diffusion's published scheduler files; without them, latents would be clipped to -1..1
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def dtype_for(family: Family, device: torch.device, asked: str | None) -> torch.dtype:
    """Return the dtype to draw with: the one asked for, or the family's; a default of fp16 becomes fp32 on CPUs, which compute it slowly.

    Raises UserError for a family with which the installed torch cannot draw: diffusers' attention for FLUX and Chroma passes
    `enable_gqa`, which torch has since 2.5.
    """
    if family.pipeline in ("FluxPipeline", "ChromaPipeline") and release("torch") < (2, 5):
        raise UserError(
            f"drawing with a {family.name} needs torch 2.5 or newer, and torch {torch.__version__} is installed; update torch"
        )
    if asked is None and family.dtype == "fp16" and device.type == "cpu":
        logger.info("on a CPU this model is drawn in fp32 instead of fp16; --dtype chooses otherwise")
        return torch.float32
    return DTYPES[asked or family.dtype]


def open_pipeline(
    model_path: str,
    dtype: torch.dtype,
    model_type: str | None = None,
    scheduler: str | None = None,
    mode: str = "text",
    variant: str | None = None,
    drop_t5: bool = False,
) -> DiffusionPipeline:
    """Open the pipeline of a folder or hub id on the CPU, with every weight from its files.

    The default `scheduler` is the paper's: DDIM for SD 1.x, Euler for SD 2.x, and the one in the model's files for others. `mode`
    is one of MODES; `variant` is that of the weights (see `find_weights`); `drop_t5` opens SD3 without T5. Raises UserError for
    unsupported classes, a family other than `model_type`, incomplete files, and tokenizers that do not fit their encoders.
    """
    family, components = family_of(model_path), components_of(model_path, drop_t5)
    if model_type not in (None, family.name, family.model_type):
        raise UserError(f"--model_type is {model_type}, but {model_path} is a {family.name}")
    if scheduler and scheduler not in family.schedulers:
        raise UserError(f"--scheduler {scheduler} does not suit a {family.name}, which takes {', '.join(family.schedulers)}")
    if mode not in family.modes:
        raise UserError(f"{model_path} is a {family.name}, which draws from text only; leave --init_images out")
    for i in family.encoders:  # classes such as SDXL's accept None for all of them, and would fail or draw noise later
        names = _encoder_name(i), tokenizer_name(_encoder_name(i))
        lacking = [name for name in names if not components.get(name)]
        if lacking and (components.get(names[0]) or i not in family.optional_encoders):
            raise UserError(f"{model_path} has no {lacking[0]}, without which a {family.name} cannot draw")
    check_variant(model_path, variant)
    pipe = _open(model_path, family.pipeline, components, family.options, dtype, variant, family)
    scheduler = scheduler or family.scheduler
    if scheduler:
        pipe.scheduler = as_scheduler(pipe.scheduler, getattr(diffusers, family.schedulers[scheduler]))
    if mode in _FROM_PIPE:
        pipe = _FROM_PIPE[mode].from_pipe(pipe, **family.options)
        pipe.set_progress_bar_config(disable=True)
    return pipe


def _open(
    model_path: str,
    pipeline_class: str,
    components: Mapping[str, tuple[str, str] | None],
    given: Mapping[str, Any],
    dtype: torch.dtype,
    variant: str | None,
    family: Family | None = None,
) -> DiffusionPipeline:
    """Open a pipeline whose `components` are `components_of`'s; those in `given`, and other arguments of its class, are not read."""
    given = {name: None for name, kind in components.items() if kind is None} | dict(given)
    read = {name: kind for name, kind in components.items() if name not in given}
    optional = getattr(diffusers, pipeline_class)._optional_components
    lacking = [name for name, part in given.items() if part is None and not (name in optional or _ENCODER_PART.match(name))]
    if lacking:
        raise UserError(f"{model_path} has no {lacking[0]}, without which a {pipeline_class} cannot draw")
    files = fetch(model_path, read, variant, dtype)
    _check_scheduler(files.folder, model_path)
    models = {}
    for name, (library, class_name) in read.items():
        model_class = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), class_name, object)
        options = {"subfolder": name, "variant": files.variants.get(name)}
        if name.startswith("text_encoder"):
            encoder_class(class_name, f"{name} of {model_path}")
        if issubclass(model_class, ModelMixin):
            files.variant(name)  # raises for a folder without weights, as read_config does for a damaged configuration
            read_config(model_path, name)
            with loading(f"the {name} of {model_path}"):
                models[name] = model_class.from_pretrained(files.folder, **dtype_option("diffusers", dtype), **options)
        elif issubclass(model_class, PreTrainedModel):
            files.variant(name)
            models[name] = load_model(model_class, str(files.folder), "cpu", f"the {name} of", dtype, **options)
            if tokenizer_name(name) in read:
                config = models[name].config
                models[tokenizer_name(name)] = load_tokenizer(
                    files.folder, model_path, name, class_name, config, components, family
                )
    with loading(f"the pipeline {model_path}"):
        parts, dtypes = given | models, dtype_option("diffusers", dtype)
        # With transformers 4, diffusers refuses a fast tokenizer where model_index.json names the slow class (see `load_tokenizer`).
        fast = {
            name: part
            for name, part in parts.items()
            if getattr(part, "is_fast", False) and not _is_named(part, components[name])
        }
        pipe = getattr(diffusers, pipeline_class).from_pretrained(files.folder, **dtypes, **parts | dict.fromkeys(fast))
        pipe.register_modules(**fast)
        if "tokenizer" in fast and hasattr(pipe, "tokenizer_max_length"):  # SD3 and FLUX set it from the tokenizer
            pipe.tokenizer_max_length = pipe.tokenizer.model_max_length
    check_dtype(pipe.components, dtype, model_path)
    pipe.register_to_config(_name_or_path=model_path)
    _check_complete(pipe, model_path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _is_named(part: Any, entry: tuple[str, str]) -> bool:
    return isinstance(part, getattr(transformers, entry[1], object))


def _check_scheduler(folder: Path, model_path: str) -> None:
    """Raise UserError for a number of training steps that is none, or for which diffusers would fill the memory."""
    name = "scheduler/scheduler_config.json"
    steps = read_json(str(folder), name).get("num_train_timesteps", 1000) if (folder / name).is_file() else 1000
    if type(steps) is not int or not 1 <= steps <= MOST_TRAINING_STEPS:
        raise UserError(
            f"num_train_timesteps in {name} of {model_path} must be a whole number from 1 to {MOST_TRAINING_STEPS}, not {steps!r}"
        )


def as_scheduler(source: SchedulerMixin, target: type[SchedulerMixin]) -> SchedulerMixin:
    """Return a scheduler of class `target` with the noise schedule, prediction type and steps of `source`.

    `from_config` alone uses the target's defaults for entries missing in the model's file, even if the source's class or the
    pipeline's corrections (`clip_sample`, `steps_offset`) set other values. Here the source's effective values are used, so that
    incomplete and complete files draw the same images. Options that the source's class lacks come from LATENT_DIFFUSION.
    """
    effective = {name: value for name, value in source.config.items() if name != "_use_default_values"}
    return target.from_config(LATENT_DIFFUSION | effective if target.__name__ in DIFFUSION.values() else effective)


def open_refiner(refiner_path: str, base: DiffusionPipeline, variant: str | None = None) -> DiffusionPipeline:
    """Open SDXL's refiner with the base's VAE and text encoder 2, so that it is protected like the base."""
    index = read_index(refiner_path)
    if index is None or index["_class_name"] != REFINER_CLASS:
        raise UserError(f"{refiner_path} is not an SDXL refiner, whose class is {REFINER_CLASS}")
    components = components_of(refiner_path)
    if components.get("text_encoder"):
        raise UserError(f"{refiner_path} has a text encoder besides text_encoder_2, which would be unprotected")
    shared = {"text_encoder_2": base.text_encoder_2, "tokenizer_2": base.tokenizer_2, "vae": base.vae}
    return _open(refiner_path, REFINER_CLASS, components, shared | {"add_watermarker": False}, base.dtype, variant)


def place(pipe: DiffusionPipeline, device: torch.device, cpu_offload: bool = False) -> None:
    """Move a pipeline to its device; with `cpu_offload`, move each model only while it is in use."""
    if cpu_offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)


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
    model, tokenizer = getattr(pipe, name), getattr(pipe, tokenizer_name(name))
    reading = reading_for(_family(pipe), index, type(model).__name__, embedding, model.config)
    length = reading.length or tokenizer.model_max_length
    return TextEncoder(pipe.name_or_path, index, name, model, tokenizer, embedding, reading, length)


def _family(pipe: DiffusionPipeline) -> Family | None:
    return find_family(re.sub("Img2Img|Inpaint", "", type(pipe).__name__), lambda component: _config(pipe, component))


def _config(pipe: DiffusionPipeline, component: str) -> dict[str, Any] | None:
    config = getattr(getattr(pipe, component, None), "config", None)
    return config.to_dict() if isinstance(config, PretrainedConfig) else config


def readers(pipe: DiffusionPipeline, max_sequence_length: int | None = None) -> dict[str, tuple[PreTrainedTokenizerBase, int]]:
    """Return the tokenizer of each text encoder of a pipeline, and how many tokens of a prompt it reads."""
    encoders = [text_encoder(pipe, i, "pipeline") for i in encoder_modules(pipe)]
    long = {each.index for each in encoders if max_sequence_length and ENCODER_CLASSES[type(each.model).__name__].any_length}
    return {each.subfolder: (each.tokenizer, max_sequence_length if each.index in long else each.length) for each in encoders}


def _encoder_name(index: int) -> str:
    return "text_encoder" if index == 1 else f"text_encoder_{index}"


def protect(pipe: DiffusionPipeline, checkpoints: dict[int, Path]) -> dict[int, dict[str, Any]]:
    """Load a checkpoint into each given text encoder; returns `load_measured`'s result for each.

    Raises UserError and changes nothing if one of them cannot be loaded. `unprotected_encoders` names the others of the pipeline.
    """
    encoders = encoder_modules(pipe)
    lacking = sorted(checkpoints.keys() - encoders.keys())
    if lacking:
        has = ", ".join(map(str, encoders))
        raise UserError(f"a checkpoint is given for text encoder {lacking[0]}, but the pipeline has only {has}")
    family = _family(pipe)
    loaded: dict[int, dict[str, Any]] = {}
    before: dict[int, dict[str, torch.Tensor]] = {}
    try:
        for i, path in checkpoints.items():
            if len(loaded) + 1 < len(checkpoints):  # one of the later checkpoints may not fit
                before[i] = {name: tensor.to("cpu", copy=True) for name, tensor in encoders[i].state_dict().items()}
            loaded[i] = load_measured(text_encoder(pipe, i, embedding_of(path)), path, family)
    except BaseException:
        for i, state in before.items():
            encoders[i].load_state_dict(state)
        raise
    rest = unprotected_encoders(pipe, checkpoints)
    if rest:
        logger.warning("text encoder %s of the pipeline is the original, NOT protected", " and ".join(map(str, rest)))
    return loaded


def unprotected_encoders(pipe: DiffusionPipeline, protected: Collection[int]) -> list[int]:
    """Return the numbers of a pipeline's text encoders that are not among the `protected` ones and so are the originals."""
    return [i for i in encoder_modules(pipe) if i not in protected]


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


def encoder_sha256s(pipe: DiffusionPipeline) -> dict[str, str]:
    """Return the fingerprint of each text encoder of a pipeline, as `text_encoder_sha256`, `text_encoder_2_sha256`, ..."""
    encoders = encoder_modules(pipe)
    return {f"text_encoder{'' if i == 1 else f'_{i}'}_sha256": fingerprint(encoder) for i, encoder in encoders.items()}


def component_identities(
    pipe: DiffusionPipeline,
    model_path: str,
    refiner: DiffusionPipeline | None = None,
    refiner_path: str | None = None,
    variant: str | None = None,
) -> dict[str, str]:
    """Return the identities of an opened pipeline's components (`des.models.identity`), the refiner's prefixed with `refiner_`.

    `variant` is the one that both were opened with.
    """
    found = component_sha256s(pipe, model_path, variant)
    if refiner is not None:
        shared = {name for name, part in refiner.components.items() if part is getattr(pipe, name, None)}
        unshared = component_sha256s(refiner, refiner_path, variant, without=shared)
        found |= {f"refiner_{name}": digest for name, digest in unshared.items()}
        found["refiner_scheduler"] = scheduler_sha256(refiner.scheduler)
    return found
