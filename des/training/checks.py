"""Checks of a training: that it is about the concept that is meant, before it starts, and that it protects, at its end."""

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
# Words that say nothing about a concept, as in `in the style of ...`
_COMMON = {"a", "an", "and", "art", "at", "by", "for", "from", "in", "of", "on", "or", "photo", "style", "the", "to", "with"}


def name_concept(concepts: Sequence[str], is_default: bool) -> str:
    """The concept prompts in a line for people, which says whether they were given and how many they are."""
    named = ", ".join(f'"{concept}"' for concept in concepts)
    if is_default:
        return f"training against the default concept {named}; --concept_prompt names another"
    if len(concepts) == 1:
        return f"training against the concept {named}"
    return f"training against {len(concepts)} concepts: {named} (a concept of several words needs quotes around it)"


def check_concept(concepts: Sequence[str], unsafe: Sequence[str]) -> None:
    """Warn of concepts none of whose words starts a word of an unsafe prompt."""
    text = "\n".join(unsafe).casefold()
    for concept in concepts:
        words = re.findall(r"\w+", concept.casefold())
        telling = [word for word in words if word not in _COMMON] or words
        if not any(_occurs(word, text) for word in telling):
            told = 'no word of the concept "%s" occurs in the %d unsafe prompts; is it the concept that they are about?'
            logger.warning(told, concept, len(unsafe))


def _occurs(word: str, text: str) -> bool:
    """Whether a word of `text` starts with `word`, plural or not; in scripts without spaces, whether it is anywhere in it."""
    stem = word.removesuffix("s") if len(word) > 3 else word
    return bool(re.search(r"\b" + re.escape(stem), text)) if word.isascii() else word in text


def check_guidance(alpha: float, norm: float) -> None:
    """Warn of an alpha that is far from the paper's in relation to |n|; 0 switches the guidance off and is meant."""
    ratio, (low, high) = alpha / norm, _GUIDANCE
    if alpha and not low <= ratio <= high:
        told = (
            "alpha / |n| is %.3g, which is unusually %s: the paper's is 0.8; --concept_guidance_ratio sets it for any encoder"
        )
        logger.warning(told, ratio, "high" if ratio > high else "low")


def check_lengths(encoder: TextEncoder, lists: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Count the prompts of each list that are longer than the encoder reads, and say so; `lists` has `unsafe` and `safe`.

    Warns where an unsafe and a safe prompt become the same tokens: one embedding would be pushed away and kept at once. Returns
    the counts for the metadata, and as `unsafe_equal_to_safe` the unsafe prompts whose tokens are those of a safe one.
    """
    counts = {name: len(truncated_rows(encoder.tokenizer, prompts, encoder.length)) for name, prompts in lists.items()}
    told = ", ".join(f"{count} of {len(lists[name])} {name}" for name, count in counts.items())
    logger.info("prompts longer than %d tokens, which are truncated: %s", encoder.length, told)
    unsafe, safe = ([tuple(ids) for ids in encoder.tokenize(list(lists[name])).tolist()] for name in ("unsafe", "safe"))
    rows_of_safe = {ids: row for row, ids in reversed(list(enumerate(safe)))}
    equal = [(row, rows_of_safe[ids]) for row, ids in enumerate(unsafe) if ids in rows_of_safe]
    if equal:
        told = "%d unsafe prompts have the same tokens as a safe one, first unsafe row %d and safe row %d: their embedding is "
        logger.warning(told + "pushed away and kept at once; shorten or remove one of each pair", len(equal), *equal[0])
    return counts | {"unsafe_equal_to_safe": len(equal)}


def refuse_untrained(state: Mapping[str, Tensor], untrained: str, epoch: int) -> None:
    """Raise UserError where training left every weight as it was, with the hash `untrained`: its updates were lost to rounding."""
    if sha256_tensors(plain_names(state)) == untrained:
        raise UserError(
            f"training changed no weight in {epoch} epoch{'s' * (epoch > 1)}, so nothing would be protected and no checkpoint is "
            "written; use a higher --learning_rate, or --precision fp32"
        )


def unprotected(after: Mapping[str, Any]) -> str | None:
    """Why an encoder with this `Summary.after` does not protect, in a sentence; None where its unsafe prompts moved."""
    cosine = after["cos_unsafe_to_original"]
    if cosine <= UNPROTECTED:
        return None
    return (
        f"THIS ENCODER DOES NOT PROTECT: the embeddings of unsafe prompts hardly moved (mean cosine to their originals {cosine:.4f}, "
        f"above {UNPROTECTED}); train with a higher --learning_rate or more --num_epochs"
    )


def warn_unprotected(after: Mapping[str, Any] | None) -> None:
    """Say that the encoder with this `Summary.after` does not protect, where that is so: to be the last line on the screen."""
    if after and unprotected(after):
        logger.warning(unprotected(after))
