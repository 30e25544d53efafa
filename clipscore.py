"""CLIP score: 100 * cosine between each image and its prompt, with openai/clip-vit-large-patch14 unless told otherwise.

    python clipscore.py --image_folder results/des/stable-diffusion-v1-5/t2i_coco --csv_file datasets/coco_prompts.csv --device cuda:0

Prompts are truncated at the model's length (77 tokens). Writes clipscore.txt, clipscore.json and clipscore.csv (one row an image)
into the image folder.
"""

import argparse
import math
from pathlib import Path

from des import cli
from des.checkpoints import fingerprint
from des.images import image_batches, pair_with_prompts
from des.loading import load_model, loading
from des.results import Z95, provenance, replacing, write_json, write_text

import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import CLIPModel, CLIPProcessor


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument(
        "--image_folder", type=Path, required=True, metavar="DIR", help="images named by prompt row, as generate.py does"
    )
    parser.add_argument("--csv_file", type=Path, required=True, metavar="CSV", help="their prompts")
    parser.add_argument("--clip_model", default="openai/clip-vit-large-patch14", metavar="M", help="folder or hub id")
    cli.add_device(parser)
    parser.add_argument("--batch_size", type=cli.positive_int, default=32, metavar="N", help="images a forward pass")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cli.setup_logging()
    images = pair_with_prompts(args.image_folder, args.csv_file)
    with loading(f"the processor of {args.clip_model}"):
        processor = CLIPProcessor.from_pretrained(args.clip_model)
    model = load_model(CLIPModel, args.clip_model, args.device, "the CLIP model")
    scores = clip_scores(images["image"].tolist(), images["prompt"].tolist(), processor, model, args.batch_size)

    mean = scores.mean().item()
    half = Z95 * scores.std().item() / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
    text = f"CLIP score: {mean:.4f}, 95% interval [{mean - half:.4f}, {mean + half:.4f}], {len(scores)} images"
    with replacing(args.image_folder / "clipscore.csv") as temporary:
        table = images.assign(row=images.index, image=[str(path.relative_to(args.image_folder)) for path in images["image"]])
        table.assign(clip_score=scores.tolist())[["row", "image", "clip_score"]].to_csv(temporary, index=False)
    interval = {"low": mean - half, "high": mean + half} if len(scores) > 1 else {}
    facts = {"clip_score": mean, "n": len(scores), **interval, "clip_sha256": fingerprint(model), "made_by": provenance(args)}
    write_json(args.image_folder / "clipscore.json", facts)
    write_text(args.image_folder / "clipscore.txt", text + "\n")
    print(text)


@torch.inference_mode()
def clip_scores(
    paths: list[Path], prompts: list[str], processor: CLIPProcessor, model: nn.Module, batch_size: int
) -> torch.Tensor:
    """100 * cosine of each image to its prompt, [images], in float64 on the CPU."""
    length = model.config.text_config.max_position_embeddings
    scores = []
    for start, images in zip(range(0, len(paths), batch_size), image_batches(paths, batch_size, "CLIP score"), strict=True):
        texts = prompts[start : start + batch_size]
        inputs = processor(text=texts, images=images, padding=True, truncation=True, max_length=length, return_tensors="pt").to(
            model.device
        )
        output = model(**inputs)
        scores.append(100 * cosine_similarity(output.image_embeds.float(), output.text_embeds.float()).double().cpu())
    return torch.cat(scores)


if __name__ == "__main__":
    cli.run(main)
