"""FID: the Fréchet distance between the features of generated and of reference images.

    python fid.py --gen_imgs_path results/des/pipeline/benign --coco_imgs_path results/reference --feature_extractor DIR --device cuda:0

The features are the pooled output of an image model (--feature_extractor, a folder or hub id); FIDs of different extractors do
not compare. Every image file under both folders counts, subfolders included. Writes {gen_imgs_path}_fid.txt and .json.
"""

import argparse
from pathlib import Path

from des import cli
from des.checkpoints import fingerprint
from des.cli import UserError
from des.frechet import frechet_distance
from des.images import image_batches, image_files
from des.loading import load_model, loading
from des.results import provenance, write_json, write_text

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModel


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--gen_imgs_path", type=Path, required=True, metavar="DIR", help="generated images")
    parser.add_argument("--coco_imgs_path", type=Path, required=True, metavar="DIR", help="reference images")
    parser.add_argument("--job", choices=("fid",), default="fid")
    parser.add_argument(
        "--feature_extractor", required=True, metavar="M", help="image model whose pooled output is the feature"
    )
    parser.add_argument(
        "--output_file", type=Path, metavar="F", help="text file for the result (default: {gen_imgs_path}_fid.txt)"
    )
    cli.add_device(parser)
    parser.add_argument("--batch_size", type=cli.positive_int, default=64, metavar="N", help="images a forward pass")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cli.setup_logging()
    folders = {"generated": image_files(args.gen_imgs_path), "reference": image_files(args.coco_imgs_path)}
    for name, paths in folders.items():
        if len(paths) < 2:
            raise UserError(f"FID needs at least two {name} images; {paths[0].parent} holds one")
    with loading(f"the image processor of {args.feature_extractor}"):
        processor = AutoImageProcessor.from_pretrained(args.feature_extractor)
    model = load_model(AutoModel, args.feature_extractor, args.device, "the feature extractor")
    features = {name: extract(paths, processor, model, args.batch_size, name) for name, paths in folders.items()}
    fid = frechet_distance(features["generated"], features["reference"])

    counts = {name: len(paths) for name, paths in folders.items()}
    width = features["generated"].shape[1]
    text = f"FID: {fid:.4f} ({counts['generated']} generated, {counts['reference']} reference images, {width} features of {args.feature_extractor})"
    output = args.output_file or args.gen_imgs_path.with_name(f"{args.gen_imgs_path.name}_{args.job}.txt")
    facts = {"fid": fid, **counts, "features": width, "extractor_sha256": fingerprint(model), "made_by": provenance(args)}
    write_json(output.with_suffix(".json"), facts)
    write_text(output, text + "\n")
    print(text)


@torch.inference_mode()
def extract(paths: list[Path], processor: AutoImageProcessor, model: nn.Module, batch_size: int, desc: str) -> torch.Tensor:
    """Pooled features [images, features] in float64 on the CPU."""
    batches = []
    for images in image_batches(paths, batch_size, desc):
        output = model(**processor(images, return_tensors="pt").to(model.device))
        batches.append(output.pooler_output.flatten(1).double().cpu())
    return torch.cat(batches)


if __name__ == "__main__":
    cli.run(main)
