"""Classify the images of a folder and count those that show nudity, an object or a style: the attack success rate (ASR), k of n.

    python tasks/img_batch_classify.py --job nudity --folder_dir results/des/stable-diffusion-v1-5/t2i_sneaky --devices 0 \\
        --csv_path datasets/sneaky_prompts.csv
    python tasks/img_batch_classify.py --job object --cls_class church --folder_dir results/des/sd/t2i_church --devices 0
    python tasks/img_batch_classify.py --job object --classifier demo/models/classifier_colour \\
        --csv_path datasets/demo_benign.csv --label_column colour --folder_dir results/none/pipeline/benign --output_name colour

nudity: an image counts by the rule of each --profile. object and style: it counts when its top label is --cls_class or, with
--label_column, what its row of the CSV says in that column (accuracy; rows with an empty cell are left out). Writes classify.txt
and classify.json, and classify_{profile}.json for further profiles.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from des.evaluation.detectors.options import CLASSIFIERS, add_classifier, add_folder, add_nudenet, open_classifier, open_nudenet
from des.utils import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    main_group = parser.add_argument_group("what is counted")
    main_group.add_argument("--job", choices=("nudity", *CLASSIFIERS), default="object", help="what to detect")
    add_nudenet(main_group)
    add_classifier(main_group)
    counted = main_group.add_mutually_exclusive_group()
    counted.add_argument("--cls_class", metavar="NAME", help="count images whose top label is this class, by name or index")
    # fmt: off
    counted.add_argument("--label_column", metavar="COLUMN", help="count images whose top label is in this column of --csv_path")
    # fmt: on
    add_folder(parser, "classify")
    cli.add_log_file(parser)
    args = parser.parse_args(argv)
    if args.job == "nudity":
        check_nudity(parser, args)
    else:
        check_classifier(parser, args)
    return cli.check_device(parser, args)


def check_nudity(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what this job would not use; `--cls_class nudity` stands in users' scripts."""
    if args.classifier or args.label_column or args.cls_class not in (None, "nudity"):
        parser.error("--job nudity takes no --classifier, --label_column or other --cls_class: --profile says what counts")


def check_classifier(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what this job would not use or lacks."""
    if args.profile or args.detector_weights:
        parser.error("--profile and --detector_weights are for --job nudity")
    if not args.cls_class and not args.label_column:
        parser.error(f"--job {args.job} needs --cls_class or --label_column")
    if args.label_column == "prompt":
        parser.error("--label_column cannot be prompt: prompts are no class names, and errors would quote them")
    if args.label_column and not args.csv_path:
        parser.error("--label_column needs --csv_path")
    if not args.classifier and not CLASSIFIERS[args.job]:
        parser.error(f"--job {args.job} needs --classifier, such as UnlearnDiffAtk's style classifier")


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.evaluation.batches import Reading
from des.evaluation.classify import check_score_files, open_folder, score_folder
from des.utils import cli, logs
from des.utils.errors import UserError
from des.utils.provenance import provenance

import pandas as pd


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logs.setup_logging(args.log_file)
    images = open_folder(args)
    if args.job == "nudity":
        detector = open_nudenet(args)
        images = images.assign(label=None)
    else:
        images = labelled(args, images)
        what = f"ASR of {args.cls_class}" if args.cls_class else f"accuracy of {args.label_column}"
        detector = open_classifier(args, args.job, what, images["label"].unique())
    output = check_score_files(args, detector)
    reading = Reading(args.batch_size, args.num_workers)
    print(score_folder(args.folder_dir, output, detector, images, reading, provenance(args), args.skip_unreadable))


def labelled(args: argparse.Namespace, images: pd.DataFrame) -> pd.DataFrame:
    """The images that have a class to count, which is in their column `label`."""
    if args.cls_class:
        return images.assign(label=args.cls_class)
    if args.label_column not in images:
        raise UserError(
            f"{args.csv_path} has no column {args.label_column!r}; its columns are {', '.join(images.columns.drop('image'))}"
        )
    images = images.assign(label=images[args.label_column]).loc[lambda rows: rows["label"] != ""]
    if images.empty:
        raise UserError(f"no row of {args.csv_path} has a label in its column {args.label_column!r}")
    return images


if __name__ == "__main__":
    cli.run(main)
