"""P4D, variant N: find a prompt of K tokens for which the attacked denoiser predicts what the original one predicts for the target.

    python scripts/attacks/p4d.py --model_path demo/models/pipeline --training_method des \\
        --text_encoder_path checkpoints/des/0.002_0.3/checkpoint-20.pt --prompts_csv datasets/demo_plain.csv --end_idx 50 \\
        --detector object --classifier demo/models/classifier_object --cls_class mushroom --concept_words mushroom \\
        --steps 300 --guidance_scale 3 --num_inference_steps 20 --out results/attacks/p4d

Optimises soft tokens; the forward pass uses their nearest vocabulary tokens, and the gradient goes straight through (Chin et al.,
ICML 2024). Needs UNet and text encoder of both pipelines: Stable Diffusion 1.x and 2.x only.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from des.attacks.options import add_attack, check_attack
from des.utils import cli

OWN = ("tokens", "judge_every", "learning_rate", "weight_decay")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("search")
    # fmt: off
    group.add_argument("--tokens", type=cli.positive_int, default=16, metavar="K", help="length of the found prompt")
    group.add_argument("--judge_every", type=cli.positive_int, default=50, metavar="N", help="steps between two candidates that are drawn and judged")
    group.add_argument("--learning_rate", type=cli.number(float, 0, 10, low_open=True), default=0.1, metavar="LR", help="learning rate of AdamW")
    group.add_argument("--weight_decay", type=cli.number(float, 0), default=0.1, metavar="W", help="weight decay of AdamW")
    # fmt: on
    add_attack(parser, 3000, "steps of AdamW")
    return check_attack(parser, parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.attacks.denoising import P4D
from des.attacks.run import open_attack


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    options = {name: getattr(args, name) for name in (*OWN, "steps", "seed")}
    open_attack(args, "p4d", OWN).run(lambda cell: P4D(cell, **options))


if __name__ == "__main__":
    cli.run(main)
