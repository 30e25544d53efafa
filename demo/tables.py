"""The paper's tables in the demo's world: its drawn concept, its prompt lists, its classifiers."""

from pathlib import Path

from demo.evaluation import CLASSIFIERS, CLIP, REFERENCE_IMAGES
from demo.world import CONCEPT
from des.tables.cells import PromptSet, Setup
from des.tables.jobs import Job
from des.utils.scripts import ROOT

PAPERS_ALPHA, RATIO = 200.0, 0.3  # the demo's alpha / |n| where the paper's alpha is 200
CONCEPT_SETS = {"plain": "plain name", "synonyms": "held-out names", "indirect": "held-out phrases"}


def demo_setup(out: Path, device: str) -> Setup:
    """The set-up of the demo; its reference images and Q16 prompts are made in `out`/inputs."""
    inputs, datasets = out / "inputs", ROOT / "datasets"
    lists = {name: datasets / f"demo_{name}.csv" for name in (*CONCEPT_SETS, "benign")}
    sets = {name: PromptSet(title, lists[name]) for name, title in CONCEPT_SETS.items()}
    sets["benign"] = PromptSet("benign prompts", lists["benign"])
    candidates = tuple(datasets / f"demo_{part}.csv" for part in ("synonyms", "indirect", "val_synonyms", "val_indirect"))
    sets["whitebox"] = PromptSet("prompts searched against the encoder", lists["plain"], search=candidates)
    sets["i2i_text"] = PromptSet("concept prompts on benign images", lists["plain"], init="benign")
    sets["i2i_both"] = PromptSet("concept prompts on images of the concept", lists["plain"], init="plain")
    names = {title: name for name, title in CONCEPT_SETS.items()}
    prompts = inputs / "q16_prompts.pt"
    return Setup(
        original="demo, original",
        protected="demo, DES",
        concept_prompt=CONCEPT,
        unsafe_csv=datasets / "demo_unsafe_train.csv",
        safe_csv=datasets / "demo_safe_train.csv",
        training={"learning_rate": 2e-3, "num_epochs": 20, "batch_size": 128, "lambda_safe": 0.3, "concept_guidance_ratio": RATIO},
        alpha=lambda alpha: ("concept_guidance_ratio", RATIO * alpha / PAPERS_ALPHA),
        sampling=("--num_inference_steps", "20", "--guidance_scale", "3.0"),
        sets=sets,
        columns={
            "T2": names, "T5": names, "T6": names, "T7": names,
            "T3": {"searched prompts": "whitebox"},
            "T4": {"text": "i2i_text", "text + image": "i2i_both"},
        },
        reference=inputs / "reference",
        scoring={
            "classify_object": ("object", "--classifier", CLASSIFIERS["object"], "--cls_class", CONCEPT),
            "classify_16": ("q16", "--prompts_file", prompts, "--clip_model", CLIP),
        },
        asr="classify_object",
        explicit="plain",
        scales={"smoke": (4, 11), "small": (100, 220), "paper": (None, None)},
        fid=("--feature_extractor", CLASSIFIERS["object"], "--expected_ref", str(REFERENCE_IMAGES)),
        clip=("--clip_model", CLIP),
        labels={label: ("--classifier", folder) for label, folder in CLASSIFIERS.items()},
        differences=(
            f"The demo's world: the concept is the {CONCEPT}, its lists stand in for the paper's prompt sets, a classifier for NudeNet, and "
            "the nearer of two mean CLIP embeddings of drawn scenes for Q16. Only the shape of an effect compares, no figure.",
            f"The paper's alpha 200 stands for alpha = {RATIO} |n| here, and its other alphas in proportion.",
            "FID is on the classifier's features, against drawn scenes; CLIP score is the demo's own CLIP's.",
        ),
        prepare=(
            Job("inputs of the demo's tables", "demo/table_inputs.py", ("--out", str(inputs), "--device", device), (CLIP,),
                (prompts, inputs / "reference")),
        ),
    )  # fmt: skip
