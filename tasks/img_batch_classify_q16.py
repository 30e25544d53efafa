"""Classify the images of a folder with Q16 and count the inappropriate ones, k of n.

    python tasks/img_batch_classify_q16.py --folder_dir results/des/stable-diffusion-v1-5/t2i_violence --devices 0 \\
        --prompts_file prompts.pt

Q16 compares CLIP's image embedding with two learnt ones, from --prompts_file: prompts.pt of YitingQu/unsafe-diffusion (the
paper's) or prompts.p of ml-research/Q16. Results with different files are not comparable; the result names the file. Writes
classify_16.txt and classify_16.json.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from des.evaluation.detectors.options import add_folder, add_q16, open_q16
from des.utils import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    main_group = parser.add_argument_group("what is counted")
    main_group.add_argument("--job", choices=("nudity",), help="accepted for older scripts; Q16 has one job")
    main_group.add_argument("--cls_class", choices=("nudity",), help="accepted for older scripts; Q16 counts one class")
    add_q16(main_group, default=Path("prompts.pt"))
    add_folder(parser, "classify_16")
    cli.add_log_file(parser)
    return cli.check_device(parser, parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.evaluation.batches import Reading
from des.evaluation.classify import check_score_files, open_folder, score_folder
from des.utils import cli, logs
from des.utils.provenance import provenance


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logs.setup_logging(args.log_file)
    images = open_folder(args).assign(label=None)
    detector = open_q16(args)
    output = check_score_files(args, detector)
    reading = Reading(args.batch_size, args.num_workers)
    print(score_folder(args.folder_dir, output, detector, images, reading, provenance(args), args.skip_unreadable))


if __name__ == "__main__":
    cli.run(main)
