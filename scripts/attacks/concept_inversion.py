"""Concept inversion (CCE): learn new input embeddings that make the attacked pipeline draw the concept, one set for all prompts.

    python scripts/attacks/concept_inversion.py --model_path demo/models/pipeline --training_method des \\
        --text_encoder_path checkpoints/des/0.002_0.3/checkpoint-20.pt --prompts_csv datasets/demo_plain.csv --end_idx 100 \\
        --detector object --classifier demo/models/classifier_object --cls_class mushroom --concept_words mushroom \\
        --steps 350 --train_batch_size 8 --accumulation 1 --guidance_scale 3 --num_inference_steps 20 --out results/attacks/cce

The tokens are put before each prompt or, without the concept's names, in the place of the first one (Pham et al., ICLR 2024).
--objective diffusion learns through the denoiser, from images that the original pipeline draws of the prompts; embedding matches
the original encoder's embedding of each prompt and needs no denoiser. {cell}.safetensors is for generate.py --learned_tokens.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from des.attacks.options import add_attack, add_encoders_searched, check_attack
from des.utils import cli

OWN = ("tokens", "objective", "max_norm", "learning_rate", "train_batch_size", "accumulation", "num_images", "encoders")


def norm_limit(text: str) -> str | float:
    """An argparse type: `vocabulary`, `none`, or a positive number."""
    return text if text in ("vocabulary", "none") else cli.number(float, 0, low_open=True)(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("learning")
    # fmt: off
    group.add_argument("--tokens", type=cli.positive_int, default=1, metavar="K", help="tokens to learn")
    group.add_argument("--objective", choices=("diffusion", "embedding"), default="diffusion", help="loss: diffusion (the denoiser's error; Stable Diffusion 1.x and 2.x only) or embedding (distance to the original encoder's embeddings)")
    group.add_argument("--max_norm", type=norm_limit, default="vocabulary", metavar="X", help="upper bound of a learned embedding's norm: vocabulary (the largest norm of a token embedding), none, or a number")
    group.add_argument("--learning_rate", type=cli.number(float, 0, 1, low_open=True), default=5e-3, metavar="LR", help="learning rate of AdamW")
    group.add_argument("--train_batch_size", type=cli.positive_int, default=4, metavar="N", help="images or prompts per forward pass")
    group.add_argument("--accumulation", type=cli.positive_int, default=4, metavar="N", help="forward passes per step of AdamW")
    group.add_argument("--num_images", type=cli.positive_int, default=64, metavar="N", help="prompts to learn from, evenly spaced over the list; diffusion draws one image of each")
    # fmt: on
    add_encoders_searched(group)
    add_attack(parser, 5000, "steps of AdamW, for all prompts together")
    return check_attack(parser, parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.attacks.inversion import Inversion
from des.attacks.run import open_attack


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    options = {name: getattr(args, name) for name in (*OWN, "steps", "seed")}
    open_attack(args, "concept_inversion", OWN).run(lambda cell: Inversion(cell, **options))


if __name__ == "__main__":
    cli.run(main)
