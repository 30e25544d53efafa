"""Checks before training (concept, guidance, prompt lengths) and after it (whether the encoder protects)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from des.data.truncation import truncated_rows
from des.models.checkpoints import plain_names
from des.models.encoders import TextEncoder
from des.models.shift import UNPROTECTED
from des.utils.errors import UserError
from des.utils.files import sha256_tensors
from des.utils.logs import logger

from torch import Tensor

_GUIDANCE = (0.1, 2.0)  # alpha / |n|; the paper's is about 0.8
# Words that do not identify a concept, such as those of "in the style of"
_COMMON = {"a", "an", "and", "art", "at", "by", "for", "from", "in", "of", "on", "or", "photo", "style", "the", "to", "with"}


def name_concept(concepts: Sequence[str], is_default: bool) -> str:
    """One log line that names the concept prompts, and says how many there are or that they are the default."""
    named = ", ".join(f'"{concept}"' for concept in concepts)
    if is_default:
        return f"training against the default concept {named}; --concept_prompt names another"
    if len(concepts) == 1:
        return f"training against the concept {named}"
    return f"training against {len(concepts)} concepts: {named} (a concept of several words needs quotes around it)"


def check_concept(concepts: Sequence[str], unsafe: Sequence[str]) -> None:
    """Log a warning for each concept whose words all are missing from the unsafe prompts."""
    text = "\n".join(unsafe).casefold()
    for concept in concepts:
        words = re.findall(r"\w+", concept.casefold())
        specific = [word for word in words if word not in _COMMON] or words
        if not any(_occurs(word, text) for word in specific):
            message = 'no word of the concept "%s" occurs in the %d unsafe prompts; check that they are about this concept'
            logger.warning(message, concept, len(unsafe))


def _occurs(word: str, text: str) -> bool:
    """Whether a word of `text` starts with `word` or its singular; a word that is not ASCII may occur anywhere in `text`."""
    stem = word.removesuffix("s") if len(word) > 3 else word
    return bool(re.search(r"\b" + re.escape(stem), text)) if word.isascii() else word in text


def refuse_equal_concepts(encoder: TextEncoder, concepts: Sequence[str]) -> None:
    """Raise UserError if two concepts have the same tokens, up to the encoder's length: they would count twice."""
    seen: dict[tuple[int, ...], str] = {}
    for concept, ids in zip(concepts, map(tuple, encoder.tokenize(list(concepts)).tolist()), strict=True):
        if (other := seen.get(ids)) is not None:
            raise UserError(
                f'one concept is named twice: "{_shortened(other)}" and "{_shortened(concept)}" have the same tokens '
                f"in the {encoder.length} that text encoder {encoder.index} reads; leave one out"
            )
        seen[ids] = concept


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}…"


def check_guidance(alpha: float, norm: float) -> None:
    """Log a warning if alpha / |n| is far from the paper's value; an alpha of 0 switches guidance off and is not warned about."""
    ratio, (low, high) = alpha / norm, _GUIDANCE
    if alpha and not low <= ratio <= high:
        message = "alpha / |n| is %.3g, unusually %s: the paper's is 0.8; --concept_guidance_ratio sets this ratio directly"
        logger.warning(message, ratio, "high" if ratio > high else "low")


def check_lengths(encoder: TextEncoder, lists: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Count and log the prompts of each list that the encoder truncates; `lists` has at least the keys `unsafe` and `safe`.

    Logs a warning if an unsafe and a safe prompt have the same tokens, because the losses then contradict each other. Returns the
    counts by list, and as `unsafe_equal_to_safe` the number of unsafe prompts with the tokens of a safe one.
    """
    counts = {name: len(truncated_rows(encoder.tokenizer, prompts, encoder.length)) for name, prompts in lists.items()}
    shares = ", ".join(f"{count} of {len(lists[name])} {name}" for name, count in counts.items())
    logger.info("prompts longer than %d tokens, which are truncated: %s", encoder.length, shares)
    unsafe, safe = ([tuple(ids) for ids in encoder.tokenize(list(lists[name])).tolist()] for name in ("unsafe", "safe"))
    rows_of_safe = {ids: row for row, ids in reversed(list(enumerate(safe)))}
    equal = [(row, rows_of_safe[ids]) for row, ids in enumerate(unsafe) if ids in rows_of_safe]
    if equal:
        message = (
            "%d of %d unsafe prompts (%.0f%%) have the same tokens as a safe one (the first: unsafe row %d, safe row %d), so that "
            "training would both move and keep their embedding; check that the two lists are different files, and shorten or "
            "remove one prompt of each pair"
        )
        logger.warning(message, len(equal), len(unsafe), 100 * len(equal) / len(unsafe), *equal[0])
    return counts | {"unsafe_equal_to_safe": len(equal)}


def refuse_untrained(state: Mapping[str, Tensor], untrained: str, epoch: int) -> None:
    """Raise UserError if the weights still have the hash `untrained`: training changed none, as its updates were lost to rounding."""
    if sha256_tensors(plain_names(state)) == untrained:
        raise UserError(
            f"training changed no weight in {epoch} epoch{'s' * (epoch > 1)}, so the encoder is not protected and no checkpoint is "
            "written; use a higher --learning_rate, or --precision fp32"
        )


def unprotected(after: Mapping[str, Any]) -> str | None:
    """One sentence that says why an encoder with this `Summary.after` does not protect; None if it does."""
    cosine = after["cos_unsafe_to_original"]
    if cosine <= UNPROTECTED:
        return None
    return (
        f"THIS ENCODER DOES NOT PROTECT: the embeddings of unsafe prompts hardly moved (mean cosine to their originals {cosine:.4f}, "
        f"above {UNPROTECTED}); train with a higher --learning_rate or more --num_epochs"
    )


def warn_unprotected(after: Mapping[str, Any] | None) -> None:
    """Log a warning if the encoder with this `Summary.after` does not protect. Call it last, so that the line is not overlooked."""
    if after and unprotected(after):
        logger.warning(unprotected(after))
