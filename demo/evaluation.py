"""Scoring the demo: generate prompt sets with the project's scripts and score the images with the demo's own models.

Every step is a script with its own command line, run in this process so that libraries load once.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from demo.world import BENIGN_KINDS, CONCEPT, random_scene, render
from des.jobs import run_script as script

import torch

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "demo" / "models"
PIPELINE = MODELS / "pipeline"
CLIP = MODELS / "clip"
CLASSIFIERS = {label: MODELS / f"classifier_{label}" for label in ("object", "colour", "background")}
CONCEPT_SETS = {"plain": "mushroom", "synonyms": "mushroom by held-out names", "indirect": "mushroom by held-out phrases"}
BENIGN_SETS = {"benign": "all other objects", "neighbour": "umbrella, the near neighbour"}
SETS = CONCEPT_SETS | BENIGN_SETS
REFERENCE_IMAGES = 1100


@dataclass(frozen=True)
class Sampling:
    """How the demo's images are drawn."""

    device: torch.device
    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    batch_size: int = 32


def evaluate(sampling: Sampling, prompts: dict[str, Path], results: Path, checkpoint: Path | None = None) -> dict[str, dict]:
    """Generate every set below `results` and score it; returns each set's scores by name.

    `prompts` maps names of SETS to prompt CSVs; `checkpoint` is the protected text encoder, None for the original model.
    """
    method = ["--training_method", "des", "--text_encoder_path", checkpoint] if checkpoint else ["--training_method", "none"]
    scores: dict[str, dict] = {}
    for name, csv_path in prompts.items():
        script("generate.py", "--model_path", PIPELINE, "--device", sampling.device, "--prompts_csv", csv_path, "--output_path", name,
               "--results_dir", results, "--num_inference_steps", sampling.num_inference_steps, "--guidance_scale", sampling.guidance_scale,
               "--batch_size", sampling.batch_size, *method)  # fmt: skip
        folder = results / str(method[1]) / PIPELINE.name / name
        counted = ["--cls_class", CONCEPT] if name in CONCEPT_SETS else ["--label_column", "object"]
        scores[name] = {
            "concept" if name in CONCEPT_SETS else "object": classify(sampling, folder, csv_path, "object", *counted)
        }
        if name in BENIGN_SETS:
            scores[name] |= {
                label: classify(sampling, folder, csv_path, label, "--label_column", label)
                for label in ("colour", "background")
            }
        if name == "benign":
            scores[name] |= quality(sampling, folder, csv_path, results.parent / "reference")
    return scores


def classify(sampling: Sampling, folder: Path, csv_path: Path, label: str, *counted: str) -> dict:
    """k of n with its interval and the mean probability, by the classifier of `label`."""
    name = f"classify_{label}"
    script("tasks/img_batch_classify.py", "--job", "object", "--classifier", CLASSIFIERS[label], "--folder_dir", folder,
           "--csv_path", csv_path, "--output_name", name, "--devices", sampling.device, *counted)  # fmt: skip
    content = read_json(folder / f"{name}.json")
    return {key: content[key] for key in ("k", "n", "fraction", "low", "high", "mean_probability")}


def quality(sampling: Sampling, folder: Path, csv_path: Path, reference: Path) -> dict:
    """CLIP score against the prompts, and FID against renders of other scenes with the object classifier's features."""
    draw_reference(reference)
    script("clipscore.py", "--image_folder", folder, "--csv_file", csv_path, "--clip_model", CLIP, "--device", sampling.device)
    script("fid.py", "--gen_imgs_path", folder, "--coco_imgs_path", reference, "--feature_extractor", CLASSIFIERS["object"],
           "--device", sampling.device)  # fmt: skip
    return {
        "clip_score": read_json(folder / "clipscore.json")["clip_score"],
        "fid": read_json(folder.with_name(f"{folder.name}_fid.json"))["fid"],
    }


def draw_reference(folder: Path) -> None:
    """Draw the reference images of FID, renders of benign scenes, unless they are there."""
    if len(list(folder.glob("*.png"))) == REFERENCE_IMAGES:
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random("reference")
    for i in range(REFERENCE_IMAGES):
        render(random_scene(rng, BENIGN_KINDS[i % len(BENIGN_KINDS)]), rng).save(folder / f"reference_{i}p.png")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
