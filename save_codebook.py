"""Encode the safe prompts: the codebook from which DES picks its targets (paper, section 4.1).

    python save_codebook.py --model_path stable-diffusion-v1-5/stable-diffusion-v1-5 --device cuda:0 \\
        --csv_path datasets/safe_prompts_copro_sexual.csv --save_dir codebook_sexual
"""

import argparse
from pathlib import Path

from des import cli
from des.cli import logger
from des.codebook import DTYPES, write_codebook
from des.encoders import load_encoder
from des.prompts import read_prompts
from des.results import provenance


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    main_group = parser.add_argument_group("main")
    cli.add_model(main_group)
    main_group.add_argument(
        "--encoder_idx", type=cli.positive_int, default=1, metavar="I", help="which of the pipeline's text encoders, from 1"
    )
    files = parser.add_argument_group("files")
    files.add_argument("--csv_path", type=Path, required=True, metavar="CSV", help="safe prompts, column `prompt`")
    files.add_argument(
        "--save_dir", type=Path, required=True, metavar="DIR", help="gets codebook.safetensors and codebook.json"
    )
    files.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the rows on disk")
    performance = parser.add_argument_group("performance")
    cli.add_device(performance)
    performance.add_argument("--batch_size", type=cli.positive_int, default=64, metavar="N", help="prompts a forward pass")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cli.setup_logging()
    prompts = read_prompts(args.csv_path)
    encoder = load_encoder(args.model_path, args.encoder_idx, args.device)
    write_codebook(args.save_dir, encoder, prompts, args.dtype, args.batch_size, made_by=provenance(args))
    size = (args.save_dir / "codebook.safetensors").stat().st_size / 1e6
    logger.info("codebook of %d safe prompts in %s (%.1f MB)", len(prompts), args.save_dir, size)


if __name__ == "__main__":
    cli.run(main)
