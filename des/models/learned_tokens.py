"""Learned input embeddings as new tokens of a pipeline's tokenizers and text encoders, and their files.

A file is a safetensors file with one tensor [tokens, hidden] per text encoder, named by its subfolder. Its metadata hold the names
of the tokens and the fingerprint of each encoder for which they were learned; loading into any other encoder is refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from des.data.never_drawn import PLACEHOLDER
from des.models.checkpoints import fingerprint, read_tensors
from des.models.loading import loading
from des.models.pipelines import encoder_modules, text_encoder
from des.utils.errors import UserError
from des.utils.files import replacing, sha256_file

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AddedToken

_FORMAT = "des-learned-tokens-1"


def placeholders(restart: int, count: int) -> list[str]:
    """Return the names of the tokens that one restart of an attack learns: `<learned-{restart}-0>`, ..."""
    return [f"<learned-{restart}-{i}>" for i in range(count)]


def encoder_names(pipe: DiffusionPipeline) -> dict[str, int]:
    """Return the 1-based index of each text encoder of a pipeline by its subfolder."""
    return {text_encoder(pipe, i).subfolder: i for i in encoder_modules(pipe)}


@torch.no_grad()
def set_tokens(pipe: DiffusionPipeline, names: list[str], vectors: Mapping[str, Tensor] | None = None) -> dict[str, list[int]]:
    """Add tokens to all tokenizers and text encoders of a pipeline, or give existing learned tokens new vectors.

    `vectors` has [tokens, hidden] by subfolder; encoders without an entry get the mean embedding of their vocabulary, which carries
    no concept. Returns the ids of the tokens by subfolder.
    """
    ids = {}
    for subfolder, index in encoder_names(pipe).items():
        encoder = text_encoder(pipe, index)
        table = encoder.model.get_input_embeddings().weight
        mean = table.float().mean(0)
        encoder.tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
        ids[subfolder] = encoder.tokenizer.convert_tokens_to_ids(names)
        if max(ids[subfolder]) >= len(table):
            encoder.model.resize_token_embeddings(max(ids[subfolder]) + 1, mean_resizing=False)
        for module in encoder.model.modules():
            if getattr(module, "eos_token_id", None) == 2:  # CLIP then looks for the highest id, which may be a new token's
                module.eos_token_id = encoder.tokenizer.eos_token_id
        new = (vectors or {}).get(subfolder, mean.expand(len(names), -1))
        table = encoder.model.get_input_embeddings().weight.requires_grad_(False)
        table[torch.tensor(ids[subfolder], device=table.device)] = new.to(table)
    return ids


def save_learned_tokens(
    path: Path, names: list[str], vectors: Mapping[str, Tensor], encoders: Mapping[str, str], notes: Mapping[str, Any]
) -> None:
    """Write tokens atomically: vectors [tokens, hidden] and fingerprints of the encoders by subfolder, and `notes` of the attack."""
    metadata = {
        "format": _FORMAT,
        "tokens": json.dumps(names),
        "encoders": json.dumps(dict(encoders)),
        "notes": json.dumps(dict(notes)),
    }
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in vectors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def read_learned_tokens(path: Path) -> tuple[list[str], dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Read a file of `save_learned_tokens`: names, vectors, fingerprints and notes. Raises UserError for any other file."""
    if not path.is_file() or path.suffix != ".safetensors":
        raise UserError(f"{path} is not a file of learned tokens; concept_inversion.py writes them as .safetensors")
    with loading(f"the learned tokens {path}"), safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    vectors = read_tensors(path)
    try:
        names, encoders, notes = (json.loads(metadata[key]) for key in ("tokens", "encoders", "notes"))
        fits = metadata["format"] == _FORMAT and vectors.keys() == encoders.keys() and all(map(PLACEHOLDER.fullmatch, names))
        fits = fits and names and all(tensor.ndim == 2 and len(tensor) == len(names) for tensor in vectors.values())
    except (KeyError, ValueError, TypeError):
        fits = False
    if not fits:
        raise UserError(f"{path} is not a file of learned tokens; concept_inversion.py writes them")
    return names, vectors, encoders, notes


def load_learned_tokens(pipe: DiffusionPipeline, path: Path) -> dict[str, str | list[str]]:
    """Load a file's tokens into a pipeline, after its defence; returns the file, its sha256 and the names of the tokens.

    Raises UserError, and changes nothing, if an encoder differs from the one for which the tokens were learned.
    """
    names, vectors, encoders, _ = read_learned_tokens(path)
    own = encoder_names(pipe)
    if own.keys() != encoders.keys():
        raise UserError(f"{path} has tokens for {', '.join(sorted(encoders))}, but the pipeline has {', '.join(own)}")
    for subfolder, digest in encoders.items():
        if fingerprint(encoder_modules(pipe)[own[subfolder]]) != digest:
            raise UserError(
                f"{path} was learned for another {subfolder}; use the same --model_path, protected encoder and --dtype as the attack"
            )
    set_tokens(pipe, names, vectors)
    return {"file": str(path), "sha256": sha256_file(path), "tokens": names}
