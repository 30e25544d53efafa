"""Find runs in folders: images of generate.py with their scores, checkpoints of train_des.py, and results of scripts/attacks/."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from des.attacks.results import read_attack
from des.data import manifest
from des.data.claims import check_complete
from des.data.image_folders import image_hashes
from des.data.run_record import (
    LABELS,
    ROUNDING,
    Lines,
    conditions_of,
    later_conditions_of,
    of_model,
    read_run,
    recorded_components,
)
from des.evaluation.results import Score, read_scores
from des.evaluation.scorer_identity import detector_identity
from des.generation.defences import METHODS
from des.models.checkpoints import read_metadata
from des.report.plots import LOSSES
from des.utils.errors import UserError, not_found
from des.utils.files import sha256_texts
from des.utils.folders import walk
from des.utils.logs import logger

ORIGINAL = "none"
ATTACK = "attack.json"
NULL_ATTACK = "random_prefix"  # it searches for nothing, so it says nothing about what an attack can reach
OF_ATTACKED = (
    "training_method",
    "components",
    "detector",
    "attack",
    "concept_words",
)  # an attack's settings that are not its search's
_METADATA = "-metadata.json"
Key = tuple[int, int]  # row and copy


@dataclass(frozen=True)
class ImageRun:
    """A folder of images of one model and prompt list, with their scores."""

    folder: Path
    record: dict[str, Any]
    lines: Lines
    scores: tuple[Score, ...]

    @property
    def settings(self) -> dict[str, Any]:
        return self.record["settings"]

    @property
    def method(self) -> str:
        return str(self.settings.get("training_method"))

    @property
    def base_path(self) -> str:
        """The original model's path or hub id, as given on the command line."""
        arguments = self.settings | self.record["made_by"]["arguments"]
        return str(arguments.get("base_model_path") or arguments.get("model_path"))

    @property
    def base(self) -> str:
        """The original model's name, as in the path of the results."""
        return Path(self.base_path).name

    @cached_property
    def base_facts(self) -> dict[str, str]:
        """Recorded hashes of the original model's components, for `same_base`; components that the method changed are left out.

        For a text encoder that DES changed, this is the original's fingerprint from the checkpoint's metadata, if recorded.
        """
        changed = _changed_components(self.method)
        if changed is None:
            return {}
        facts = {name: value for name, value in recorded_components(self.record).items() if name not in changed}
        for name, value in self.settings.items():
            component = name.removesuffix("_sha256")
            if name.startswith("text_encoder") and component != name and component not in changed:
                facts[name] = str(value)
        protection = self.record.get("protection")
        for i, each in protection.items() if isinstance(protection, dict) else ():
            if i.isdecimal() and isinstance(each, dict) and each.get("base_encoder_sha256"):
                facts[f"text_encoder{'' if i == '1' else f'_{i}'}_sha256"] = str(each["base_encoder_sha256"])
        return facts

    @cached_property
    def identity(self) -> str:
        """A hash that identifies a protected model: the method, and the hashes of text encoders, UNet and adapter."""
        hashes = {name: self.settings[name] for name in sorted(self.settings) if of_model(name)}
        model = None
        if _changed_components(self.method) is None:
            model = recorded_components(self.record) or self.settings.get("model_path")
        return sha256_texts([self.method, json.dumps(hashes, sort_keys=True), str(model)])

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """The settings that compared runs must share (`des.data.run_record.conditions_of`)."""
        return conditions_of(self.settings)

    @cached_property
    def later_conditions(self) -> dict[str, Any]:
        """Conditions that earlier records lack; they are compared only if both runs have them."""
        return later_conditions_of(self.settings)

    @cached_property
    def drawn(self) -> dict[Key, dict[str, Any]]:
        """The manifest's lines by row and copy."""
        return dict(sorted(((line["row"], line["copy"]), line) for line in self.lines.values()))

    @cached_property
    def key(self) -> str:
        """A hash of conditions, rows and seeds. Runs with equal keys can be compared image by image, unless `later_conditions` differ."""
        seeds = [[*key, line["seed"]] for key, line in self.drawn.items()]
        return sha256_texts([json.dumps(self.conditions, sort_keys=True), json.dumps(seeds)])


def same_conditions(first: ImageRun, second: ImageRun) -> bool:
    """Whether two runs have the same prompts, settings and seeds, as far as both records hold them."""
    shared = first.later_conditions.keys() & second.later_conditions.keys()
    return first.key == second.key and all(first.later_conditions[name] == second.later_conditions[name] for name in shared)


def same_base(first: ImageRun, second: ImageRun) -> bool:
    """Whether two runs can be of one original model: no `base_facts` that both records have differ.

    If one record has no identities of components (earlier releases), the model's path must be equal too.
    """
    shared = first.base_facts.keys() & second.base_facts.keys()
    if any(first.base_facts[name] != second.base_facts[name] for name in shared):
        return False
    return any(name in shared for name in recorded_components(first.record)) or _base_folder(first) == _base_folder(second)


def _base_folder(run: ImageRun) -> str:
    """The original model's resolved folder if it exists, else its path or hub id as given."""
    path = Path(run.base_path)
    return str(path.resolve() if path.is_dir() else path)


def _changed_components(method: str) -> set[str] | None:
    """The components of the pipeline that a method changes; None if it replaces the whole pipeline, as SafeGen does."""
    options = METHODS[method].options if method in METHODS else ("model_path",)
    if "model_path" in options:
        return None
    return {"unet" if option == "adapter_path" else option.removesuffix("_path") for option in options}


@dataclass(frozen=True)
class TrainingRun:
    """A folder of checkpoints, the metadata of the last one, and the losses of every step (empty if there is no log of them)."""

    folder: Path
    checkpoint: Path  # without its suffix
    metadata: dict[str, Any]
    steps: tuple[dict[str, float], ...]


@dataclass(frozen=True)
class AttackPair:
    """The cells of attack.json under one condition; `attacked` is None if no model but the original one was attacked."""

    names: bool  # whether the prompts kept the concept's names
    attacked: dict[str, Any] | None
    control: dict[str, Any]  # of the original model
    weak: bool  # whether the control is below its floor


@dataclass(frozen=True)
class AttackRun:
    """The result of an attack in a folder: `content` is attack.json."""

    folder: Path
    content: dict[str, Any]

    @cached_property
    def pairs(self) -> list[AttackPair]:
        """The conditions of the attack, with the concept's names first."""
        cells = {(each["model"], each["names"]): each for each in self.content["cells"].values()}
        return [
            AttackPair(
                names, cells.get(("attacked", names)), control, control["any"]["fraction"] < self.content["control_floor"]
            )
            for names in (True, False)
            if (control := cells.get(("original", names)))
        ]

    @cached_property
    def models(self) -> dict[str, ImageRun]:
        """The record of each cell's model, by the cell's name, in the form of a run without images; the attacked model's come first."""
        made = {"made_by": self.content["made_by"]}
        records = {
            name: {
                "settings": each,
                "protection": {} if each["training_method"] == ORIGINAL else self.content["protection"],
                **made,
            }
            for name, each in self.content["settings"].items()
        }
        runs = {name: ImageRun(self.folder, record, {}, ()) for name, record in records.items()}
        return dict(sorted(runs.items(), key=lambda item: (item[1].method == ORIGINAL, item[0])))

    @property
    def model(self) -> ImageRun:
        """The record of the attacked model, or of the original one if no other was attacked."""
        return next(iter(self.models.values()))

    @cached_property
    def search(self) -> str:
        """The attack's name with a hash of its settings; equal for the same attack on another model."""
        settings = {
            name: value
            for name, value in self.model.settings.items()
            if name not in (*OF_ATTACKED, *LABELS, ROUNDING) and not of_model(name)
        }
        return f"{self.content['attack']} {sha256_texts([json.dumps(settings, sort_keys=True)])}"

    @property
    def what(self) -> str:
        """The title of what the detector counts, as in scores."""
        return self.content["what"]

    @property
    def detector(self) -> str:
        """The identity of the detector, as in scores."""
        return detector_identity(next(iter(self.content["detector"].values())))


def is_on_one_of(attack: AttackRun, runs: Sequence[ImageRun]) -> bool:
    """Whether an attack is on the model of one of the runs, and its control on the original model of all of them."""
    if not all(same_base(model, run) for model in attack.models.values() for run in runs):
        return False
    originals = {run.identity for run in runs if run.method == ORIGINAL}
    others = {model.identity for model in attack.models.values()} - {attack.model.identity}
    return attack.model.identity in {run.identity for run in runs} and (not originals or others <= originals)


def collect_attacks(roots: Sequence[Path]) -> list[AttackRun]:
    """Find all results of attacks in folders and their subfolders; raises UserError for a damaged one."""
    return [AttackRun(folder, read_attack(folder / ATTACK)) for folder in _folders(roots) if (folder / ATTACK).exists()]


def collect(roots: Sequence[Path]) -> tuple[list[ImageRun], list[TrainingRun]]:
    """Find all runs in folders and their subfolders, sorted by path.

    Raises UserError for a missing folder, if there is no run of images, and for an incomplete run: a missing record or manifest,
    missing or changed images, scores that are damaged or about other images.
    """
    images, trainings = [], []
    for folder in _folders(roots):
        if (folder / "run.json").exists() or (folder / manifest.NAME).exists():
            images.append(read_images(folder))
        found = read_training(folder)
        if found:
            trainings.append(found)
    if not images:
        raise UserError(f"no run of generate.py (run.json with {manifest.NAME}) was found in {', '.join(map(str, roots))}")
    return images, trainings


def _folders(roots: Sequence[Path]) -> list[Path]:
    """All folders in the roots, once each, without hidden and linked ones; OSError for a folder that cannot be listed."""
    found: dict[Path, Path] = {}
    for root in roots:
        if not root.is_dir():
            raise not_found("the folder", root)
        for folder, _, _ in walk(root):
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def read_images(folder: Path) -> ImageRun:
    """Read a run, and check that its images are those of its manifest and that its scores are about them."""
    record, lines = read_run(folder)
    try:
        every = [(line["row"], line["copy"], line["seed"], line["sha256"]) for line in lines.values()]
        sorted(every, key=lambda each: each[:3])
    except (KeyError, TypeError):
        raise UserError(f"{folder / manifest.NAME} is of an earlier release or damaged; generate the images again") from None
    check_complete(folder, option=None)
    if any(digest for *_, digest in every):
        image_hashes(folder)
    return ImageRun(folder, record, lines, tuple(read_scores(folder, lines)))


def read_training(folder: Path) -> TrainingRun | None:
    """Read the training run of a folder from the metadata of its last checkpoint; None without a checkpoint."""
    found = {}
    for path in folder.glob(f"*{_METADATA}"):
        checkpoint = path.with_name(path.name.removesuffix(_METADATA))
        metadata = read_metadata(checkpoint.with_name(f"{checkpoint.name}.pt"))
        if "made_by" in metadata and isinstance(metadata.get("epoch"), int):
            found[metadata["epoch"], checkpoint.name] = checkpoint, metadata
    if not found:
        if (folder / "metrics.jsonl").exists():
            logger.warning("%s has losses and no checkpoint yet; it is left out", folder)
        return None
    checkpoint, metadata = found[max(found)]
    return TrainingRun(folder, checkpoint, metadata, read_losses(folder / "metrics.jsonl"))


def read_losses(path: Path) -> tuple[dict[str, float], ...]:
    """Read the losses of every step; empty without a file, UserError if it is damaged."""
    if not path.is_file():
        return ()
    try:
        steps = tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        if not all(math.isfinite(step[key]) for step in steps for key in ("step", *LOSSES)):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} cannot be read as losses, one JSON object a step; move it away to leave the curves out"
        ) from None
    return steps
