"""`--training_method`: DES and the defences that users compare it with, each by the files that it publishes."""

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
class Method:
    """What a method takes from the command line (`needs`: at least one of its options) and how it gets into a pipeline."""

    options: tuple[str, ...]
    needs: bool
    apply: Callable[["DiffusionPipeline", argparse.Namespace], dict[str, Any]]


def _des(pipe: "DiffusionPipeline", args: argparse.Namespace) -> dict[str, Any]:
    from des.models.pipelines import protect

    return protect(pipe, given_encoders(args))


def _published_encoder(hub_id: str, subfolder: str | None = None) -> Callable[["DiffusionPipeline", argparse.Namespace], dict]:
    """A defence that publishes a text encoder on the hub, taken from there unless --text_encoder_path names a copy."""

    def apply(pipe: "DiffusionPipeline", args: argparse.Namespace) -> dict[str, Any]:
        from des.models.loading import loading
        from des.models.pipelines import protect

        from huggingface_hub import snapshot_download

        path = args.text_encoder_path
        if path is None:
            patterns = [f"{subfolder}/*" if subfolder else suffix for suffix in ("*.json", "*.safetensors", "*.bin")]
            with loading(f"the text encoder of {args.training_method}, {hub_id},"):
                path = Path(snapshot_download(hub_id, allow_patterns=patterns)) / (subfolder or "")
        return protect(pipe, {1: path})

    return apply


def _unet(pipe: "DiffusionPipeline", args: argparse.Namespace) -> dict[str, Any]:
    from des.generation.unet_defences import load_unet_weights

    return load_unet_weights(_unet_of(pipe, args), args.unet_path)


def _spm(pipe: "DiffusionPipeline", args: argparse.Namespace) -> dict[str, Any]:
    from des.generation.unet_defences import merge_spm

    return merge_spm(_unet_of(pipe, args), args.adapter_path)


def _safegen(pipe: "DiffusionPipeline", args: argparse.Namespace) -> dict[str, Any]:
    """SafeGen is a pipeline of its own; all that can be checked is that its UNet is not that of the model it was made from."""
    from des.models.loading import loading
    from des.models.weights import same_weights

    from diffusers import UNet2DConditionModel

    unet = _unet_of(pipe, args)
    with loading(f"the UNet of --base_model_path {args.base_model_path}"):
        base = UNet2DConditionModel.from_pretrained(args.base_model_path, subfolder="unet", dtype=unet.dtype).state_dict()
    own = unet.state_dict()
    same_shapes = base.keys() == own.keys() and all(base[name].shape == tensor.shape for name, tensor in own.items())
    if same_shapes and same_weights(base, own):
        told = f"its UNet is the one of {args.base_model_path}, or that one rounded to another type"
        raise UserError(f"{args.model_path} is no SafeGen: {told}")
    return {"model": args.model_path, "differs_from": args.base_model_path}


def _unet_of(pipe: "DiffusionPipeline", args: argparse.Namespace) -> "nn.Module":
    if getattr(pipe, "unet", None) is None:
        raise UserError(f"{args.training_method} changes a UNet, and a {type(pipe).__name__} has none")
    return pipe.unet


METHODS = {
    "none": Method((), False, lambda pipe, args: {}),
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
    parser.add_argument(
        "--base_model_path", metavar="M", help="with safegen: what it was made from (default: CompVis/stable-diffusion-v1-4)"
    )


def add_encoders(parser: argparse._ActionsContainer) -> None:
    """Add the options that name protected text encoders."""
    for i, option in ENCODER_OPTIONS.items():
        what = "a protected text encoder" if i == 1 else f"the same for text encoder {i}"
        parser.add_argument(f"--{option}", type=Path, metavar="CKPT", help=f"{what}: .pt, .safetensors or a folder")


def given_encoders(args: argparse.Namespace) -> dict[int, Path]:
    """The checkpoints that a command line gives, by the 1-based index of their text encoder."""
    given = {i: getattr(args, option) for i, option in ENCODER_OPTIONS.items()}
    return {i: path for i, path in given.items() if path is not None}


def check_method(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error where a method lacks what it needs, or gets what it does not use."""
    method = METHODS[args.training_method]
    given = [option for option in _OPTIONS if getattr(args, option) is not None]
    surplus = [option for option in given if option not in method.options]
    told = " or ".join(f"--{option}" for option in method.options)
    if surplus:
        parser.error(
            f"--{surplus[0]} does not go with --training_method {args.training_method}, which takes {told or 'no file'}"
        )
    if args.training_method == "safegen":
        if args.model_path == parser.get_default("model_path"):
            parser.error("--training_method safegen needs --model_path with SafeGen's own pipeline")
        args.base_model_path = args.base_model_path or "CompVis/stable-diffusion-v1-4"
    elif method.needs and not given:
        parser.error(f"--training_method {args.training_method} needs {told}")
