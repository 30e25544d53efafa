"""Where the paper's tables are reproduced: models, prompt sets, and how images are drawn and scored there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from des.tables.jobs import Job


@dataclass(frozen=True)
class PromptSet:
    """Prompts to draw: their CSV, how to get it where it is missing, and what image to image starts from."""

    title: str
    csv: Path
    how: str = ""
    options: tuple[str, ...] = ()  # of generate.py
    init: str | Path | None = None  # a set, whose images by the original model are meant, or a folder
    masks: Path | None = None
    strength: float = 0.8
    sexual: bool = False  # as a whole, so that a prompt which names a minor at all is left out
    search: tuple[Path, ...] = ()  # lists among which prompts are searched against each variant, from those of `csv`
    published: int | None = None  # prompts of the set as published, where the paper's figures are about it


@dataclass(frozen=True)
class Setup:
    """Where tables are reproduced: the paper's models and prompt sets, or the demo's.

    Options of scripts hold files and folders as Path: those are what a script reads beside the images, and their content is part of
    what identifies its job.
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
    columns: dict[str, dict[str, str]]  # by table: the set of each column that is an ASR of the paper's
    reference: Path  # images for FID
    scoring: dict[str, tuple[str | Path, ...]]  # options of generate.py by the stem of the file that they write
    asr: str  # that stem for the tables whose ASR is the main detector's
    scales: dict[str, tuple[int | None, int | None]]  # rows of a concept set and of the benign one
    fid: tuple[str | Path, ...] = ()  # options of the scorers
    clip: tuple[str | Path, ...] = ()
    benign: str = "benign"
    explicit: str = ""  # the set of T1
    apart: dict[str, dict[str, str]] = field(default_factory=dict)  # columns like `columns` that are in no mean
    ablated: bool = True  # whether the paper's ablations are of this model, or it stands in for theirs as the demo does
    classes: Mapping[str, str] = field(default_factory=dict)  # the detector's classes by T1's columns
    preference: bool = False  # whether PickScore, ImageReward and BLIP score mean anything here
    labels: Mapping[str, tuple[str | Path, ...]] = field(default_factory=dict)  # options by the benign set's column
    differences: tuple[str, ...] = ()  # what differs from the paper's set-up
    prepare: tuple[Job, ...] = ()  # jobs that the scorers need, such as drawing reference images


@dataclass(frozen=True)
class Variant:
    """A model to draw with: as it is (no options), with given files, or trained here with changed options of train_des.py."""

    name: str
    method: str = "none"
    files: tuple[tuple[str, Path], ...] = ()  # generate.py's option and file
    train: tuple[tuple[str, Any], ...] | None = None


ORIGINAL = Variant("original")
TRAINED = Variant("des", train=())


def ablations(setup: Setup) -> dict[str, dict[str, Variant]]:
    """The variants of each ablation by the titles of the paper's rows; what is the same variant has the same name."""

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
