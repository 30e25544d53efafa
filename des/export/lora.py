"""A low-rank approximation (LoRA) of the change of CLIP text encoders by protection, for `pipe.load_lora_weights`.

The LoRA approximates W_protected - W_original of the Linear weights of attention and MLP at a given rank. It omits the trained
biases, norms and embeddings; `measure` computes how far its embeddings are from the protected ones.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from des.models.checkpoints import plain_names
from des.models.encoders import TextEncoder
from des.models.loading import loading
from des.models.pipelines import open_pipeline
from des.utils.errors import UserError

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

NAME = "pytorch_lora_weights.safetensors"  # the file that load_lora_weights looks for
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def low_rank(original: nn.Module, protected: nn.Module, rank: int) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Return a truncated SVD of each target's change: by layer, up [out, rank] and down [rank, in] with up @ down ~ change, in fp32.

    Also returns the LoRA's share of the squared change of all parameters. `rank` is limited to each layer's size.
    """
    before, after = plain_names(original.state_dict()), plain_names(protected.state_dict())
    factors, held = {}, 0.0
    for name, weight in after.items():
        layer = name.removesuffix(".weight")
        if weight.ndim != 2 or not name.endswith(".weight") or layer.rsplit(".", 1)[-1] not in TARGETS:
            continue
        u, s, vh = torch.linalg.svd(weight.float() - before[name].float(), full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
        factors[layer] = ((u * s.sqrt()).contiguous(), (s.sqrt()[:, None] * vh).contiguous())
        held += s.cpu().double().square().sum().item()
    total = sum((after[name].cpu().double() - before[name].cpu().double()).square().sum().item() for name in after)
    return factors, held / total


def merged(original: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """Return a copy of the original encoder with the LoRA merged into its weights."""
    model = copy.deepcopy(original)
    layers = {name.removeprefix("text_model."): module for name, module in model.named_modules()}
    with torch.no_grad():
        for layer, (up, down) in factors.items():
            layers[layer].weight += (up.float() @ down.float()).to(layers[layer].weight.dtype)
    return model


def write(folder: Path, factors: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]], metadata: dict[str, str]) -> None:
    """Write a LoRA of one or more encoders, by subfolder, with peft's names, where B @ A is added with scale alpha / rank = 1.

    `metadata` is that of the file (`des.export.formats.Export.metadata`).
    """
    folder.mkdir()
    named = {}
    for subfolder, layers in factors.items():
        for layer, (up, down) in layers.items():
            stem = f"{subfolder}.text_model.{layer}"
            named |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    save_file(named, folder / NAME, metadata)


def read(model_path: str, folder: Path, subfolders: Mapping[int, str], variant: str | None = None) -> dict[int, nn.Module]:
    """Return these encoders of the original pipeline in fp32 after loading and fusing the LoRA as the model card describes."""
    pipe = open_pipeline(model_path, torch.float32, variant=variant)
    with loading("the exported LoRA"):
        pipe.load_lora_weights(folder, weight_name=NAME)
        pipe.fuse_lora(components=list(subfolders.values()))
        pipe.unload_lora_weights()
    return {i: getattr(pipe, subfolder) for i, subfolder in subfolders.items()}


def measure(
    original: TextEncoder, protected: TextEncoder, approximate: TextEncoder, prompts: list[str], batch_size: int = 8
) -> dict[str, Any]:
    """Measure how far embeddings of the encoder with a LoRA, `approximate`, are from the protected one's.

    All three are read as the checkpoint was trained. Returns means over prompts of cosines, `lora_to_protected` (with its lowest),
    `lora_to_original` and `protected_to_original`, and `missing`, |E_lora - E_protected| / |E_protected - E_original|: 0 is full
    protection, 1 none.
    Raises UserError if full protection moves no prompt.
    """
    encoders = (approximate, protected, original)
    cosines, missing, moved = [], 0.0, 0.0
    for batches in zip(*(encoder.encode(prompts, batch_size) for encoder in encoders), strict=True):
        ours, full, plain = (batch.cpu().double().flatten(1) for batch in batches)  # MPS has no float64
        cosines.append(torch.stack([torch.cosine_similarity(*pair) for pair in ((ours, full), (ours, plain), (full, plain))]))
        missing += (ours - full).norm(dim=1).sum().item()
        moved += (full - plain).norm(dim=1).sum().item()
    if moved == 0:
        raise UserError(
            "protection changes no embedding of the prompts used to measure the LoRA; pass others with --prompts_csv"
        )
    to_protected, to_original, full_to_original = torch.cat(cosines, 1)
    return {
        "prompts": len(prompts),
        "lora_to_protected": to_protected.mean().item(),
        "lora_to_protected_lowest": to_protected.min().item(),
        "lora_to_original": to_original.mean().item(),
        "protected_to_original": full_to_original.mean().item(),
        "missing": missing / moved,
    }


def describe(index: int, rank: int, held: float, figures: Mapping[str, Any]) -> str:
    """Describe the loss of protection of a LoRA in two lines."""
    return (
        f"text encoder {index}, rank {rank}: {100 * held:.2f}% of the squared change of the weights is in the LoRA\n"
        f"  over {figures['prompts']} prompts: cosine to the protected embedding {figures['lora_to_protected']:.4f} "
        f"(lowest {figures['lora_to_protected_lowest']:.4f}); to the original {figures['lora_to_original']:.4f}, full protection "
        f"{figures['protected_to_original']:.4f}; {100 * figures['missing']:.1f}% of the way to the protected embedding is missing"
    )
