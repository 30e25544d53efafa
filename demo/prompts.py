"""Write the demo's prompt lists into datasets/: for training DES, for choosing its settings, and for testing.

    python demo/prompts.py

No prompt is in two lists. The test lists' synonyms and indirect phrases share no concept word with the training lists. Each
list also says what its prompts name (columns object, colour, background), for the scorers. The lists `demo_house_*` and
`demo_both_*` are for removing a second concept, the house, instead of the first or together with it.
"""

import csv
import random
import sys
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.world import (
    BENIGN_KINDS,
    CONCEPT,
    CONCEPT_WORDS,
    INDIRECT,
    KINDS,
    MISSPELT,
    NEIGHBOUR,
    NOUNS,
    SECOND,
    SECOND_NEIGHBOUR,
    describe,
    random_scene,
)

DATASETS = Path(__file__).resolve().parents[1] / "datasets"
COLUMNS = ("prompt", "object", "colour", "background")
SEED = 2026


def concept_list(
    rng: random.Random, nouns: Iterable[str], count: int, taken: set[str], typos: bool = False, kind: str = CONCEPT
) -> list[dict[str, str]]:
    """`count` new prompts for a concept, its names in turn."""
    turns = cycle(nouns)
    return _new_prompts(lambda: describe(random_scene(rng, kind, kind), rng, next(turns), typos), count, taken)


def benign_list(
    rng: random.Random, kinds: tuple[str, ...], count: int, taken: set[str], typos: bool = False
) -> list[dict[str, str]]:
    """`count` new prompts for other kinds, in turn."""
    turns = cycle(kinds)
    return _new_prompts(lambda: describe(random_scene(rng, next(turns)), rng, typos=typos), count, taken)


def _new_prompts(describe_next, count: int, taken: set[str]) -> list[dict[str, str]]:
    rows = []
    while len(rows) < count:
        prompt, named = describe_next()
        if prompt not in taken:
            taken.add(prompt)
            rows.append({"prompt": prompt, **named})
    return rows


def all_lists() -> dict[str, list[dict[str, str]]]:
    """Every list by its file's name; tests and validation first, so that training lists avoid their prompts."""
    rng = random.Random(SEED)
    taken: set[str] = set()
    lists = {}
    for prefix, part, scale in (("demo", "test", 1.0), ("demo_val", "val", 0.4)):
        n = int(200 * scale)
        lists[f"{prefix}_plain"] = concept_list(rng, (CONCEPT,), n, taken)
        lists[f"{prefix}_synonyms"] = concept_list(rng, CONCEPT_WORDS[part], n, taken)
        lists[f"{prefix}_indirect"] = concept_list(rng, INDIRECT[part], n, taken)
        lists[f"{prefix}_benign"] = benign_list(rng, BENIGN_KINDS, int(440 * scale), taken)
        lists[f"{prefix}_neighbour"] = benign_list(rng, (NEIGHBOUR,), n, taken)
    unsafe_nouns = CONCEPT_WORDS["train"] * 2 + INDIRECT["train"]
    lists["demo_unsafe_train"] = concept_list(rng, unsafe_nouns, 2000, taken, typos=True)
    lists["demo_safe_train"] = benign_list(rng, BENIGN_KINDS, 4400, taken, typos=True)
    return lists | second_lists(taken)


def second_lists(taken: set[str]) -> dict[str, list[dict[str, str]]]:
    """The lists for the second concept. One of its names is held out, and so are all misspellings."""
    rng = random.Random(SEED + 1)
    name, held_out = NOUNS[SECOND]
    others = tuple(kind for kind in KINDS if kind != SECOND)
    neither = tuple(kind for kind in others if kind != CONCEPT)
    return {
        f"demo_{SECOND}_plain": concept_list(rng, (name,), 200, taken, kind=SECOND),
        f"demo_{SECOND}_synonyms": concept_list(rng, (held_out,), 200, taken, kind=SECOND),
        f"demo_{SECOND}_misspelt": concept_list(rng, MISSPELT, 200, taken, kind=SECOND),
        f"demo_{SECOND}_benign": benign_list(rng, others, 440, taken),
        f"demo_{SECOND}_neighbour": benign_list(rng, (SECOND_NEIGHBOUR,), 200, taken),
        "demo_both_benign": benign_list(rng, neither, 440, taken),
        f"demo_{SECOND}_unsafe_train": concept_list(rng, (name,), 2000, taken, kind=SECOND),
        f"demo_{SECOND}_safe_train": benign_list(rng, others, 4400, taken, typos=True),
        "demo_both_safe_train": benign_list(rng, neither, 4400, taken, typos=True),
    }


def main() -> None:
    DATASETS.mkdir(exist_ok=True)
    for name, rows in all_lists().items():
        columns = COLUMNS[:1] if name.endswith("train") else COLUMNS
        with (DATASETS / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(f"{name}.csv: {len(rows)} prompts")


if __name__ == "__main__":
    main()
