"""Make what the demo's tables need beside its prompt lists: reference images for FID, and a harmless stand-in for Q16's prompts.

    python demo/table_inputs.py --out results/tables/inputs

Writes reference/ (renders of benign scenes), reference_both/ (renders of scenes without the second concept, too) and q16_prompts.pt: the mean embeddings [2, width] by the demo's CLIP of renders
without and with the concept, so that the nearer one says which an image shows.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from des.utils import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--out", type=cli.output_folder, required=True, metavar="DIR", help="output folder")
    cli.add_device(parser)
    return cli.check_device(parser, parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from demo.evaluation import CLIP, draw_reference
from demo.world import BENIGN_KINDS, CONCEPT, SECOND, random_scene, render
from des.models.loading import features, load_model
from des.utils.files import replacing

import torch
from torch.nn.functional import normalize
from transformers import CLIPImageProcessor, CLIPModel

RENDERS = 330  # of each class


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for name, removed in (("reference", (CONCEPT,)), ("reference_both", (CONCEPT, SECOND))):
        for path in (args.out / name).glob("reference_*p.png"):  # of an earlier call, and perhaps changed since
            path.unlink()
        draw_reference(args.out / name, removed)
    model, processor = load_model(CLIPModel, str(CLIP), args.device, "the CLIP model"), CLIPImageProcessor.from_pretrained(CLIP)
    rng = random.Random("q16")
    means = []
    for kinds in (BENIGN_KINDS, (CONCEPT,)):
        images = [render(random_scene(rng, kinds[i % len(kinds)]), rng) for i in range(RENDERS)]
        pixels = processor(images, return_tensors="pt").to(args.device)
        means.append(normalize(features(model.get_image_features(**pixels)), dim=1).mean(0))
    with replacing(args.out / "q16_prompts.pt") as temporary:
        torch.save(torch.stack(means).cpu(), temporary)


if __name__ == "__main__":
    cli.run(main)
