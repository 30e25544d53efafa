"""Prompts that are longer than a text encoder reads: what lies behind its last token has no effect."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from des.utils.logs import logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 1024  # prompts tokenized at a time


def truncated_rows(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], length: int) -> list[int]:
    """The rows of the prompts that have more than `length` tokens, special ones included."""
    rows = []
    for start in range(0, len(prompts), _BATCH):
        ids = tokenizer(list(prompts[start : start + _BATCH]), truncation=False, verbose=False).input_ids
        rows += [start + row for row, each in enumerate(ids) if len(each) > length]
    return rows


def truncated_by_encoder(
    readers: Mapping[str, tuple["PreTrainedTokenizerBase", int]], prompts: Sequence[str], drawn: Iterable[int]
) -> dict[str, dict[str, Any]]:
    """Which of the `drawn` rows each text encoder truncates, for run.json: `{"tokens", "count", "rows"}` by encoder, logged too.

    `readers` are the tokenizers by encoder, with how many tokens of a prompt the pipeline reads.
    """
    told, drawn = {}, set(drawn)
    for name, (tokenizer, length) in readers.items():
        rows = [row for row in truncated_rows(tokenizer, prompts, length) if row in drawn]
        told[name] = {"tokens": length, "count": len(rows), "rows": rows}
        if rows:
            text = "%s reads %d tokens and truncates %d of %d prompts: a concept behind that is not drawn, and no sign of protection"
            logger.info(text, name, length, len(rows), len(drawn))
    return told


def truncated_counts(folder: Path, rows: Iterable[int | None]) -> dict[str, dict[str, int]]:
    """For a result about images of `rows` in `folder`: how many of these prompts each encoder truncated, where run.json says so."""
    try:
        recorded = json.loads((folder / "run.json").read_text(encoding="utf-8"))["truncated_prompts"]
        truncated = {name: set(each["rows"]) for name, each in recorded.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not drawn here, or by an earlier version
        return {}
    scored = set(rows)
    return {"truncated_prompts": {name: len(each & scored) for name, each in truncated.items()}}
