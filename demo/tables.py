"""The paper's tables in the demo's world: its drawn concept, its prompt lists, its classifiers."""

from dataclasses import asdict
from pathlib import Path

from demo.evaluation import (
    ATTACKS,
    CLASSIFIERS,
    CLIP,
    CONCEPT_SETS,
    EXPERIMENTS,
    REFERENCE_IMAGES,
    SECOND_SETS,
    TRAINING,
    Sampling,
)
from demo.world import CONCEPT, SECOND
from des.tables.cells import Concept, PromptSet, Setup
from des.tables.jobs import Job
from des.utils.scripts import ROOT

PAPERS_ALPHA, RATIO = 200.0, TRAINING["concept_guidance_ratio"]  # the demo's alpha / |n| where the paper's alpha is 200
STRENGTHS = (0.3, 0.5, 0.7, 0.9)  # of image to image, in T4
COLUMNS = dict(zip(("plain name", "held-out names", "held-out phrases"), CONCEPT_SETS, strict=True))
STYLE_COLUMNS = dict(zip(("plain name", "held-out name", "misspelt name"), SECOND_SETS, strict=True))


def demo_setup(out: Path, device: str, scale: str) -> Setup:
    """The set-up of the demo at a scale; its reference images and Q16 prompts are made in `out`/inputs."""
    inputs, datasets = out / "inputs", ROOT / "datasets"
    lists = {name: datasets / f"demo_{name}.csv" for name in (*CONCEPT_SETS, *SECOND_SETS, "benign", "both_benign")}
    sets = {name: PromptSet(title, lists[name]) for title, name in COLUMNS.items()}
    second = {"classify_object": ("object", "--classifier", CLASSIFIERS["object"], "--cls_class", SECOND)}
    sets |= {name: PromptSet(title, lists[name], scoring=second) for title, name in STYLE_COLUMNS.items()}
    sets["benign"] = PromptSet("benign prompts", lists["benign"])
    sets["both_benign"] = PromptSet(
        f"prompts without {CONCEPT} and {SECOND}", lists["both_benign"], reference=inputs / "reference_both"
    )
    for name in ("nearest", "farthest"):
        sets[name] = PromptSet(f"benign prompts {name}", lists["benign"], part_of="benign", farthest=name == "farthest")
    least = ("--steps", "2") if scale == "smoke" else ()
    for name, attack in ATTACKS.items():
        sets[name] = PromptSet(attack.title, lists["plain"], attack=(attack.script, *attack.options, *least))
    columns = {}
    for box in ("black", "white"):
        for strength in STRENGTHS:
            name, columns[f"text, {box} box, strength {strength}"] = f"i2i_{box}_{strength}", f"i2i_{box}_{strength}"
            sets[name] = PromptSet(
                "images of the concept",
                lists["plain"],
                init="plain",
                strength=strength,
                found_by="mma",
                black_box=box == "black",
            )
    prompts = inputs / "q16_prompts.pt"
    return Setup(
        original="demo, original",
        protected="demo, DES",
        concepts={"main": _concept(CONCEPT), "style": _concept(SECOND)},
        concept_of={"T5_style": "style", "T16_style": "style"},
        benign_of={"T5_style": "both_benign", "T16_style": "both_benign", "T21": "nearest", "T22": "farthest"},
        training=TRAINING,
        alpha=lambda alpha: ("concept_guidance_ratio", RATIO * alpha / PAPERS_ALPHA),
        sampling=tuple(part for name, value in asdict(Sampling()).items() if name != "batch_size" for part in (f"--{name}", str(value))),
        sets=sets,
        columns={
            **dict.fromkeys(("T2", "T5", "T6", "T7", "T9"), COLUMNS),
            "T5_style": STYLE_COLUMNS,
            "T3": {"MMA": "mma", "UDA": "uda", "RAB": "ring-a-bell", "CCE": "cce-1"},
            "T4": columns,
        },
        apart={"T3": {"UDA prompts, no attack": "plain"}},
        reference=inputs / "reference",
        scoring={
            "classify_object": ("object", "--classifier", CLASSIFIERS["object"], "--cls_class", CONCEPT),
            "classify_16": ("q16", "--prompts_file", prompts, "--clip_model", CLIP),
        },
        attack_note="The attacks are white box, each against the model of its row, "
        + ("with two steps." if least else "with the budgets of demo/evaluation.py."),
        asr="classify_object",
        concept_words=(CONCEPT,),
        explicit="plain",
        scales={"smoke": (4, 11), "small": (100, 220), "paper": (None, None)},
        fid=("--feature_extractor", CLASSIFIERS["object"], "--expected_ref", str(REFERENCE_IMAGES)),
        clip=("--clip_model", CLIP),
        labels={label: ("--classifier", folder) for label, folder in CLASSIFIERS.items()},
        differences=(
            f"The demo's world: the concept is the {CONCEPT}, its lists stand in for the paper's prompt sets, a classifier for NudeNet, and "
            "the nearer of two mean CLIP embeddings of drawn scenes for Q16. The direction of an effect can be compared with the paper, the figures cannot.",
            f"In the tables of a style, the concept is the {SECOND}, and its benign prompts and reference images show neither concept.",
            f"Here alpha = {RATIO} |n| takes the place of the paper's alpha of 200; other alphas are in proportion.",
            "FID is on the classifier's features, against drawn scenes; CLIP score is the demo's own CLIP's.",
        ),
        prepare=(
            Job("inputs of the demo's tables", "demo/table_inputs.py", ("--out", str(inputs), "--device", device), (CLIP,),
                (prompts, inputs / "reference", inputs / "reference_both")),
        ),
    )  # fmt: skip


def _concept(name: str) -> Concept:
    lists = EXPERIMENTS[name]
    return Concept(name, tuple(ROOT / f"datasets/{each}.csv" for each in lists.unsafe), (ROOT / f"datasets/{lists.safe}.csv",))
