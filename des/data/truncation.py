"""Prompts longer than a text encoder reads: the tokens beyond its length have no effect."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from des.utils.logs import logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 1024  # prompts to tokenize at a time


def truncated_rows(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], length: int) -> list[int]:
    """Return the rows of the prompts with more than `length` tokens, including special ones."""
    rows = []
    for start in range(0, len(prompts), _BATCH):
        ids = tokenizer(list(prompts[start : start + _BATCH]), truncation=False, verbose=False).input_ids
        rows += [start + row for row, each in enumerate(ids) if len(each) > length]
    return rows


def truncated_by_encoder(
    readers: Mapping[str, tuple["PreTrainedTokenizerBase", int]], prompts: Sequence[str], drawn: Iterable[int]
) -> dict[str, dict[str, Any]]:
    """Return and log which of the `drawn` rows each text encoder truncates: `{"tokens", "count", "rows"}` by encoder.

    `readers` maps each encoder to its tokenizer and the number of tokens of a prompt that the pipeline reads.
    """
    truncated, drawn = {}, set(drawn)
    for name, (tokenizer, length) in readers.items():
        rows = [row for row in truncated_rows(tokenizer, prompts, length) if row in drawn]
        truncated[name] = {"tokens": length, "count": len(rows), "rows": rows}
        if rows:
            text = "%s reads %d tokens and truncates %d of %d prompts: a concept after that is missing from images without protection"
            logger.info(text, name, length, len(rows), len(drawn))
    return truncated


def truncated_counts(folder: Path, rows: Iterable[int | None]) -> dict[str, dict[str, int]]:
    """Count, for a scorer's result, the prompts of `rows` that each encoder truncated, if run.json in `folder` records it."""
    try:
        recorded = json.loads((folder / "run.json").read_text(encoding="utf-8"))["truncated_prompts"]
        truncated = {name: set(each["rows"]) for name, each in recorded.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not drawn by generate.py, or by an earlier version
        return {}
    scored = set(rows)
    return {"truncated_prompts": {name: len(each & scored) for name, each in truncated.items()}}
