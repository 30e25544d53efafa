"""UnlearnDiffAtk (UDA): find tokens that, added to a prompt, let the attacked pipeline denoise the original pipeline's image of it.

    python scripts/attacks/uda.py --model_path demo/models/pipeline --training_method des \\
        --text_encoder_path checkpoints/des/0.002_0.3/checkpoint-20.pt --prompts_csv datasets/demo_plain.csv --end_idx 50 \\
        --detector object --classifier demo/models/classifier_object --cls_class mushroom --concept_words mushroom \\
        --timesteps 10 --guidance_scale 3 --num_inference_steps 20 --out results/attacks/uda

Optimises a distribution over the vocabulary for each token, projected onto the probability simplex, timestep by timestep (Zhang et
al., ECCV 2024). Needs UNet and text encoder of the attacked pipeline: Stable Diffusion 1.x and 2.x only.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from des.attacks.options import add_attack, check_attack
from des.utils import cli

OWN = ("tokens", "timesteps", "learning_rate", "weight_decay", "place")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("search")
    # fmt: off
    group.add_argument("--tokens", type=cli.positive_int, default=5, metavar="K", help="tokens that are searched")
    group.add_argument("--place", choices=("before", "after"), default="before", help="where they stand: before or after the prompt")
    group.add_argument("--timesteps", type=cli.number(int, 1, 1000), default=50, metavar="N", help="timesteps, evenly spaced in rising order; a candidate is drawn after each")
    group.add_argument("--learning_rate", type=cli.number(float, 0, 1, low_open=True), default=0.01, metavar="LR", help="learning rate of Adam")
    group.add_argument("--weight_decay", type=cli.number(float, 0), default=0.1, metavar="W", help="weight decay of Adam")
    # fmt: on
    add_attack(parser, 40, "steps of Adam at each timestep")
    return check_attack(parser, parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.attacks.denoising import UnlearnDiffAtk
from des.attacks.run import open_attack


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    options = {name: getattr(args, name) for name in (*OWN, "steps", "seed")}
    open_attack(args, "uda", OWN).run(lambda cell: UnlearnDiffAtk(cell, **options))


if __name__ == "__main__":
    cli.run(main)
