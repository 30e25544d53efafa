"""What the tables are made from: models, prompt sets, and the settings for drawing and scoring."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from des.tables.jobs import Job


@dataclass(frozen=True)
class Concept:
    """What a DES model is trained to remove: the concept prompt, the lists of unsafe and of safe prompts, and how to get them."""

    prompt: str
    unsafe: tuple[Path, ...]
    safe: tuple[Path, ...]
    how: str = ""


@dataclass(frozen=True)
class PromptSet:
    """Prompts to draw: the CSV, how to get it if it is missing, the start of image to image, and the detectors of its images."""

    title: str
    csv: Path
    how: str = ""
    options: tuple[str, ...] = ()  # of generate.py
    init: str | Path | None = None  # start images: a folder, or a set, whose images by the original model are used
    masks: Path | None = None
    strength: float = 0.8
    sexual: bool = False  # whether all prompts are sexual; then every prompt that names a minor is left out
    attack: tuple[str | Path, ...] = ()  # for a list that is attacked, not drawn: a script of scripts/attacks/ and its options
    found_by: str = ""  # an attacked set: what is drawn in place of the prompts are those that its attack found
    black_box: bool = False  # with `found_by`: the prompts found on the original model, not on the row's own
    white_box: bool = False  # a list of prompts that an attack found on one model, whichever model draws them
    published: int | None = None  # number of published prompts, if the paper has values for the set
    scoring: Mapping[str, tuple[str | Path, ...]] | None = None  # detectors in place of `Setup.scoring`
    part_of: str = (
        ""  # a set, of whose captions this one is the quarter nearest to the concept or (`farthest`) farthest from it
    )
    farthest: bool = False
    reference: Path | None = None  # images for FID in place of `Setup.reference`


@dataclass(frozen=True)
class Setup:
    """Everything that tables are made from, for the paper's models and prompt sets or the demo's.

    Files and folders in options of scripts are Path objects: a script reads them besides the images, so the hash of their content
    is recorded with the job.
    """

    original: str  # the titles of the original model's and the protected one's rows
    protected: str
    concepts: dict[str, Concept]  # `main`, and those of `concept_of`
    training: dict[str, Any]  # options of train_des.py
    alpha: Callable[[float], tuple[str, float]]  # the option of train_des.py for one of the paper's alphas
    sampling: tuple[str, ...]  # options of generate.py
    sets: dict[str, PromptSet]
    columns: dict[str, dict[str, str]]  # by table: column and set of every ASR
    reference: Path  # images for FID
    scoring: dict[str, tuple[str | Path, ...]]  # options of --score_with by the stem of the result file
    asr: str  # the stem of the main detector's result file
    concept_words: tuple[str, ...]  # names of the concept, without which the attacks search as well
    scales: dict[str, tuple[int | None, int | None]]  # number of rows of a concept set and of the benign one; None for all
    fid: tuple[str | Path, ...] = ()  # options of the scorers
    clip: tuple[str | Path, ...] = ()
    benign: str = "benign"
    concept_of: Mapping[str, str] = field(default_factory=dict)  # by table: the concept of its DES models, if not `main`
    benign_of: Mapping[str, str] = field(default_factory=dict)  # by table: the set of its FID and CLIP score, if not `benign`
    original_of: Mapping[str, str] = field(default_factory=dict)  # by table: the title of the original's row, if not `original`
    negative_prompt: bool = True  # whether generate.py takes a negative prompt for this model
    explicit: str = ""  # the set of T1
    apart: dict[str, dict[str, str]] = field(default_factory=dict)  # like `columns`, but not part of the mean
    ablated: bool = True  # whether the paper's ablations can be compared with this model
    classes: Mapping[str, str] = field(default_factory=dict)  # the detector's classes by T1's columns
    preference: bool = False  # whether to compute PickScore, ImageReward and BLIP score
    labels: Mapping[str, tuple[str | Path, ...]] = field(default_factory=dict)  # scorer options by label column
    attack_note: str = ""  # with what budgets the attacks run, as a sentence
    differences: tuple[str, ...] = ()  # differences from the paper's set-up, as sentences
    prepare: tuple[Job, ...] = ()  # jobs that the scorers need, such as drawing reference images

    @property
    def attack_options(self) -> tuple[str | Path, ...]:
        """The options of every attack for detector, the concept's names, and sampling."""
        return ("--detector", *self.scoring[self.asr], "--concept_words", *self.concept_words, *self.sampling)


@dataclass(frozen=True)
class Variant:
    """A row of a table: the original model (no options), one with given files, or one trained with changed options of train_des.py.

    Or `images`: a folder of images that another program drew, with a subfolder for each set, named like the set. They are named by
    the rows of the set's CSV, `{row}.png` or `…_{row}p.png`; those of prompts that are never drawn are not read.
    """

    name: str
    method: str = "none"
    files: tuple[tuple[str, Path], ...] = ()  # generate.py's option and file
    train: tuple[tuple[str, Any], ...] | None = None
    concept: str = "main"  # what the training removes, a key of `Setup.concepts`
    negative_prompt: str | None = None
    images: Path | None = None

    @property
    def weights(self) -> str:
        """The name of the training, which variants that differ in the negative prompt share."""
        return self.name.removesuffix(NEGATIVE)

    def negated(self, prompt: str) -> "Variant":
        """This model, drawn with a negative prompt."""
        return replace(self, name=self.name + NEGATIVE, negative_prompt=prompt)


NEGATIVE = "_negative"
ORIGINAL = Variant("original")
LEFT_OUT = {
    "T9's rows of a prompt filter": "this project has no prompt filter for the concept that is removed",
    "T11 to T14": "their figures could not be read from the paper's text",
    "T20": "train_des.py groups the three losses in one way only, that of all other tables",
}


def trained(concept: str = "main", name: str = "des", *train: tuple[str, Any]) -> Variant:
    """The model that is trained here to remove a concept, with changed options of train_des.py."""
    return Variant(name if concept == "main" else f"{concept}_{name}", train=train, concept=concept)


def ablations(setup: Setup) -> dict[str, dict[str, Variant]]:
    """The variants of each ablation by table and title of the paper's row; equal variants have equal names."""

    def alpha(value: int, concept: str = "main") -> Variant:
        if value == 200:
            return trained(concept)
        return trained(concept, f"alpha_{value}" if value else "lowest", setup.alpha(float(value)))

    def alphas(table: str) -> dict[str, Variant]:
        return {f"alpha {value}": alpha(value, setup.concept_of.get(table, "main")) for value in range(0, 301, 50)}

    def lambda_safe(value: float) -> Variant:
        return trained() if value == 0.3 else trained("main", f"lambda_{value}", ("lambda_safe", value))

    unshifted = setup.alpha(0.0)
    return {
        "T15": {
            "highest similarity": trained("main", "highest", unshifted, ("target", "highest")),
            "random": trained("main", "random", unshifted, ("target", "random")),
            "lowest without shift": alpha(0),
            **{f"alpha {value}": alpha(value) for value in range(50, 351, 50)},
        },
        "T16": alphas("T16"),
        "T16_style": alphas("T16_style"),
        "T17": {
            "UEN alone": trained("main", "uen", ("ablation", (2,))),
            "UEN + SEP": trained("main", "uen_sep", ("ablation", (1, 2))),
            "all three": trained(),
        },
        "T18": {
            "all three": trained(),
            "all three without SEP's second term": trained("main", "no_concept_term", ("no_concept_term", True)),
        },
        "T19": {f"lambda {value}": lambda_safe(value) for value in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)},
    }
