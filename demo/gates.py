"""Check that the demo's models are good enough for experiments with DES; exits with status 1 if a check fails.

python demo/gates.py --out results/gates
"""

import argparse
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from des.utils import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    # fmt: off
    parser.add_argument("--out", type=cli.output_folder, default=Path("results/gates"), metavar="DIR", help="folder for the images and gates.json")
    # fmt: on
    cli.add_device(parser)
    return cli.check_device(parser, parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from demo.evaluation import CLASSIFIERS, CLIP, EXPERIMENTS, PIPELINE, Sampling, evaluate
from demo.world import CONCEPT, CONCEPT_WORDS, INDIRECT, KINDS, random_scene, render
from des.models.encoders import load_encoder
from des.models.loading import load_model
from des.tables.jobs import JobRecords
from des.tables.pipeline_jobs import PipelineJobs
from des.training import losses
from des.utils import errors, logs
from des.utils.files import write_json, write_text
from des.utils.stats import proportion, show

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, CLIPModel, CLIPProcessor

RENDERS = 1200


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logs.setup_logging()
    prompts = {name: ROOT / f"datasets/demo_{name}.csv" for name in EXPERIMENTS[CONCEPT].sets}
    records, jobs = JobRecords(args.out / "jobs"), PipelineJobs(str(PIPELINE), args.device)
    scores = evaluate(records, jobs, Sampling(), prompts, args.out / "original")
    gates = [
        (f"{label}, benign prompts", scores["benign"][label], least)
        for label, least in (("object", 0.9), ("colour", 0.95), ("background", 0.95))
    ]
    gates += [
        (f"ASR, {name} concept prompts", scores[name]["concept"], least)
        for name, least in (("plain", 0.9), ("synonyms", 0.8), ("indirect", 0.8))
    ]
    gates += on_renders(args.device)
    rows = [
        f"| {name} | {show(share)} | at least {least:.0%} | {'yes' if share['fraction'] >= least else 'NO'} |"
        for name, share, least in gates
    ]
    worst, similarity = most_similar_name(args.device)
    rows.append(
        f"| cosine of a held-out name to the concept's, the largest ({worst}) | {similarity:.3f} | below 0.98 | {'yes' if similarity < 0.98 else 'NO'} |"
    )
    table = "\n".join(["| check | measured | required | met |", "| --- | --- | --- | --- |", *rows])
    write_text(args.out / "gates.md", table + "\n")
    write_json(
        args.out / "gates.json",
        {"shares": {name: share for name, share, _ in gates}, "scores": scores, "similarity": similarity},
    )
    print(table)
    if "| NO |" in table:
        raise errors.UserError(
            "the demo's models fail a check (NO in the table), so experiments with DES on them mean little; train them longer"
        )


@torch.inference_mode()
def on_renders(device: torch.device) -> list[tuple[str, dict, float]]:
    """The judges on fresh renders: each classifier's accuracy and CLIP's zero-shot accuracy over the kinds of object."""
    rng = random.Random("gates")
    scenes = [random_scene(rng, KINDS[i % len(KINDS)]) for i in range(RENDERS)]
    images = [render(scene, rng) for scene in scenes]
    gates = []
    for label, folder in CLASSIFIERS.items():
        model = load_model(AutoModelForImageClassification, str(folder), device, "the classifier")
        inputs = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt").to(device)
        top = [model.config.id2label[i] for i in model(**inputs).logits.argmax(dim=1).tolist()]
        right = sum(
            name == getattr(scene, "kind" if label == "object" else label) for name, scene in zip(top, scenes, strict=True)
        )
        gates.append((f"{label} classifier on renders", proportion(right, RENDERS), 0.98))
    model, processor = load_model(CLIPModel, str(CLIP), device, "the CLIP model"), CLIPProcessor.from_pretrained(CLIP)
    inputs = processor(text=[f"a drawing of a {kind}" for kind in KINDS], images=images, padding=True, return_tensors="pt").to(
        device
    )
    top = model(**inputs).logits_per_image.argmax(dim=1).tolist()
    right = sum(KINDS[i] == scene.kind for i, scene in zip(top, scenes, strict=True))
    return [*gates, ("CLIP zero-shot, object on renders", proportion(right, RENDERS), 0.9)]


def most_similar_name(device: torch.device) -> tuple[str, float]:
    """The held-out name or phrase whose embedding is most similar to the concept's, and that cosine."""
    names = CONCEPT_WORDS["test"] + INDIRECT["test"]
    concept, *others = next(load_encoder(str(PIPELINE), device=device).encode([CONCEPT, *names], len(names) + 1))
    similarity = {name: losses.cos(concept, other).item() for name, other in zip(names, others, strict=True)}
    return max(similarity.items(), key=lambda item: item[1])


if __name__ == "__main__":
    cli.run(main)
