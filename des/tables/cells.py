"""What the tables are made from: models, prompt sets, and the settings for drawing and scoring."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from des.tables.jobs import Job


@dataclass(frozen=True)
class PromptSet:
    """Prompts to draw: the CSV, how to get it if it is missing, and the start of image to image."""

    title: str
    csv: Path
    how: str = ""
    options: tuple[str, ...] = ()  # of generate.py
    init: str | Path | None = None  # start images: a folder, or a set, whose images by the original model are used
    masks: Path | None = None
    strength: float = 0.8
    sexual: bool = False  # whether all prompts are sexual; then every prompt that names a minor is left out
    search: tuple[Path, ...] = ()  # candidate lists for prompts that are searched against each variant
    published: int | None = None  # number of published prompts, if the paper has values for the set


@dataclass(frozen=True)
class Setup:
    """Everything that tables are made from, for the paper's models and prompt sets or the demo's.

    Files and folders in options of scripts are Path objects: a script reads them besides the images, so the hash of their content
    is recorded with the job.
    """

    original: str  # the titles of the original model's and the protected one's rows
    protected: str
    concept_prompt: str
    unsafe_csv: Path
    safe_csv: Path
    training: dict[str, Any]  # options of train_des.py
    alpha: Callable[[float], tuple[str, float]]  # the option of train_des.py for one of the paper's alphas
    sampling: tuple[str, ...]  # options of generate.py
    sets: dict[str, PromptSet]
    columns: dict[str, dict[str, str]]  # by table: column and set of every ASR
    reference: Path  # images for FID
    scoring: dict[str, tuple[str | Path, ...]]  # options of --score_with by the stem of the result file
    asr: str  # the stem of the main detector's result file
    scales: dict[str, tuple[int | None, int | None]]  # number of rows of a concept set and of the benign one; None for all
    fid: tuple[str | Path, ...] = ()  # options of the scorers
    clip: tuple[str | Path, ...] = ()
    benign: str = "benign"
    explicit: str = ""  # the set of T1
    apart: dict[str, dict[str, str]] = field(default_factory=dict)  # like `columns`, but not part of the mean
    ablated: bool = True  # whether the paper's ablations can be compared with this model
    classes: Mapping[str, str] = field(default_factory=dict)  # the detector's classes by T1's columns
    preference: bool = False  # whether to compute PickScore, ImageReward and BLIP score
    labels: Mapping[str, tuple[str | Path, ...]] = field(default_factory=dict)  # scorer options by label column
    differences: tuple[str, ...] = ()  # differences from the paper's set-up, as sentences
    prepare: tuple[Job, ...] = ()  # jobs that the scorers need, such as drawing reference images


@dataclass(frozen=True)
class Variant:
    """A model to draw with: the original (no options), one with given files, or one trained with changed options of train_des.py."""

    name: str
    method: str = "none"
    files: tuple[tuple[str, Path], ...] = ()  # generate.py's option and file
    train: tuple[tuple[str, Any], ...] | None = None


ORIGINAL = Variant("original")
TRAINED = Variant("des", train=())


def ablations(setup: Setup) -> dict[str, dict[str, Variant]]:
    """The variants of each ablation by table and title of the paper's row; equal variants have equal names."""

    def alpha(value: float) -> Variant:
        return TRAINED if value == 200 else Variant(f"alpha_{value}", train=(setup.alpha(value),))

    def lambda_safe(value: float) -> Variant:
        return TRAINED if value == 0.3 else Variant(f"lambda_{value}", train=(("lambda_safe", value),))

    unshifted = setup.alpha(0.0)
    return {
        "T15": {
            "highest similarity": Variant("highest", train=(unshifted, ("target", "highest"))),
            "random": Variant("random", train=(unshifted, ("target", "random"))),
            "lowest without shift": Variant("lowest", train=(unshifted,)),
            **{f"alpha {value}": alpha(value) for value in (50, 100, 150, 200, 250, 300, 350)},
        },
        "T17": {
            "UEN alone": Variant("uen", train=(("ablation", (2,)),)),
            "UEN + SEP": Variant("uen_sep", train=(("ablation", (1, 2)),)),
            "all three": TRAINED,
        },
        "T18": {
            "all three": TRAINED,
            "all three without SEP's second term": Variant("no_concept_term", train=(("no_concept_term", True),)),
        },
        "T19": {f"lambda {value}": lambda_safe(value) for value in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)},
    }
