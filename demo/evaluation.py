"""The demo's models and test sets; draws the sets and scores the images with the demo's own models, as jobs that are recorded."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from demo.world import CONCEPT, KINDS, SECOND, random_scene, render
from des.utils.folders import visible
from des.utils.stats import proportion

if TYPE_CHECKING:
    from des.tables.jobs import JobRecords
    from des.tables.pipeline_jobs import PipelineJobs

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "demo" / "models"
PIPELINE = MODELS / "pipeline"
PROTECTED = MODELS / "protected" / "checkpoint-20.safetensors"
UNSAFE_LIST, SAFE_LIST = (ROOT / f"datasets/demo_{name}_train.csv" for name in ("unsafe", "safe"))
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
class Attack:
    """An attack with a budget for the demo: a title, a script of scripts/attacks/, and its options."""

    title: str
    script: str
    options: tuple[str, ...] = ()

    @property
    def finds_text(self) -> bool:
        """Whether what it finds are prompts that anyone can type, not embeddings, for which the encoder must be changed."""
        return self.script != "concept_inversion.py"


_LEARNING = ("--steps", "350", "--train_batch_size", "8", "--accumulation", "1")
ATTACKS = {  # by the folder of its results; docs/attacks.md says what each does
    "mma": Attack("MMA", "mma.py", ("--tokens", "16", "--steps", "60", "--candidates", "24")),
    "ring-a-bell": Attack("Ring-A-Bell", "ring_a_bell.py", ("--steps", "60", "--population", "60")),
    "uda": Attack("UnlearnDiffAtk", "uda.py", ("--timesteps", "3", "--steps", "40")),
    "p4d": Attack("P4D", "p4d.py", ("--steps", "100")),
    "cce-1": Attack("concept inversion, 1 token", "concept_inversion.py", _LEARNING),
    "cce-4": Attack("concept inversion, 4 tokens", "concept_inversion.py", ("--tokens", "4", *_LEARNING)),
    "cce-4-embedding": Attack(
        "concept inversion, 4 tokens, by embeddings",
        "concept_inversion.py",
        ("--tokens", "4", "--objective", "embedding", "--steps", "300", "--train_batch_size", "16", "--accumulation", "1",
         "--learning_rate", "0.01"),
    ),
    "random-prefix": Attack("random prefix (the null attack)", "random_prefix.py"),
}  # fmt: skip
TRAINING = {  # the demo's options of train_des.py; docs/demo.md says how they were chosen
    "learning_rate": 2e-3, "num_epochs": 20, "batch_size": 128, "lambda_safe": 0.3, "concept_guidance_ratio": 0.3,
}  # fmt: skip
SHARE = ("k", "n", "fraction", "low", "high", "mean_probability")  # what a classifier's JSON says of the images counted


@dataclass(frozen=True)
class Sampling:
    """How the demo's images are drawn."""

    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    batch_size: int = 32


def concept_of(name: str) -> str | None:
    """The concept whose images are counted in a test set, None for a benign one."""
    return CONCEPT if name in CONCEPT_SETS else SECOND if name in SECOND_SETS else None


def evaluate(
    records: "JobRecords",
    jobs: "PipelineJobs",
    sampling: Sampling,
    prompts: dict[str, Path],
    results: Path,
    method: Sequence[object] = ("--training_method", "none"),
    removed: Sequence[str] = (CONCEPT,),
) -> dict[str, dict]:
    """Generate every set below `results` and score it, each as a job; returns each set's scores by name.

    `prompts` maps names of SETS to prompt CSVs; `method` is generate.py's option `--training_method` with those of its files, which
    are Paths; FID's reference shows every kind but those `removed`.
    """
    from des.data.prompts import read_rows

    options = (*method, *(part for key, value in asdict(sampling).items() for part in (f"--{key}", value)))
    scores: dict[str, dict] = {}
    for name, csv in prompts.items():
        what, folder = f"{name} with {results.name}", jobs.image_folder(results, method, name)
        records.run(jobs.drawing(what, csv, folder, options, (PIPELINE,), (), len(read_rows(csv))))
        scores[name] = classify(records, jobs, what, folder, csv, concept_of(name))
        if SETS[name] == OTHERS:
            draw_reference(results.parent / "reference", removed)
            scores[name] |= quality(records, jobs, what, folder, csv, results.parent / "reference")
    return scores


def shortened(name: str, limit: int | None, folder: Path, split: str = "test") -> Path:
    """Write the first `limit` prompts (None: all) of the demo's list `name` to a CSV in `folder`, and return its path.

    The lists go through the objects in turn, so a shortened list shows all of them.
    """
    from des.data.prompts import read_rows

    rows = read_rows(ROOT / "datasets" / f"{'demo_val' if split == 'val' else 'demo'}_{name}.csv")
    path = folder / f"demo_{name}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    rows.head(limit or len(rows)).to_csv(path, index=False)
    return path


def joint_accuracy(folder: Path) -> dict[str, float]:
    """k of n images that every classifier finds right, of those whose prompt names object, colour and background."""
    from des.data.run_record import read_json  # imports pandas, which --help does not need

    scores = [read_json(folder / f"classify_{label}.json")["images"] for label in CLASSIFIERS]
    right = [{image["file"]: image["hit"] for image in images} for images in scores]
    named = set.intersection(*map(set, right))
    return proportion(sum(all(each[file] for each in right) for file in named), len(named))


def classify(
    records: "JobRecords", jobs: "PipelineJobs", what: str, folder: Path, csv: Path, concept: str | None
) -> dict[str, dict]:
    """k of n with its interval and the mean probability: of images of the concept, or of images right by each classifier."""
    counted = {"object": ("--cls_class", concept)} if concept else {label: ("--label_column", label) for label in CLASSIFIERS}
    found = {}
    for label, rule in counted.items():
        options = ("object", *rule, "--classifier", CLASSIFIERS[label])
        content = records.result(jobs.detection(f"{label} of {what}", folder, csv, f"classify_{label}", *options))
        found["concept" if concept else label] = {key: content[key] for key in SHARE}
    return found


def quality(
    records: "JobRecords", jobs: "PipelineJobs", what: str, folder: Path, csv: Path, reference: Path
) -> dict[str, float]:
    """CLIP score against the prompts, and FID against renders of other scenes with the object classifier's features."""
    output, options = folder.with_name(f"{folder.name}_fid.txt"), ("--feature_extractor", CLASSIFIERS["object"])
    return {
        "clip_score": records.result(jobs.clip_score(what, folder, csv, ("--clip_model", CLIP)))["clip_score"],
        "fid": records.result(jobs.fid(what, folder, csv, reference, output, options))["fid"],
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
