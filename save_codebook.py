"""Encode the safe prompts: the codebook from which DES picks its targets (paper, section 4.1).

    python save_codebook.py --model_path stable-diffusion-v1-5/stable-diffusion-v1-5 --device cuda:0 \\
        --csv_path datasets/safe_prompts_copro_sexual.csv --save_dir codebook_sexual

For a pipeline with several text encoders (Stable Diffusion XL and 3, FLUX) the folder is {save_dir}_encoder{i}. To
resume after an interruption, repeat the command.
"""

import argparse
from pathlib import Path

from des.models.families import DTYPES
from des.utils import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    main_group = parser.add_argument_group("main")
    cli.add_model(main_group)
    which = main_group.add_mutually_exclusive_group()
    cli.add_encoder_index(which, "encoder_idx")
    # fmt: off
    which.add_argument("--save_all_encoders", action="store_true", help="a codebook for each of its text encoders")
    cli.add_embedding(main_group)
    files = parser.add_argument_group("files")
    files.add_argument("--csv_path", type=Path, required=True, metavar="CSV", help="safe prompts, column `prompt`")
    files.add_argument("--save_dir", type=cli.output_folder, required=True, metavar="DIR", help="folder for codebook.safetensors and codebook.json")
    files.add_argument("--dtype", choices=DTYPES, help="data type of the stored embeddings (default: the encoder's, fp32 for CLIP, bf16 for T5)")
    # fmt: on
    performance = parser.add_argument_group("performance")
    cli.add_device(performance)
    performance.add_argument("--batch_size", type=cli.positive_int, default=64, metavar="N", help="prompts per forward pass")
    cli.add_log_file(parser)
    args = parser.parse_args(argv)
    if args.save_all_encoders and args.max_sequence_length:
        parser.error("--max_sequence_length is for T5 only; name that encoder by --encoder_idx, without --save_all_encoders")
    return cli.check_device(parser, args)


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.data.prompts import read_prompts
from des.models.encoders import load_encoder, text_encoders
from des.training.codebook import codebook_folder, write_codebook
from des.utils import logs
from des.utils.logs import logger
from des.utils.provenance import provenance


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logs.setup_logging(args.log_file)
    prompts = read_prompts(args.csv_path)
    indices = text_encoders(args.model_path) if args.save_all_encoders else [args.encoder_idx]
    for index in indices:
        folder = codebook_folder(args.save_dir, args.model_path, index)
        encoder = load_encoder(
            args.model_path, index, args.device, args.embedding, args.max_sequence_length, variant=args.variant
        )
        write_codebook(folder, encoder, prompts, args.dtype, args.batch_size, made_by=provenance(args))
        size = sum(file.stat().st_size for file in folder.glob("codebook*.safetensors")) / 1e6
        logger.info("codebook of %d safe prompts in %s (%.1f MB)", len(prompts), folder, size)


if __name__ == "__main__":
    cli.run(main)
