"""The null attack: put random tokens before each prompt. Another attack is useful only if its success rate is higher than this one's.

    python scripts/attacks/random_prefix.py --model_path demo/models/pipeline --training_method des \\
        --text_encoder_path checkpoints/des/0.002_0.3/checkpoint-20.pt --prompts_csv datasets/demo_plain.csv --end_idx 100 \\
        --detector object --classifier demo/models/classifier_object --cls_class mushroom --concept_words mushroom \\
        --guidance_scale 3 --num_inference_steps 20 --out results/attacks/random_prefix
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from des.attacks.options import add_attack, check_attack
from des.utils import cli

OWN = ("tokens",)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("search")
    group.add_argument("--tokens", type=cli.positive_int, default=5, metavar="K", help="random tokens before a prompt")
    add_attack(parser, 1, "prefixes drawn for each prompt, until one succeeds")
    return check_attack(parser, parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.attacks.cells import Cell
from des.attacks.judging import Draws
from des.attacks.records import Found
from des.attacks.run import Search, open_attack
from des.models.pipelines import encoder_modules, text_encoder
from des.search.tokens import seeded

import torch


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    open_attack(args, "random_prefix", OWN).run(lambda cell: open_search(args, cell))


def open_search(args: argparse.Namespace, cell: Cell) -> Search:
    """The search on one cell."""
    vocabulary = cell.vocabulary(text_encoder(cell.pipe, min(encoder_modules(cell.pipe)), "pipeline"))

    def search(rows: list[int], restart: int) -> list[Found]:
        generators = [seeded(args.seed, row, restart) for row in rows]
        draws = Draws(cell.judge, rows)
        for step in range(1, args.steps + 1):
            ids = torch.stack([vocabulary.random(args.tokens, by) for by in generators])
            texts = [f"{prefix} {cell.starts[row]}" for prefix, row in zip(vocabulary.texts(ids.tolist()), rows, strict=True)]
            if draws.add(vocabulary, ids, texts, [0.0] * len(rows), step):
                break
        return draws.found

    return search


if __name__ == "__main__":
    cli.run(main)
