"""How far protection moved embeddings. Changed weights alone do not show protection; moved embeddings of the concept indicate it.

Training's summary, loading a checkpoint and scripts/verify.py use one measure: the mean cosine of E~(p) to E(p), flattened (paper,
section 4), over the concept prompts and over a few neutral ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from des.models.checkpoints import load_checkpoint, read_metadata
from des.models.encoders import TextEncoder
from des.models.families import EMBEDDINGS
from des.utils.logs import logger

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

NEUTRAL = (  # in words that the demo's encoder also knows
    "a large yellow ball",
    "a red flower on a meadow",
    "a pink tree on a grey background",
    "a brown umbrella under a starry night sky",
    "a blue box on a sandy beach",
    "a green fish on the left",
)
UNPROTECTED = 0.9  # a mean cosine above it: the embeddings hardly moved
_HALF = 0.5  # share of the distance to E(""), to which NEN moves the concept
_ALIKE = 0.8  # share of the concept's distance; neutral prompts beyond it moved like the concept
_FAR = 0.2  # a mean cosine of neutral prompts below it is more than a side effect of protection
_UNMOVED = 0.99999  # a mean cosine above it is rounding
_LENGTH = 77  # tokens, which suffice for these short prompts; T5-XXL with 512 takes minutes on a CPU


@torch.no_grad()
def embed(encoder: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """Return embeddings [prompts, rows, hidden] of at most 77 tokens in fp32 on the CPU, computed in eval mode."""
    encoder.model.eval()
    short = replace(encoder, length=min(encoder.length, _LENGTH))
    return torch.cat([short(ids).float().cpu() for ids in short.tokenize(list(prompts)).split(16)])


class Before:
    """Original embeddings of the prompts for measuring the shift; create it before training or loading changes the encoder."""

    def __init__(self, encoder: TextEncoder, concepts: Sequence[str] | None):
        """`concepts` are the concept prompts, None if unknown."""
        self.concepts = list(concepts or [])
        self.neutral = embed(encoder, NEUTRAL)
        self.concept = embed(encoder, self.concepts) if self.concepts else None
        self.empty = embed(encoder, [""])

    def shift(self, encoder: TextEncoder) -> dict[str, Any]:
        """Return the mean cosines of `encoder`'s embeddings E~ to the original E; None for the concept if its prompts are unknown.

        `concept_to_empty` is the mean cosine of E(concept) to E(""), to which NEN moves the concept; some encoders have nearly 1.
        """
        facts = {"concept": None, "concept_to_empty": None, "neutral": _mean_cosine(embed(encoder, NEUTRAL), self.neutral)}
        if self.concept is not None:
            facts["concept"] = _mean_cosine(embed(encoder, self.concepts), self.concept)
            facts["concept_to_empty"] = _mean_cosine(self.empty, self.concept)
        return facts | {"concept_prompts": self.concepts, "neutral_prompts": len(NEUTRAL)}


def _mean_cosine(after: Tensor, before: Tensor) -> float:
    return cosine_similarity(after.flatten(1).float(), before.flatten(1).float()).mean().item()


def describe(shift: Mapping[str, Any]) -> str:
    """Describe a shift in a line."""
    concept, neutral = shift["concept"], f"neutral prompts {shift['neutral']:.4f} ({shift['neutral_prompts']})"
    if concept is None:
        return f"mean cosine to the original embeddings: {neutral}; the concept is unknown, so its shift was not measured"
    return f"mean cosine to the original embeddings: concept {concept:.4f} ({len(shift['concept_prompts'])}), {neutral}"


def doubt(shift: Mapping[str, Any]) -> str | None:
    """Return a sentence on why an encoder with this shift may not protect, or None."""
    concept, neutral = shift["concept"], shift["neutral"]
    if not math.isfinite(neutral + (concept or 0)):
        return "its embeddings are not finite"
    if concept is None and neutral > _UNMOVED:
        return "no tested prompt moved, so this may be the original encoder"
    if concept is None and neutral < _FAR:
        return f"neutral prompts moved far (cosine {neutral:.4f} to the originals'), so this encoder may be damaged"
    if concept is None:
        return None
    if concept > UNPROTECTED and 1 - concept < _HALF * (1 - shift["concept_to_empty"]):
        return f"the concept's embedding hardly moved (cosine {concept:.4f} to the original's), so this encoder may not protect"
    if 1 - neutral > _ALIKE * (1 - concept):
        moved = f"neutral prompts moved like the concept (cosines {neutral:.4f} and {concept:.4f} to the originals')"
        return f"{moved}, so this encoder may be damaged rather than protected"
    return None


def is_unprotected(measured: Mapping[str, Any]) -> bool:
    """Whether `measure`'s result shows no protection: training recorded that, or the concept (if known) did not move at all."""
    shift = measured["shift"]
    cosine = shift["neutral"] if shift["concept"] is None else shift["concept"]
    return measured.get("protects") is False or cosine > _UNMOVED


def measure(encoder: TextEncoder, path: Path, concepts: Sequence[str] | None = None) -> dict[str, Any]:
    """Load a checkpoint into `encoder` in place and measure how embeddings change.

    The concept prompts are those in the checkpoint's metadata, or else `concepts`. Returns `load_checkpoint`'s result with `shift`
    and `doubt`, the reason why the encoder may not protect, or None; raises as `load_checkpoint` does.
    """
    before = Before(encoder, concepts_of(read_metadata(path)) or concepts)
    loaded = load_checkpoint(encoder.model, path)
    shift = before.shift(encoder)
    why = doubt(shift)
    if loaded.get("protects") is False:
        why = "this encoder does not protect: training ended with unsafe prompts whose embeddings hardly moved"
    return {**loaded, "shift": shift, "doubt": why}


def load_measured(encoder: TextEncoder, path: Path) -> dict[str, Any]:
    """Call `measure`, log the figures, and warn if the encoder may not protect."""
    loaded = measure(encoder, path)
    logger.info("%s: %s", path, describe(loaded["shift"]))
    if loaded["doubt"]:
        logger.warning("%s: %s", path, loaded["doubt"])
    return loaded


def in_doubt(applied: Mapping[Any, Any]) -> bool:
    """Whether `load_measured` warned for one of several encoders that it may not protect."""
    return any(isinstance(loaded, Mapping) and loaded.get("doubt") for loaded in applied.values())


def concepts_of(metadata: Mapping[str, Any]) -> list[str]:
    """Return the concept prompts in a checkpoint's metadata, possibly none."""
    named = metadata.get("concept_prompt") or []
    named = [named] if isinstance(named, str) else named
    return [each for each in named if isinstance(each, str)] if isinstance(named, list) else []


def embedding_of(path: Path) -> str:
    """Return the embedding that a checkpoint was trained on, one of EMBEDDINGS; the paper's if its metadata lacks it."""
    named = read_metadata(path).get("embedding")
    return named if named in EMBEDDINGS else EMBEDDINGS[0]
