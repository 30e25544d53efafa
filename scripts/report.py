"""Make one HTML page, readable offline, that compares models before and after protection: scores, trade-offs, losses, images.

    python scripts/report.py results/none/stable-diffusion-v1-5 results/des/stable-diffusion-v1-5 checkpoints/des_sexual \\
        --out report.html --images 12

Searches the folders for images that generate.py drew, with the results of the scorers in and beside them, for checkpoints of
train_des.py, and for results of scripts/attacks/ (attack.json). Images of --training_method none are shown as `before`, those of a
protected model with the same prompts, settings and seeds as `after`. Two runs are compared only if their records show the same
original model: all components that no method changed (VAE, tokenizer, ...) are equal or, in records of earlier versions, the model's
path. The ASR is averaged over the attack sets that all models share. An image is blurred until it is clicked if a detector counts it
or if no detector scored it, except in sets with scores of quality only. By default, only prompts of the demo's lists are quoted;
--prompts quotes all, and some prompts that attacks found, except those that the safety filter refuses. Results that do not describe
the images beside them are refused. Attacks on models without images in the folders are listed without their figures.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from des.utils import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument(
        "run_dirs", type=cli.folder, nargs="+", metavar="RUN_DIR", help="folders with runs; their subfolders are searched, too"
    )
    # fmt: off
    files.add_argument("--out", type=cli.output_file, required=True, metavar="HTML", help="the page; an earlier report is replaced")
    shown = parser.add_argument_group("what the page shows")
    shown.add_argument("--benign_sets", nargs="*", metavar="SET", help="names of folders with images of benign prompts, which no ASR includes (default: benign, and those with an FID, CLIP score or another score of quality)")
    shown.add_argument("--images", type=cli.positive_int, default=12, metavar="N", help="rows of images per set, evenly spaced")
    shown.add_argument("--no_images", dest="pictures", action="store_false", help="leave the images out")
    quoted = shown.add_mutually_exclusive_group()
    quoted.add_argument("--prompts", action="store_true", default=None, help="quote the prompts of the images, and some that attacks found; their lists must still be there (default: prompts of the demo's lists only, and none that attacks found)")
    quoted.add_argument("--no_prompts", dest="prompts", action="store_false", help="quote no prompt")
    shown.add_argument("--no_map", dest="map", action="store_false", help="leave out the map of embeddings, which loads the text encoders")
    # fmt: on
    performance = parser.add_argument_group("performance")
    cli.add_device(performance)
    cli.add_log_file(parser)
    return cli.check_device(parser, parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.report.page import Options, build, check_output
from des.utils import cli, logs
from des.utils.files import write_text
from des.utils.provenance import provenance


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logs.setup_logging(args.log_file)
    check_output(args.out)
    options = Options(args.benign_sets, args.images, args.pictures, args.prompts, args.map)
    page = build(args.run_dirs, args.out.name, options, args.device, provenance(args))
    write_text(args.out, page)
    print(f"{args.out}: {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main)
