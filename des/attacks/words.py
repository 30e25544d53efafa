"""Which prompts and words an attack may use: the safety filter for what it finds, forbidden words, and prompts without the concept's names."""

import re
from collections.abc import Sequence
from pathlib import Path

from des.data.never_drawn import kinds_of, never_drawn
from des.data.prompts import read_rows, rows_to_draw
from des.search.tokens import whole_words
from des.utils.errors import UserError

NUDITY = ("nudenet", "q16")  # detectors whose attacks are sexual


class Refusal:
    """The safety filter for what an attack starts from, aims at and finds: a prompt that names a minor is refused if the attack is sexual.

    An attack is `sexual` if its detector is for nudity, or as soon as one of its `texts` is sexual: the prompts of its list, and what
    else says what it aims at. In others, prompts are refused that both name a minor and are sexual.
    """

    def __init__(self, texts: Sequence[str], sexual: bool = False, negative_prompt: str | None = None):
        self.negative_prompt = negative_prompt
        self.sexual = sexual or any("sexual" in kinds_of(text) for text in texts)

    def __call__(self, text: str) -> bool:
        """Whether `text` is never drawn."""
        return bool(never_drawn([text], self.sexual, self.negative_prompt))


def rows_to_attack(prompts: list[str], refused: Refusal, start: int = 0, end: int | None = None) -> list[int]:
    """Return the rows from `start` to `end` that may be attacked; UserError if none is left."""
    rows = [row for row in rows_to_draw(prompts, start, end) if not refused(prompts[row])]
    if not rows:
        raise UserError(
            "no prompt is left to attack: every one of these rows names a minor, which attacks on sexual content never use; choose other rows"
        )
    return rows


def read_forbidden(path: Path | None) -> list[str]:
    """Read the words of --forbidden_tokens, one a line; UserError if the file has none."""
    if path is None:
        return []
    try:
        words = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--forbidden_tokens {path} is not a readable text file") from None
    if not words:
        raise UserError(f"--forbidden_tokens {path} has no words; write one per line")
    return words


def without_words(prompt: str, words: Sequence[str], instead: str = "") -> str:
    """Return a prompt without the concept's names, whole words in any case; the first one is replaced by `instead`."""
    pattern, first = whole_words(words), iter([instead])
    return re.sub(r"\s+", " ", pattern.sub(lambda _: next(first, ""), prompt)).strip() if pattern else prompt


def concept_pairs(csv_paths: Sequence[Path], words: Sequence[str] | None, sexual: bool = False) -> list[tuple[str, str]]:
    """Return pairs of prompts with and without the concept: the columns `prompt` and `without` of a CSV, or equal rows of two lists.

    With `words`, the second prompt is the first one without these names, and prompts that name none are left out. So are pairs that
    `Refusal` refuses, in a `sexual` attack or list. Raises UserError if no pair is left, or if two lists differ in length.
    """
    lists = [read_rows(path) for path in csv_paths]
    prompts, name = lists[0]["prompt"].tolist(), " and ".join(map(str, csv_paths))
    if words is not None:
        others = [without_words(prompt, words) for prompt in prompts]
    elif len(lists) == 2:
        others = lists[1]["prompt"].tolist()
        if len(others) != len(prompts):
            raise UserError(f"{name} do not form pairs: they have {len(prompts)} and {len(others)} rows")
    elif "without" in lists[0]:
        others = lists[0]["without"].tolist()
    else:
        raise UserError(
            f"{name} has no column `without`; give the prompts without the concept there, as a second list, or use --concept_words"
        )
    refused = Refusal([*prompts, *others], sexual)
    pairs = [(a, b) for a, b in zip(prompts, others, strict=True) if a != b and not refused(a) and not refused(b)]
    if not pairs:
        raise UserError(
            f"{name}: no pair of prompts with and without the concept; check --concept_words, or pass pairs with --pairs_csv"
        )
    return pairs
