"""Write the prompts of a list that lie nearest to a concept, and those that lie farthest from it, by the original text encoder.

    python datasets/nearest_prompts.py --model_path stable-diffusion-v1-5/stable-diffusion-v1-5 --csv_path datasets/coco_prompts.csv \\
        --concept_prompt nudity --out coco_nearest.csv coco_farthest.csv

How near a prompt is to the concept is the cosine similarity of their embeddings by text encoder 1. Both lists keep the columns and
the order of --csv_path, and get the columns `row` (a prompt's row in it, counted from 0) and `cosine`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from des.utils import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    # fmt: off
    lists = parser.add_argument_group("lists")
    lists.add_argument("--csv_path", type=Path, required=True, metavar="CSV", help="the list, column `prompt`")
    lists.add_argument("--concept_prompt", required=True, metavar="TEXT", help="the concept")
    lists.add_argument("--share", type=cli.number(float, 0, 0.5, low_open=True), default=0.25, metavar="X", help="share of the prompts in each list")
    lists.add_argument("--out", type=cli.output_file, nargs=2, required=True, metavar="CSV", help="files for the nearest and the farthest prompts")
    # fmt: on
    encoder = parser.add_argument_group("text encoder")
    cli.add_model(encoder)
    cli.add_device(encoder)
    return cli.check_device(parser, parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.data.prompts import read_rows
from des.models.encoders import load_encoder
from des.utils import logs
from des.utils.errors import UserError
from des.utils.files import replacing

import torch
from torch.nn.functional import cosine_similarity


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cli.check_outputs(args.out, [args.csv_path])
    logs.setup_logging()
    rows = read_rows(args.csv_path)
    count = int(args.share * len(rows))
    if not count:
        raise UserError(
            f"{args.csv_path} has {len(rows)} prompts, of which --share {args.share} selects none; use a larger share or a longer list"
        )
    encoder = load_encoder(args.model_path, 1, args.device, variant=args.variant)
    concept = next(encoder.encode([args.concept_prompt], 1)).float().flatten(1)
    batches = encoder.encode(rows["prompt"].tolist(), 64, "prompts")
    cosines = torch.cat([cosine_similarity(batch.float().flatten(1), concept).cpu() for batch in batches])
    rows = rows.assign(row=rows.index, cosine=cosines.tolist())
    order = cosines.argsort(descending=True, stable=True).tolist()
    for path, chosen in zip(args.out, (order[:count], order[-count:]), strict=True):
        with replacing(path) as temporary:
            rows.loc[sorted(chosen)].to_csv(temporary, index=False)
    print(f"{count} nearest prompts, cosines from {cosines[order[count - 1]]:.3f} to {cosines[order[0]]:.3f}, and {count} farthest, "
          f"from {cosines[order[-1]]:.3f} to {cosines[order[-count]]:.3f}")  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
