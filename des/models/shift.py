"""How far protection moved embeddings. Changed weights alone do not show protection; moved embeddings of the concept indicate it.

Training's summary, loading a checkpoint and scripts/verify.py use one measure: the cosine of E~(p) to E(p), flattened (paper, section
4), of each concept prompt and as a mean over a few neutral ones. A loaded checkpoint is measured in the embedding that it was trained on
and, if the pipeline gives another one to the denoiser, in that as well.
"""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from des.models.checkpoints import load_checkpoint, read_metadata
from des.models.encoders import TextEncoder, as_pipeline_reads
from des.models.families import EMBEDDINGS, Family
from des.models.tensor_files import header_of
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
UNMEASURED = "whether it protects was not measured, because its concept is unknown"
UNPROTECTED = 0.9  # a cosine above it: the embedding hardly moved
_HALF = 0.5  # share of the distance to E(""), to which NEN moves the concept
_ALIKE = 0.8  # share of the concept's distance; neutral prompts beyond it moved like the concept
_FAR = 0.2  # a mean cosine of neutral prompts below it is more than a side effect of protection
_UNMOVED = 0.99999  # a cosine above it is rounding
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
        `each_concept` and `each_concept_to_empty` are the cosines whose means these are, in the order of `concept_prompts`.
        """
        neutral = _cosines(embed(encoder, NEUTRAL), self.neutral).mean().item()
        facts = {"concept": None, "concept_to_empty": None, "neutral": neutral}
        if self.concept is not None:
            moved, empty = _cosines(embed(encoder, self.concepts), self.concept), _cosines(self.empty, self.concept)
            facts |= {"concept": moved.mean().item(), "concept_to_empty": empty.mean().item()}
            facts |= {"each_concept": moved.tolist(), "each_concept_to_empty": empty.tolist()}
        return facts | {"concept_prompts": self.concepts, "neutral_prompts": len(NEUTRAL)}


def _cosines(after: Tensor, before: Tensor) -> Tensor:
    return cosine_similarity(after.flatten(1).float(), before.flatten(1).float())


def _highest(shift: Mapping[str, Any]) -> float:
    """Return the cosine of the concept prompt that moved least; earlier records have the mean only."""
    return max(shift.get("each_concept") or [shift["concept"]])


def describe(shift: Mapping[str, Any]) -> str:
    """Describe a shift in a line."""
    concept, neutral = shift["concept"], f"neutral prompts {shift['neutral']:.4f} ({shift['neutral_prompts']})"
    if concept is None:
        return f"mean cosine to the original embeddings: {neutral}; the concept is unknown, so its shift was not measured"
    among = len(shift["concept_prompts"])
    among = f"{among}, highest {_highest(shift):.4f}" if among > 1 else str(among)
    return f"mean cosine to the original embeddings: concept {concept:.4f} ({among}), {neutral}"


def doubt(shift: Mapping[str, Any]) -> str | None:
    """Return a sentence on why an encoder with this shift may not protect, or None.

    Every concept prompt must have moved, since a mean over several would hide one that did not.
    """
    concept, neutral = shift["concept"], shift["neutral"]
    if not math.isfinite(neutral + (concept or 0)):
        return "its embeddings are not finite"
    if concept is None and neutral > _UNMOVED:
        return "no tested prompt moved, so this may be the original encoder"
    if concept is None and neutral < _FAR:
        return f"neutral prompts moved far (cosine {neutral:.4f} to the originals'), so this encoder may be damaged"
    if concept is None:
        return None
    still = _hardly_moved(shift)
    if still:
        return f"{still} to the original's), so this encoder may not protect"
    if 1 - neutral > _ALIKE * (1 - concept):
        moved = f"neutral prompts moved like the concept (cosines {neutral:.4f} and {concept:.4f} to the originals')"
        return f"{moved}, so this encoder may be damaged rather than protected"
    return None


def _hardly_moved(shift: Mapping[str, Any]) -> str | None:
    """Name the concept prompt that moved least of those that hardly moved, with its cosine; None if all moved."""
    cosines = shift.get("each_concept") or [shift["concept"]]
    to_empty = shift.get("each_concept_to_empty") or [shift["concept_to_empty"]]
    still = [
        (cosine, i)
        for i, (cosine, empty) in enumerate(zip(cosines, to_empty, strict=True))
        if cosine > _UNMOVED or (cosine > UNPROTECTED and 1 - cosine < _HALF * (1 - empty))
    ]
    if not still:
        return None
    cosine, i = max(still)
    whose = (
        f"the embedding of the concept prompt {shift['concept_prompts'][i]!r}"
        if len(cosines) > 1
        else "the concept's embedding"
    )
    return f"{whose} hardly moved (cosine {cosine:.4f}"


def is_unprotected(measured: Mapping[str, Any]) -> bool:
    """Whether `measure`'s result shows no protection: training recorded that, or a concept (if known) did not move at all."""
    cosines = [shift["neutral"] if shift["concept"] is None else _highest(shift) for shift in shifts_of(measured).values()]
    return measured.get("protects") is False or max(cosines) > _UNMOVED


def shifts_of(measured: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the shifts in `measure`'s result by what reads the embeddings: "" as in training, and if it differs the pipeline."""
    found = {"": measured.get("shift"), "as the pipeline reads the encoder, ": measured.get("shift_in_pipeline")}
    return {reader: shift for reader, shift in found.items() if shift}


class Guard:
    """Measures whether other weights of an encoder protect; create it before training or loading changes the encoder."""

    def __init__(self, encoder: TextEncoder, family: Family | None, concepts: Sequence[str] | None):
        """`family` is that of the encoder's pipeline, None for an encoder without one; `concepts` are as in `Before`."""
        self.in_pipeline = as_pipeline_reads(encoder, family)
        self.before = Before(encoder, concepts)
        self.before_in_pipeline = Before(self.in_pipeline, concepts) if self.in_pipeline else None

    def measure(self, encoder: TextEncoder) -> dict[str, Any]:
        """Return `shift`, `shift_in_pipeline` if the pipeline reads another embedding, and `doubt`, a sentence or None.

        If both speak against the encoder, the sentence is about the pipeline's embedding, which decides what is drawn.
        """
        facts = {"shift": self.before.shift(encoder)}
        if self.in_pipeline:
            facts["shift_in_pipeline"] = self.before_in_pipeline.shift(replace(self.in_pipeline, model=encoder.model))
        doubts = [f"{reader}{why}" for reader, shift in shifts_of(facts).items() if (why := doubt(shift))]
        return facts | {"doubt": doubts[-1] if doubts else None}


def measure(encoder: TextEncoder, path: Path, family: Family | None, concepts: Sequence[str] | None = None) -> dict[str, Any]:
    """Load a checkpoint into `encoder` in place and measure how embeddings change.

    The concept prompts are those in the checkpoint's record, or else `concepts`; `family` is as in `Guard`. Returns
    `load_checkpoint`'s result with the record and `Guard.measure`'s result; raises as `load_checkpoint` does.
    """
    known = recorded(path)
    guard = Guard(encoder, family, concepts_of(known) or concepts)
    loaded = load_checkpoint(encoder.model, path)
    measured = guard.measure(encoder)
    if isinstance(known.get("doubt"), str):
        measured["doubt"] = measured["doubt"] or known["doubt"]
    if loaded.get("protects") is False:
        measured["doubt"] = "this encoder does not protect: training ended with unsafe prompts whose embeddings hardly moved"
    return {**known, **loaded, **measured}


def load_measured(encoder: TextEncoder, path: Path, family: Family | None) -> dict[str, Any]:
    """Call `measure`, log the figures, and warn if the encoder may not protect."""
    loaded = measure(encoder, path, family)
    for reader, shift in shifts_of(loaded).items():
        logger.info("%s: %s%s", path, reader, describe(shift))
    if loaded["doubt"]:
        logger.warning("%s: %s", path, loaded["doubt"])
    return loaded


def in_doubt(applied: Mapping[Any, Any]) -> bool:
    """Whether `load_measured` warned for one of several encoders that it may not protect."""
    return any(isinstance(loaded, Mapping) and loaded.get("doubt") for loaded in applied.values())


def is_unmeasured(loaded: Any) -> bool:
    """Whether nothing speaks against an encoder in `measure`'s result, but only because its concept is unknown."""
    shift = loaded.get("shift") if isinstance(loaded, Mapping) else None
    return bool(shift) and shift["concept"] is None and not loaded["doubt"]


def recorded(path: Path) -> dict[str, Any]:
    """Return a checkpoint's metadata or, if there is none, the concept and the doubt in the header of an export's safetensors file."""
    metadata = read_metadata(path)
    if metadata:
        return metadata
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # other programs' headers
        (facts,) = json.loads(header_of(path)["des"]).values()
        return {"concept_prompt": facts["concept"], "doubt": facts.get("doubt")}
    return {}


def concepts_of(metadata: Mapping[str, Any]) -> list[str]:
    """Return the concept prompts in a checkpoint's metadata, possibly none."""
    named = metadata.get("concept_prompt") or []
    named = [named] if isinstance(named, str) else named
    return [each for each in named if isinstance(each, str)] if isinstance(named, list) else []


def embedding_of(path: Path) -> str:
    """Return the embedding that a checkpoint was trained on, one of EMBEDDINGS; the paper's if its metadata lacks it."""
    named = read_metadata(path).get("embedding")
    return named if named in EMBEDDINGS else EMBEDDINGS[0]
