"""How far protection moved embeddings: other weights are no proof of protection, other embeddings of the concept are a sign of it.

One measure for training's summary, for loading a checkpoint and for scripts/verify.py: the mean cosine of E~(p) to E(p), flattened
as everywhere (paper, section 4), over the concept prompts and over a few neutral ones.
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

NEUTRAL = (  # in words that the demo's encoder knows, too
    "a large yellow ball",
    "a red flower on a meadow",
    "a pink tree on a grey background",
    "a brown umbrella under a starry night sky",
    "a blue box on a sandy beach",
    "a green fish on the left",
)
UNPROTECTED = 0.9  # a mean cosine above it: the embeddings hardly moved
_HALF = 0.5  # of the way to E(""), where NEN sends the concept
_ALIKE = 0.8  # of the concept's way: neutral prompts that went so far moved as the concept did
_FAR = 0.2  # a mean cosine of neutral prompts below it is no side effect of protection
_UNMOVED = 0.99999  # a mean cosine above it is rounding
_LENGTH = 77  # tokens: a T5-XXL on a CPU reads its 512 in minutes, and these prompts have few


@torch.no_grad()
def embed(encoder: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """Embeddings [prompts, rows, hidden] in fp32 on the CPU, of at most 77 tokens, in eval mode."""
    encoder.model.eval()
    short = replace(encoder, length=min(encoder.length, _LENGTH))
    return torch.cat([short(ids).float().cpu() for ids in short.tokenize(list(prompts)).split(16)])


class Before:
    """E of the prompts that the shift is measured on, to be made before training or loading changes the encoder in place."""

    def __init__(self, encoder: TextEncoder, concepts: Sequence[str] | None):
        """`concepts` are the concept prompts, None where they are not known."""
        self.concepts = list(concepts or [])
        self.neutral = embed(encoder, NEUTRAL)
        self.concept = embed(encoder, self.concepts) if self.concepts else None
        self.empty = embed(encoder, [""])

    def shift(self, encoder: TextEncoder) -> dict[str, Any]:
        """The shift to `encoder`, which is E~: mean cosines of E~ to E, None for the concept where its prompts are not known.

        `concept_to_empty` is the mean cosine of E(concept) to E(""), where NEN sends the concept: of some encoders it is close to 1.
        """
        facts = {"concept": None, "concept_to_empty": None, "neutral": _mean_cosine(embed(encoder, NEUTRAL), self.neutral)}
        if self.concept is not None:
            facts["concept"] = _mean_cosine(embed(encoder, self.concepts), self.concept)
            facts["concept_to_empty"] = _mean_cosine(self.empty, self.concept)
        return facts | {"concept_prompts": self.concepts, "neutral_prompts": len(NEUTRAL)}


def _mean_cosine(after: Tensor, before: Tensor) -> float:
    return cosine_similarity(after.flatten(1).float(), before.flatten(1).float()).mean().item()


def describe(shift: Mapping[str, Any]) -> str:
    """The shift in words."""
    concept, neutral = shift["concept"], f"neutral prompts {shift['neutral']:.4f} ({shift['neutral_prompts']})"
    if concept is None:
        return f"mean cosine to the original embeddings: {neutral}; the concept is not known, so its shift was not measured"
    return f"mean cosine to the original embeddings: concept {concept:.4f} ({len(shift['concept_prompts'])}), {neutral}"


def doubt(shift: Mapping[str, Any]) -> str | None:
    """Why an encoder with this shift may protect from nothing, in a sentence; None where nothing speaks against it."""
    concept, neutral = shift["concept"], shift["neutral"]
    if not math.isfinite(neutral + (concept or 0)):
        return "its embeddings are not finite"
    if concept is None and neutral > _UNMOVED:
        return "no prompt that was tried moved, so this may be the original encoder"
    if concept is None and neutral < _FAR:
        return f"neutral prompts moved far (cosine {neutral:.4f} to the originals'), so this encoder may be damaged"
    if concept is None:
        return None
    if concept > UNPROTECTED and 1 - concept < _HALF * (1 - shift["concept_to_empty"]):
        return f"the concept's embedding hardly moved (cosine {concept:.4f} to the original's), so this encoder may not protect"
    if 1 - neutral > _ALIKE * (1 - concept):
        moved = f"neutral prompts moved as the concept did (cosines {neutral:.4f} and {concept:.4f} to the originals')"
        return f"{moved}, so this encoder may be damaged rather than protected"
    return None


def is_unprotected(measured: Mapping[str, Any]) -> bool:
    """Whether what `measure` returned shows no protection: training recorded that, or the concept (if known) did not move at all."""
    shift = measured["shift"]
    cosine = shift["neutral"] if shift["concept"] is None else shift["concept"]
    return measured.get("protects") is False or cosine > _UNMOVED


def measure(encoder: TextEncoder, path: Path, concepts: Sequence[str] | None = None) -> dict[str, Any]:
    """Put a checkpoint into `encoder` in place, and measure what it does to embeddings.

    The concept prompts are those of the checkpoint's metadata, else `concepts`. Returns what `load_checkpoint` says, with `shift`,
    and as `doubt` why the encoder may not protect, or None; raises as `load_checkpoint` does.
    """
    before = Before(encoder, concepts_of(read_metadata(path)) or concepts)
    loaded = load_checkpoint(encoder.model, path)
    shift = before.shift(encoder)
    why = doubt(shift)
    if loaded.get("protects") is False:
        why = "this encoder does not protect: training ended with unsafe prompts whose embeddings hardly moved"
    return {**loaded, "shift": shift, "doubt": why}


def load_measured(encoder: TextEncoder, path: Path) -> dict[str, Any]:
    """`measure`, with its figures in the log, and a warning where the encoder may not protect."""
    loaded = measure(encoder, path)
    logger.info("%s: %s", path, describe(loaded["shift"]))
    if loaded["doubt"]:
        logger.warning("%s: %s", path, loaded["doubt"])
    return loaded


def in_doubt(applied: Mapping[Any, Any]) -> bool:
    """Whether one of several encoders' `load_measured` warned that it may not protect."""
    return any(isinstance(loaded, Mapping) and loaded.get("doubt") for loaded in applied.values())


def concepts_of(metadata: Mapping[str, Any]) -> list[str]:
    """The concept prompts that a checkpoint's metadata names; none where it names none."""
    named = metadata.get("concept_prompt") or []
    named = [named] if isinstance(named, str) else named
    return [each for each in named if isinstance(each, str)] if isinstance(named, list) else []


def embedding_of(path: Path) -> str:
    """Which embedding a checkpoint was trained on, one of `des.models.families.EMBEDDINGS`; the paper's where it does not say."""
    named = read_metadata(path).get("embedding")
    return named if named in EMBEDDINGS else EMBEDDINGS[0]
