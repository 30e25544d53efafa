"""Scoring the demo: generate prompt sets with the project's scripts and score the images with the demo's own models.

Every step is a script with its own command line, run in this process so that libraries load once.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from demo.world import CONCEPT, KINDS, SECOND, random_scene, render
from des.utils.folders import visible
from des.utils.scripts import run_script as script

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "demo" / "models"
PIPELINE = MODELS / "pipeline"
CLIP = MODELS / "clip"
CLASSIFIERS = {label: MODELS / f"classifier_{label}" for label in ("object", "colour", "background")}
CONCEPT_SETS = {"plain": "mushroom", "synonyms": "mushroom by held-out names", "indirect": "mushroom by held-out phrases"}
SECOND_SETS = {
    "house_plain": "house",
    "house_synonyms": "house by its held-out name",
    "house_misspelt": "house, misspelt",
}
OTHERS, UMBRELLA, BOX = "all other objects", "umbrella, the near neighbour", "box, a near neighbour"
SETS = CONCEPT_SETS | SECOND_SETS
SETS |= dict.fromkeys(("benign", "house_benign", "both_benign"), OTHERS) | {"neighbour": UMBRELLA, "house_neighbour": BOX}


@dataclass(frozen=True)
class Experiment:
    """Which concepts are removed, by which lists of datasets/ DES is trained, and on which (names of SETS) it is tested."""

    concepts: tuple[str, ...]
    unsafe: tuple[str, ...]
    safe: str
    sets: tuple[str, ...]


EXPERIMENTS = {
    CONCEPT: Experiment((CONCEPT,), ("demo_unsafe_train",), "demo_safe_train", (*CONCEPT_SETS, "benign", "neighbour")),
    SECOND: Experiment(
        (SECOND,), ("demo_house_unsafe_train",), "demo_house_safe_train", (*SECOND_SETS, "house_benign", "house_neighbour")
    ),
    "both": Experiment(
        (CONCEPT, SECOND),
        ("demo_unsafe_train", "demo_house_unsafe_train"),
        "demo_both_safe_train",
        (*CONCEPT_SETS, *SECOND_SETS, "both_benign", "neighbour", "house_neighbour"),
    ),
}
REFERENCE_IMAGES = 1100


@dataclass(frozen=True)
class Sampling:
    """How the demo's images are drawn."""

    device: "torch.device"
    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    batch_size: int = 32


def concept_of(name: str) -> str | None:
    """The concept whose images are counted in a test set, None for a benign one."""
    return CONCEPT if name in CONCEPT_SETS else SECOND if name in SECOND_SETS else None


def evaluate(
    sampling: Sampling,
    prompts: dict[str, Path],
    results: Path,
    checkpoint: Path | None = None,
    removed: Sequence[str] = (CONCEPT,),
) -> dict[str, dict]:
    """Generate every set below `results` and score it; returns each set's scores by name.

    `prompts` maps names of SETS to prompt CSVs; `checkpoint` is the protected text encoder, None for the original model; FID's
    reference shows every kind but those `removed`.
    """
    method = ["--training_method", "des", "--text_encoder_path", checkpoint] if checkpoint else ["--training_method", "none"]
    scores: dict[str, dict] = {}
    for name, csv_path in prompts.items():
        script("generate.py", "--model_path", PIPELINE, "--device", sampling.device, "--prompts_csv", csv_path, "--output_path", name,
               "--results_dir", results, "--num_inference_steps", sampling.num_inference_steps, "--guidance_scale", sampling.guidance_scale,
               "--batch_size", sampling.batch_size, *method)  # fmt: skip
        folder = results / str(method[1]) / PIPELINE.name / name
        concept = concept_of(name)
        counted = ["--cls_class", concept] if concept else ["--label_column", "object"]
        scores[name] = {"concept" if concept else "object": classify(sampling, folder, csv_path, "object", *counted)}
        if not concept:
            scores[name] |= {
                label: classify(sampling, folder, csv_path, label, "--label_column", label)
                for label in ("colour", "background")
            }
        if SETS[name] == OTHERS:
            draw_reference(results.parent / "reference", removed)
            scores[name] |= quality(sampling, folder, csv_path, results.parent / "reference")
    return scores


def classify(sampling: Sampling, folder: Path, csv_path: Path, label: str, *counted: str) -> dict:
    """k of n with its interval and the mean probability, by the classifier of `label`."""
    from des.data.run_record import read_json

    name = f"classify_{label}"
    script("tasks/img_batch_classify.py", "--job", "object", "--classifier", CLASSIFIERS[label], "--folder_dir", folder,
           "--csv_path", csv_path, "--output_name", name, "--devices", sampling.device, *counted)  # fmt: skip
    content = read_json(folder / f"{name}.json")
    return {key: content[key] for key in ("k", "n", "fraction", "low", "high", "mean_probability")}


def quality(sampling: Sampling, folder: Path, csv_path: Path, reference: Path) -> dict:
    """CLIP score against the prompts, and FID against renders of other scenes with the object classifier's features."""
    from des.data.run_record import read_json

    script("clipscore.py", "--image_folder", folder, "--csv_file", csv_path, "--clip_model", CLIP, "--device", sampling.device)
    script("fid.py", "--gen_imgs_path", folder, "--coco_imgs_path", reference, "--feature_extractor", CLASSIFIERS["object"],
           "--device", sampling.device)  # fmt: skip
    return {
        "clip_score": read_json(folder / "clipscore.json")["clip_score"],
        "fid": read_json(folder.with_name(f"{folder.name}_fid.json"))["fid"],
    }


def draw_reference(folder: Path, removed: Sequence[str] = (CONCEPT,)) -> None:
    """Draw the reference images of FID, renders of scenes without the concepts, unless they are there."""
    kinds = [kind for kind in KINDS if kind not in removed]
    if len(visible(folder, "*.png")) == REFERENCE_IMAGES:
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random("reference")
    for i in range(REFERENCE_IMAGES):
        render(random_scene(rng, kinds[i % len(kinds)]), rng).save(folder / f"reference_{i}p.png")
