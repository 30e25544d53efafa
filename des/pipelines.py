"""Opening a diffusers pipeline for generation and putting a protected text encoder into it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, SchedulerMixin, StableDiffusionPipeline

from des.checkpoints import fingerprint, load_checkpoint
from des.cli import UserError
from des.encoders import pipeline_class
from des.loading import loading


@dataclass(frozen=True)
class Family:
    """How pipelines of one class are opened; a further family is one entry of FAMILIES."""

    pipeline: type[DiffusionPipeline]
    dtype: torch.dtype
    model_types: tuple[str, ...]  # its names for `--model_type`
    options: dict[str, Any]  # for `from_pretrained`


FAMILIES = {
    "StableDiffusionPipeline": Family(
        StableDiffusionPipeline, torch.float32, ("sd_v1", "sd_v2"), {"safety_checker": None, "requires_safety_checker": False}
    )
}
MODEL_TYPES = tuple(name for family in FAMILIES.values() for name in family.model_types)
_SD2_WIDTH = 1024  # OpenCLIP-H, which tells SD 2.x from 1.x


def open_pipeline(model_path: str, device: torch.device, model_type: str | None = None) -> DiffusionPipeline:
    """Open the pipeline of a folder or hub id with the paper's sampler: DDIM for SD 1.x, Euler for SD 2.x, both fp32.

    Raises UserError for a class that is not known here, one that is not the `model_type` asked for, or incomplete files.
    """
    name = pipeline_class(model_path)
    if name not in FAMILIES:
        raise UserError(
            f"{model_path} is a {name or 'folder without model_index.json'}; generation knows {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    with loading(f"the pipeline {model_path}"):
        pipe = family.pipeline.from_pretrained(model_path, dtype=family.dtype, **family.options)
    is_sd2 = pipe.text_encoder.config.hidden_size == _SD2_WIDTH
    actual = "sd_v2" if is_sd2 else "sd_v1"
    if model_type and model_type != actual:
        raise UserError(f"--model_type {model_type} was asked for, but {model_path} is a {actual}")
    scheduler: type[SchedulerMixin] = EulerDiscreteScheduler if is_sd2 else DDIMScheduler
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def protect(pipe: DiffusionPipeline, checkpoint: Path) -> dict[str, Any]:
    """Put a DES checkpoint into the pipeline's text encoder, or raise UserError; returns what `load_checkpoint` says."""
    return load_checkpoint(pipe.text_encoder, checkpoint)


def text_encoder_sha256(pipe: DiffusionPipeline) -> str:
    """The fingerprint of the text encoder that the pipeline generates with."""
    return fingerprint(pipe.text_encoder)
