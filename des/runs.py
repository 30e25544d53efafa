"""The record of a folder of images: all that decides what they look like, so that no two runs mix in one folder."""

import argparse
import json
from pathlib import Path
from typing import Any

from des.cli import UserError
from des.drawing import RowSettings
from des.images import image_files
from des.pipelines import encoder_sha256s
from des.prompts import never_drawn
from des.results import provenance, sha256_file, sha256_texts, write_json

from diffusers import DiffusionPipeline

NOT_SETTINGS = (
    "prompts_csv", "prompt", "output_path", "results_dir", "start_idx", "end_idx", "device", "batch_size", "num_images_per_prompt",
    "text_encoder_path", "text_encoder_2_path", "text_encoder_3_path", "unet_path", "adapter_path", "init_images", "mask_images",
    "enable_model_cpu_offload", "attention_slicing", "model_type", "score_with", "blur", "profile", "detector_weights", "prompts_file",
    "clip_model", "classifier", "cls_class",
)  # fmt: skip


def settings_of(
    args: argparse.Namespace,
    prompts: list[str],
    drawn_with: list[RowSettings],
    pipe: DiffusionPipeline,
    inputs: dict[str, dict[int, Path]],
) -> dict[str, Any]:
    """All that decides what an image looks like: settings, and hashes of the prompts, text encoders and input images."""
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    if args.use_row_settings:
        settings["row_settings_sha256"] = sha256_texts(map(str, drawn_with))
    for option in ("unet_path", "adapter_path"):
        path = getattr(args, option)
        settings[f"{option.removesuffix('_path')}_sha256"] = None if path is None else sha256_file(path)
    for name in inputs:
        found = sorted(image_files(getattr(args, f"{name}s")))
        settings[f"{name}s_sha256"] = sha256_texts(f"{path.name} {sha256_file(path)}" for path in found)
    scheduler = type(pipe.scheduler).__name__
    return settings | encoder_sha256s(pipe) | {"scheduler": scheduler, "prompts_sha256": sha256_texts(prompts)}


def claim(
    folder: Path, args: argparse.Namespace, prompts: list[str], settings: dict[str, Any], applied: dict
) -> dict[str, Any]:
    """Write run.json and return what is in it, or raise UserError when `folder` holds images that other settings made."""
    settings = json.loads(json.dumps(settings, default=str))
    path = folder / "run.json"
    earlier = {}
    if path.exists():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            before = earlier["settings"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path} cannot be read, so the images beside it are of unknown origin; choose another --output_path"
            ) from None
        pairs = {name: (before.get(name), settings.get(name)) for name in before | settings}
        changed = [
            f"{name} ({old}, now {new})" for name, (old, new) in pairs.items() if old != new and (old or new) is not False
        ]
        if changed:
            raise UserError(
                f"{folder} holds images of another run, with another {', '.join(changed)}; choose another --output_path"
            )
    elif folder.is_dir() and any(folder.glob("*p*.*")):
        raise UserError(f"{folder} holds images of unknown origin (no run.json); choose another --output_path")
    facts = {"settings": settings, "protection": applied, "left_out": never_drawn(prompts), "made_by": provenance(args)}
    facts |= {"last_drawn": earlier["last_drawn"]} if "last_drawn" in earlier else {}
    write_json(path, facts)
    return facts
