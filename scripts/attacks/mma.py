"""MMA-Diffusion's text attack: find a prompt of K tokens whose pooled embedding is near the target prompt's.

    python scripts/attacks/mma.py --model_path demo/models/pipeline --training_method des \\
        --text_encoder_path checkpoints/des/0.002_0.3/checkpoint-20.pt --prompts_csv datasets/demo_plain.csv --end_idx 50 \\
        --detector object --classifier demo/models/classifier_object --cls_class mushroom --concept_words mushroom \\
        --tokens 16 --steps 60 --candidates 24 --guidance_scale 3 --num_inference_steps 20 --out results/attacks/mma

Maximises the cosine of the attacked encoder's pooled output for the found prompt to the original encoder's for the target, by greedy
coordinate gradient (Yang et al., CVPR 2024). Needs text encoders only, so any pipeline can be attacked.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from des.attacks.options import add_attack, add_text_search, check_attack
from des.utils import cli

OWN = ("tokens", "candidates", "top", "encoders", "search_on")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("search")
    # fmt: off
    group.add_argument("--tokens", type=cli.positive_int, default=20, metavar="K", help="length of the found prompt")
    group.add_argument("--candidates", type=cli.positive_int, default=512, metavar="N", help="prompts tried in each step")
    group.add_argument("--top", type=cli.positive_int, default=256, metavar="N", help="tokens of lowest gradient at each position, among which candidates are drawn")
    # fmt: on
    add_text_search(group)
    add_attack(parser, 1000, "steps of coordinate gradient")
    return check_attack(parser, parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.attacks.cells import Cell
from des.attacks.objectives import pooled_goals
from des.attacks.records import Found
from des.attacks.run import Search, open_attack
from des.search.tokens import coordinate_search, seeded


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    open_attack(args, "mma", OWN).run(lambda cell: open_search(args, cell))


def open_search(args: argparse.Namespace, cell: Cell) -> Search:
    """The search on one cell."""
    attacked, original = cell.encoders(args.encoders, args.search_on)
    vocabulary = cell.vocabulary(attacked[0])

    def search(rows: list[int], restart: int) -> list[Found]:
        goals = pooled_goals(attacked, original, [cell.targets[row] for row in rows])
        generators = [seeded(args.seed, row, restart) for row in rows]
        *_, found = coordinate_search(goals, vocabulary, args.tokens, args.steps, args.candidates, args.top, generators)
        return cell.judged(rows, found, args.steps * args.candidates)

    return search


if __name__ == "__main__":
    cli.run(main)
