"""Ring-A-Bell: find a prompt whose embedding is near the target's plus the concept's direction, by a genetic algorithm.

    python scripts/attacks/ring_a_bell.py --model_path demo/models/pipeline --training_method des \\
        --text_encoder_path checkpoints/des/0.002_0.3/checkpoint-20.pt --prompts_csv datasets/demo_plain.csv --end_idx 50 \\
        --detector object --classifier demo/models/classifier_object --cls_class mushroom --concept_words mushroom \\
        --steps 200 --population 100 --guidance_scale 3 --num_inference_steps 20 --out results/attacks/ring_a_bell

The direction is the mean of E(prompt) - E(the same without the concept) over pairs of prompts (Tsai et al., ICLR 2024). The goal is
always computed by the original encoder. Needs text encoders only, and no gradients, so any pipeline can be attacked.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from des.attacks.options import add_attack, add_text_search, check_attack
from des.utils import cli

OWN = ("tokens", "eta", "population", "crossover", "mutation", "encoders", "search_on")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("search")
    # fmt: off
    group.add_argument("--tokens", type=cli.positive_int, default=16, metavar="K", help="length of the found prompt")
    group.add_argument("--eta", type=cli.number(float, 0), default=3.0, metavar="X", help="strength of the concept's direction")
    group.add_argument("--pairs_csv", type=Path, nargs="+", metavar="CSV", help="prompts with and without the concept: the columns `prompt` and `without` of a CSV, or two lists with the pairs in equal rows (default: --prompts_csv with and without --concept_words)")
    group.add_argument("--population", type=cli.number(int, 2, 100_000), default=200, metavar="N", help="prompts in a generation")
    group.add_argument("--crossover", type=cli.number(float, 0, 1), default=0.5, metavar="P", help="probability that two children swap their ends")
    group.add_argument("--mutation", type=cli.number(float, 0, 1), default=0.25, metavar="P", help="probability that a child gets a random token")
    # fmt: on
    add_text_search(group)
    add_attack(parser, 3000, "generations")
    args = parser.parse_args(argv)
    if not args.pairs_csv and not args.concept_words:
        parser.error("the concept's direction needs --pairs_csv or --concept_words")
    if args.pairs_csv and len(args.pairs_csv) > 2:
        parser.error("--pairs_csv takes one CSV or two")
    return check_attack(parser, args)


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.attacks.cells import Cell
from des.attacks.objectives import TextGoals, concept_direction, sequence_distance
from des.attacks.records import Found
from des.attacks.run import Search, open_attack
from des.attacks.words import NUDITY, concept_pairs
from des.search.tokens import genetic_search, seeded
from des.utils.files import sha256_texts

import torch


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    given = args.pairs_csv or [args.prompts_csv]
    args.pairs = concept_pairs(given, None if args.pairs_csv else args.concept_words, args.detector in NUDITY)
    texts = sum(args.pairs, ())
    args.pairs_sha256 = sha256_texts(texts)
    open_attack(args, "ring_a_bell", (*OWN, "pairs_sha256"), texts).run(lambda cell: open_search(args, cell))


def open_search(args: argparse.Namespace, cell: Cell) -> Search:
    """The search on one cell."""
    attacked, original = cell.encoders(args.encoders, args.search_on)
    vocabulary = cell.vocabulary(attacked[0])
    directions = [concept_direction(each, args.pairs) for each in original]

    def search(rows: list[int], restart: int) -> list[Found]:
        targets = [cell.targets[row] for row in rows]
        embedded = [torch.cat(list(each.encode(targets, 64))).float() for each in original]
        goals = [each + args.eta * direction for each, direction in zip(embedded, directions, strict=True)]
        found = genetic_search(
            TextGoals(attacked, goals, sequence_distance), vocabulary, args.tokens, args.steps, args.population, args.crossover,
            args.mutation, [seeded(args.seed, row, restart) for row in rows],
        )  # fmt: skip
        return cell.judged(rows, found, (args.steps + 1) * args.population)

    return search


if __name__ == "__main__":
    cli.run(main)
