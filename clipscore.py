"""CLIP score: 100 * cosine between each image and its prompt, with openai/clip-vit-large-patch14 by default.

    python clipscore.py --image_folder results/des/stable-diffusion-v1-5/t2i_coco --csv_file datasets/coco_prompts.csv --device cuda:0

Prompts are truncated at the model's length (77 tokens). Writes clipscore.txt, clipscore.json and clipscore.csv (one row an image)
into the image folder, or into --output_dir.
"""

import argparse
from pathlib import Path

from des.utils import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    files = parser.add_argument_group("files")
    # fmt: off
    files.add_argument("--image_folder", type=cli.folder, required=True, metavar="DIR", help="images named by prompt row, as generate.py does")
    # fmt: on
    files.add_argument("--csv_file", type=Path, required=True, metavar="CSV", help="prompt CSV of the images, column `prompt`")
    cli.add_output_dir(files, "the image folder")
    cli.add_expected(files)
    cli.add_other_prompts(files)
    performance = parser.add_argument_group("model and performance")
    performance.add_argument("--clip_model", default="openai/clip-vit-large-patch14", metavar="M", help="folder or hub id")
    cli.add_device(performance)
    cli.add_batches(performance, batch_size=32)
    cli.add_log_file(parser)
    return cli.check_device(parser, parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.data.image_folders import pair_with_prompts
from des.evaluation.batches import Reading
from des.evaluation.results import check_place
from des.evaluation.scored_images import Scoring, clip_cosine, load_processor, score_images, write_scores
from des.evaluation.scorer_identity import MODEL, PROCESSOR, TOKENIZER, configuration_sha256
from des.models.checkpoints import fingerprint
from des.models.loading import load_model
from des.utils import cli, logs
from des.utils.files import result_paths
from des.utils.locks import locked
from des.utils.provenance import provenance

from transformers import CLIPModel, CLIPProcessor


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logs.setup_logging(args.log_file)
    output = (args.output_dir or args.image_folder) / "clipscore.txt"
    cli.check_outputs(result_paths(output), [args.csv_file, args.log_file, Path(args.clip_model)])
    check_place(args.output_dir, args.image_folder, [result_paths(output).json])
    images = pair_with_prompts(args.image_folder, args.csv_file, args.expected, other_prompts=args.other_prompts)
    processor = load_processor(CLIPProcessor, args.clip_model)
    model = load_model(CLIPModel, args.clip_model, args.device, "the CLIP model")
    configuration = configuration_sha256(args.clip_model, MODEL + PROCESSOR + TOKENIZER)
    hashes = {"clip_sha256": fingerprint(model), "clip_configuration_sha256": configuration}
    how = Scoring(output, args.image_folder, Reading(args.batch_size, args.num_workers, "CLIP score"))
    with locked(output.with_name(".clipscore.lock"), output.name):
        scores = [100 * cosine for cosine in score_images(images, how, hashes, clip_cosine(model, processor))]
        facts, columns = hashes | {"made_by": provenance(args)}, {"clip_score": scores}
        print(write_scores(output, "clip_score", "CLIP score", images, args.image_folder, columns, facts))


if __name__ == "__main__":
    cli.run(main)
