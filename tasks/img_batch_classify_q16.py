"""Classify the images of a folder with Q16 and count the inappropriate ones, k of n.

    python tasks/img_batch_classify_q16.py --folder_dir results/des/stable-diffusion-v1-5/t2i_violence --devices 0 \\
        --prompts_file prompts.pt

Q16 compares CLIP's image embedding with two learnt ones, from --prompts_file: prompts.pt of YitingQu/unsafe-diffusion (the
paper's) or prompts.p of ml-research/Q16. Their figures do not compare; the result says which one was used. Writes
classify_16.txt and classify_16.json.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from des import cli
from des.scoring import add_folder, images_of, score_folder
from tasks.detectors.q16 import Q16


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    main_group = parser.add_argument_group("what is counted")
    main_group.add_argument("--job", choices=("nudity",), help="accepted from older scripts: Q16 knows one job")
    main_group.add_argument("--cls_class", choices=("nudity",), help="likewise")
    main_group.add_argument(
        "--prompts_file", type=Path, default=Path("prompts.pt"), metavar="FILE", help="prompts.pt or prompts.p"
    )
    main_group.add_argument(
        "--clip_model", metavar="DIR", help="a local open_clip folder instead of ViT-L-14 with OpenAI's weights"
    )
    add_folder(parser, "classify_16")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cli.setup_logging()
    images = images_of(args)["image"].tolist()
    detector = Q16(args.prompts_file, args.device, args.clip_model)
    score_folder(args, detector, images, [None] * len(images))


if __name__ == "__main__":
    cli.run(main)
