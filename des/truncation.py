"""Prompts that are longer than a text encoder reads: what lies behind its last token has no effect."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_BATCH = 1024  # prompts tokenized at a time


def truncated_rows(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int) -> list[int]:
    """The rows of the prompts that have more than `length` tokens, special ones included."""
    rows = []
    for start in range(0, len(prompts), _BATCH):
        ids = tokenizer(list(prompts[start : start + _BATCH]), truncation=False, verbose=False).input_ids
        rows += [start + row for row, each in enumerate(ids) if len(each) > length]
    return rows
