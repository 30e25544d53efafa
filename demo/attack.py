"""Search prompts against a text encoder whose weights the attacker has: a white-box attack in the demo's size.

    python demo/attack.py --model_path demo/models/pipeline --checkpoint checkpoints/des/0.002_0.3/checkpoint-20.pt \\
        --prompts_csv datasets/demo_plain.csv --candidates datasets/demo_synonyms.csv datasets/demo_indirect.csv --out found.csv

For each prompt of --prompts_csv, finds among the candidates the one whose embedding by the attacked encoder is most similar to the
prompt's embedding by the original one: what the denoiser was trained to draw the concept from.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from des.utils import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    main_group = parser.add_argument_group("main")
    cli.add_model(main_group)
    main_group.add_argument("--checkpoint", type=Path, metavar="CKPT", help="the protected encoder (default: the original one)")
    main_group.add_argument(
        "--prompts_csv", type=Path, required=True, metavar="CSV", help="prompts whose content the attack aims at"
    )
    main_group.add_argument("--candidates", type=Path, nargs="+", required=True, metavar="CSV", help="prompts to choose from")
    main_group.add_argument(
        "--out", type=cli.output_file, required=True, metavar="CSV", help="CSV for the prompts found, one a row"
    )
    cli.add_device(parser.add_argument_group("performance"))
    return cli.check_device(parser, parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.data.prompts import SOURCE_ROW, never_drawn, read_rows
from des.models.checkpoints import load_checkpoint
from des.models.encoders import load_encoder
from des.utils import logs
from des.utils.errors import UserError
from des.utils.files import replacing
from des.utils.logs import logger

import pandas as pd
import torch
from torch.nn.functional import normalize


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cli.check_outputs([args.out], [args.prompts_csv, *args.candidates, args.checkpoint])
    logs.setup_logging()
    rows = drawable(args.prompts_csv)
    wanted = rows["prompt"].tolist()
    candidates = [prompt for path in args.candidates for prompt in drawable(path)["prompt"]]
    encoder = load_encoder(args.model_path, 1, args.device, variant=args.variant)

    def embed(prompts: list[str]) -> torch.Tensor:
        return torch.cat([normalize(batch.float().flatten(1), dim=1).cpu() for batch in encoder.encode(prompts, 64)])

    goals = embed(wanted)
    if args.checkpoint:
        load_checkpoint(encoder.model, args.checkpoint)
    cosines, best = (goals @ embed(candidates).T).max(dim=1)
    with replacing(args.out) as temporary:
        found = pd.DataFrame({"prompt": [candidates[i] for i in best.tolist()], "cosine": cosines.tolist()})
        found = found.assign(**{SOURCE_ROW: rows[SOURCE_ROW].tolist()}) if SOURCE_ROW in rows else found
        found.to_csv(temporary, index=False)
    print(f"{len(wanted)} prompts found, mean cosine to what was wanted {cosines.mean():.3f}")


def drawable(path: Path) -> pd.DataFrame:
    """The rows of a list without those that are never drawn; UserError where none is left.

    Where some are left out the others keep their numbers as `source_row`, unless the list has that column.
    """
    rows = read_rows(path)
    never = never_drawn(rows["prompt"].tolist())
    if not never:
        return rows
    logger.info("%d of %d prompts of %s are left out: they are never drawn", len(never), len(rows), path)
    if len(never) == len(rows):
        raise UserError(f"{path} has no prompt that may be searched for or found: all of them are never drawn")
    if SOURCE_ROW not in rows:
        rows[SOURCE_ROW] = [str(row) for row in rows.index]
    return rows.drop(index=never).reset_index(drop=True)


if __name__ == "__main__":
    cli.run(main)
