"""Other defences that change a UNet: ESD, UCE, FMN and SalUn replace weights, SPM adds one-dimensional adapters to them.

Sources: ESD, "Erasing Concepts from Diffusion Models"; UCE, "Unified Concept Editing in Diffusion Models"; FMN, "Forget-Me-Not";
SalUn, "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency"; SPM, "One-dimensional Adapter to Rule Them All".
"""

from pathlib import Path
from typing import Any

from des.models.checkpoints import unwrapped
from des.models.loading import dtype_option, loading
from des.models.model_files import fetch
from des.models.tensor_files import read_tensors, refuse_integers
from des.models.weights import same_weights
from des.utils.errors import UserError
from des.utils.files import sha256_file

import torch
from diffusers import UNet2DConditionModel
from diffusers.models import Transformer2DModel
from torch import Tensor, nn

_PARTS = ("lora_down.weight", "lora_up.weight", "alpha")
_COMPVIS = "model.diffusion_model."


def load_unet_weights(unet: nn.Module, path: Path) -> dict[str, Any]:
    """Load a whole or partial UNet state dict (diffusers names) into `unet`, cast to its dtype.

    ESD and UCE publish the tensors that they changed, FMN and SalUn all of them. Raises UserError, and changes nothing, if a
    tensor is unknown, has another shape or is not finite, or if none differs from the UNet's by more than rounding. Returns
    `{"file", "sha256", "tensors"}`, the last being the number of tensors replaced.
    """
    loaded, own = unwrapped(read_tensors(path)), unet.state_dict()
    refuse_integers(loaded, path)
    unknown = sorted(loaded.keys() - own.keys())
    if unknown:
        compvis = any(name.startswith(_COMPVIS) for name in unknown)  # whole files hold other tensors too, first by name
        hint = "; these are CompVis names, which diffusers' single-file loader converts" * compvis
        raise UserError(
            f"{path} does not fit the UNet: {len(unknown)} of its {len(loaded)} tensors are unknown, `{unknown[0]}` first{hint}"
        )
    for name, tensor in loaded.items():
        if tensor.shape != own[name].shape:
            theirs, ours = tuple(tensor.shape), tuple(own[name].shape)
            raise UserError(
                f"{path} was made for another UNet: `{name}` has shape {theirs} in the file and {ours} in the model"
            )
    return _replace(unet, loaded, path)


def merge_spm(unet: nn.Module, path: Path) -> dict[str, Any]:
    """Merge SPM's adapters into the Linear and Conv2d weights of `unet`'s transformers: W + up * down * alpha / rank, in fp32.

    Names are `lora_unet_` + the layer's path with underscores + `.lora_down.weight` ([rank, in] or [rank, in, height, width]),
    `.lora_up.weight` ([out, rank] or [out, rank, 1, 1]) and `.alpha` (one number). Raises UserError, and changes nothing, for
    incomplete adapters, unknown layers, shapes that do not fit, or adapters that change nothing. Returns `{"file", "sha256",
    "tensors"}`, the last being the number of layers merged.
    """
    loaded, layers = read_tensors(path), _adapted_layers(unet)
    refuse_integers({name: tensor for name, tensor in loaded.items() if not name.endswith(".alpha")}, path)
    merged = {}
    for adapter in sorted({name.split(".", 1)[0] for name in loaded}):
        tensors = [loaded.pop(f"{adapter}.{part}", None) for part in _PARTS]
        if any(tensor is None for tensor in tensors):
            lacking = ", ".join(part for part, tensor in zip(_PARTS, tensors, strict=True) if tensor is None)
            raise UserError(f"{path} has an incomplete adapter `{adapter}`: {lacking} is missing")
        if adapter not in layers:
            raise UserError(f"{path} does not fit the UNet, which has no layer for the adapter `{adapter}`")
        name, layer = layers[adapter]
        merged[f"{name}.weight"] = layer.weight.float() + _product(*tensors, layer.weight, f"`{adapter}` of {path}").to(
            layer.weight.device
        )
    if loaded:
        raise UserError(f"{path} contains tensors that do not belong to adapters, `{min(loaded)}` first")
    return _replace(unet, merged, path)


def check_other_unet(unet: nn.Module, model_path: str, base_model_path: str) -> None:
    """Raise UserError if SafeGen's `unet` equals the UNet of the original model up to rounding.

    SafeGen is published as a whole pipeline, so no other check shows that its weights were loaded.
    """
    files = fetch(base_model_path, ["unet"], dtype=unet.dtype)
    options = {"subfolder": "unet", "variant": files.variant("unet"), **dtype_option("diffusers", unet.dtype)}
    with loading(f"the UNet of --base_model_path {base_model_path}"):
        base = UNet2DConditionModel.from_pretrained(files.folder, **options).state_dict()
    own = unet.state_dict()
    same_shapes = base.keys() == own.keys() and all(base[name].shape == tensor.shape for name, tensor in own.items())
    if same_shapes and same_weights(base, own):
        raise UserError(f"{model_path} is not SafeGen's pipeline: its UNet equals the one of {base_model_path} up to rounding")


def _adapted_layers(unet: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Return the layers that SPM adapts, and their paths in the UNet, by their name in SPM's files."""
    layers = {}
    for outer, block in unet.named_modules():
        if isinstance(block, Transformer2DModel):
            for inner, layer in block.named_modules():
                if isinstance(layer, (nn.Linear, nn.Conv2d)):
                    path = f"{outer}.{inner}"
                    layers["lora_unet_" + path.replace(".", "_")] = path, layer
    return layers


def _product(down: Tensor, up: Tensor, alpha: Tensor, weight: Tensor, what: str) -> Tensor:
    """Return up * down * alpha / rank in the shape of `weight`, [out, in] or [out, in, height, width], in fp32."""
    rank = down.shape[0] if down.ndim else 0
    fits = (
        rank > 0
        and down.shape[1:] == weight.shape[1:]
        and up.shape[:2] == (weight.shape[0], rank)
        and up[0, 0].numel() == 1
        and alpha.numel() == 1
    )
    if not fits:
        raise UserError(
            f"{what} does not fit its layer: down {tuple(down.shape)}, up {tuple(up.shape)}, layer {tuple(weight.shape)}"
        )
    product = up.float().reshape(-1, rank) @ down.float().reshape(rank, -1)
    return product.reshape(weight.shape) * (alpha.item() / rank)


@torch.no_grad()
def _replace(unet: nn.Module, tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Load tensors into the UNet, cast to its dtype; UserError if none differs from the UNet's by more than rounding."""
    own = unet.state_dict()
    cast = {name: tensor.to(own[name]) for name, tensor in tensors.items()}
    broken = [name for name, tensor in cast.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{path} does not fit into {own[broken[0]].dtype}: `{broken[0]}` overflows; use --dtype bf16 or fp32")
    if same_weights(own, tensors):
        raise UserError(f"{path} does not change the UNet: its weights equal the model's up to rounding")
    unet.load_state_dict(own | cast, strict=True)
    arrived = unet.state_dict()
    if not all(torch.equal(arrived[name], tensor) for name, tensor in cast.items()):
        raise UserError(f"the weights of {path} were not loaded into the UNet")
    return {"file": str(path), "sha256": sha256_file(path), "tensors": len(cast)}
