"""`--training_method`: DES and the defences to compare it with, and the files that each needs.

torch and diffusers are imported only when a defence is applied, so that options are parsed quickly.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from des.utils.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

ENCODER_OPTIONS = {1: "text_encoder_path", 2: "text_encoder_2_path", 3: "text_encoder_3_path"}


@dataclass(frozen=True)
class Defence:
    """A method of METHODS with its files in a run; paths that are not given are None."""

    method: str
    model_path: str
    base_model_path: str | None  # safegen: the original model
    encoders: dict[int, Path]  # checkpoints by 1-based index of the text encoder
    unet_path: Path | None
    adapter_path: Path | None

    def apply(self, pipe: "DiffusionPipeline") -> dict[Any, Any]:
        """Change `pipe` in place and return what was loaded, for run.json; UserError if a file does not fit or changes nothing."""
        return METHODS[self.method].apply(pipe, self)


@dataclass(frozen=True)
class Method:
    """The options of a method, whether it `needs` at least one of them, and the function that applies it to a pipeline."""

    options: tuple[str, ...]
    needs: bool
    apply: Callable[["DiffusionPipeline", Defence], dict[Any, Any]]


def _des(pipe: "DiffusionPipeline", defence: Defence) -> dict[int, Any]:
    from des.models.pipelines import protect

    return protect(pipe, defence.encoders)


def _published_encoder(hub_id: str, subfolder: str | None = None) -> Callable[["DiffusionPipeline", Defence], dict[int, Any]]:
    """Return the function for a defence with a text encoder on the hub, downloaded unless --text_encoder_path is given."""

    def apply(pipe: "DiffusionPipeline", defence: Defence) -> dict[int, Any]:
        from des.models.loading import loading
        from des.models.pipelines import protect

        from huggingface_hub import snapshot_download

        path = defence.encoders.get(1)
        if path is None:
            patterns = [f"{subfolder}/*" if subfolder else suffix for suffix in ("*.json", "*.safetensors", "*.bin")]
            with loading(f"the text encoder of {defence.method}, {hub_id},", hub_id):
                path = Path(snapshot_download(hub_id, allow_patterns=patterns)) / (subfolder or "")
        return protect(pipe, {1: path})

    return apply


def _unet(pipe: "DiffusionPipeline", defence: Defence) -> dict[str, Any]:
    from des.generation.unet_defences import load_unet_weights

    return load_unet_weights(_unet_of(pipe, defence), defence.unet_path)


def _spm(pipe: "DiffusionPipeline", defence: Defence) -> dict[str, Any]:
    from des.generation.unet_defences import merge_spm

    return merge_spm(_unet_of(pipe, defence), defence.adapter_path)


def _safegen(pipe: "DiffusionPipeline", defence: Defence) -> dict[str, Any]:
    from des.generation.unet_defences import check_other_unet

    check_other_unet(_unet_of(pipe, defence), defence.model_path, defence.base_model_path)
    return {"model": defence.model_path, "differs_from": defence.base_model_path}


def _unet_of(pipe: "DiffusionPipeline", defence: Defence) -> "nn.Module":
    if getattr(pipe, "unet", None) is None:
        raise UserError(f"{defence.method} changes a UNet, but a {type(pipe).__name__} has none")
    return pipe.unet


METHODS = {
    "none": Method((), False, lambda pipe, defence: {}),
    "des": Method(tuple(ENCODER_OPTIONS.values()), True, _des),
    "advunlearn": Method(("text_encoder_path",), False, _published_encoder("OPTML-Group/AdvUnlearn", "nudity_unlearned")),
    "visu": Method(("text_encoder_path",), False, _published_encoder("aimagelab/safeclip_vit-l_14")),
    **{name: Method(("unet_path",), True, _unet) for name in ("uce", "esd", "fmn", "salun")},
    "spm": Method(("adapter_path",), True, _spm),
    "safegen": Method(("model_path", "base_model_path"), True, _safegen),
}
_OPTIONS = (*ENCODER_OPTIONS.values(), "unet_path", "adapter_path", "base_model_path")


def add_method(parser: argparse._ActionsContainer) -> None:
    """Add `--training_method` and the options of the methods."""
    parser.add_argument("--training_method", choices=METHODS, default="none", help="none is the original model")
    add_encoders(parser)
    parser.add_argument("--unet_path", type=Path, metavar="F", help="UNet weights of uce, esd, fmn or salun, whole or in part")
    parser.add_argument("--adapter_path", type=Path, metavar="F", help="the adapters of spm")
    # fmt: off
    parser.add_argument("--base_model_path", metavar="M", help="with safegen: what it was made from (default: CompVis/stable-diffusion-v1-4)")
    # fmt: on


def add_encoders(parser: argparse._ActionsContainer) -> None:
    """Add the options that name protected text encoders."""
    for i, option in ENCODER_OPTIONS.items():
        what = "a protected text encoder" if i == 1 else f"the same for text encoder {i}"
        parser.add_argument(f"--{option}", type=Path, metavar="CKPT", help=f"{what}: .pt, .safetensors or a folder")


def open_defence(args: argparse.Namespace) -> Defence:
    """Return the method given on the command line, with its files."""
    files = {"unet_path": args.unet_path, "adapter_path": args.adapter_path, "encoders": open_encoders(args)}
    return Defence(args.training_method, args.model_path, args.base_model_path, **files)


def open_encoders(args: argparse.Namespace) -> dict[int, Path]:
    """Return the checkpoints given on the command line by 1-based index of the text encoder."""
    given = {i: getattr(args, option) for i, option in ENCODER_OPTIONS.items()}
    return {i: path for i, path in given.items() if path is not None}


def check_method(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error if a method lacks a file that it needs, or gets one that it does not use."""
    method = METHODS[args.training_method]
    given = [option for option in _OPTIONS if getattr(args, option) is not None]
    surplus = [option for option in given if option not in method.options]
    takes = " or ".join(f"--{option}" for option in method.options)
    if surplus and args.training_method == "none":
        fits = " or ".join(name for name, method in METHODS.items() if surplus[0] in method.options)
        parser.error(f"--{surplus[0]} is for a protected model, but --training_method is none; add --training_method {fits}")
    if surplus:
        parser.error(f"--{surplus[0]} does not go with --training_method {args.training_method}, which takes {takes}")
    if args.training_method == "safegen":
        if args.model_path == parser.get_default("model_path"):
            parser.error("--training_method safegen needs --model_path with SafeGen's own pipeline")
        args.base_model_path = args.base_model_path or "CompVis/stable-diffusion-v1-4"
    elif method.needs and not given:
        parser.error(f"--training_method {args.training_method} needs {takes}")
