"""Finding runs below folders: images that generate.py drew with their scores, and checkpoints that train_des.py made."""

import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from des.data import manifest
from des.data.claims import check_complete
from des.data.image_folders import image_hashes
from des.data.run_record import RECORD_FIELDS, SINCE_2, Lines, Sampling, read_run, recorded_components
from des.evaluation.results import Score, read_scores
from des.generation.defences import METHODS
from des.models.checkpoints import read_metadata
from des.report.plots import LOSSES
from des.utils.errors import UserError
from des.utils.files import sha256_texts
from des.utils.folders import walk
from des.utils.logs import logger

ORIGINAL = "none"
_ROUNDING = "deterministic"  # changes the rounding of images only, so runs compare with and without it
_METADATA = "-metadata.json"
Key = tuple[int, int]  # row and copy
_METHOD_OPTIONS = {option for method in METHODS.values() for option in method.options}


@dataclass(frozen=True)
class ImageRun:
    """A folder of images of one model and prompt list, with the scores about them."""

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
        """The original model's path or hub id, as it was given."""
        arguments = self.settings | self.record["made_by"]["arguments"]
        return str(arguments.get("base_model_path") or arguments.get("model_path"))

    @property
    def base(self) -> str:
        """The original model's name, as results are filed under it."""
        return Path(self.base_path).name

    @cached_property
    def base_facts(self) -> dict[str, str]:
        """What the record says of the original model, which `same_base` compares; components that the method changed are not in it.

        Of a text encoder that DES changed, the fingerprint of the original is known where the checkpoint's metadata was there.
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
        """What tells protected models apart: the method, and the hashes of text encoders, UNet and adapter."""
        own = {name: self.settings[name] for name in sorted(self.settings) if _of_model(name)}
        model = None
        if _changed_components(self.method) is None:
            model = recorded_components(self.record) or self.settings.get("model_path")
        return sha256_texts([self.method, json.dumps(own, sort_keys=True), str(model)])

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """The settings that two runs must share for a comparison: the sampling, the scheduler, and hashes of prompts and input images.

        A setting that an older record lacks has its default.
        """
        defaults = {each.name: None if each.default is MISSING else each.default for each in fields(Sampling)}
        names = [name for name in self.settings if name.endswith("_sha256") and not _of_model(name)]
        values = {name: self.settings.get(name, defaults.get(name)) for name in (*defaults, "scheduler", *names)}
        return {name: value for name, value in values.items() if name != _ROUNDING and name not in SINCE_2}

    @cached_property
    def later_conditions(self) -> dict[str, Any]:
        """Conditions that records of the first format do not hold: they separate only runs that both have them."""
        return {name: self.settings[name] for name in SINCE_2 if name not in RECORD_FIELDS and name in self.settings}

    @cached_property
    def drawn(self) -> dict[Key, dict[str, Any]]:
        """The manifest's lines by row and copy."""
        return dict(sorted(((line["row"], line["copy"]), line) for line in self.lines.values()))

    @cached_property
    def key(self) -> str:
        """A hash of conditions, rows and seeds: equal for runs that can be compared image by image, unless `later_conditions` differ."""
        seeds = [[*key, line["seed"]] for key, line in self.drawn.items()]
        return sha256_texts([json.dumps(self.conditions, sort_keys=True), json.dumps(seeds)])


def same_conditions(first: ImageRun, second: ImageRun) -> bool:
    """Whether two runs drew the same prompts with the same settings and seeds, by all that both records hold."""
    shared = first.later_conditions.keys() & second.later_conditions.keys()
    return first.key == second.key and all(first.later_conditions[name] == second.later_conditions[name] for name in shared)


def same_base(first: ImageRun, second: ImageRun) -> bool:
    """Whether two runs can be of one original model: no fact about it differs that both records have.

    Where one of them has no identities of components, as in records of earlier releases, the model's path decides as well.
    """
    shared = first.base_facts.keys() & second.base_facts.keys()
    if any(first.base_facts[name] != second.base_facts[name] for name in shared):
        return False
    return any(name in shared for name in recorded_components(first.record)) or _place(first) == _place(second)


def _place(run: ImageRun) -> str:
    """The original model's folder, resolved where it is there; else its path as it was given, or its hub id."""
    path = Path(run.base_path)
    return str(path.resolve() if path.is_dir() else path)


def _changed_components(method: str) -> set[str] | None:
    """The components of the pipeline that a method changes; None where its whole pipeline is another one, as SafeGen's."""
    options = METHODS[method].options if method in METHODS else ("model_path",)
    if "model_path" in options:
        return None
    return {"unet" if option == "adapter_path" else option.removesuffix("_path") for option in options}


def _of_model(name: str) -> bool:
    """Whether a setting is the hash of a file that a method puts into the pipeline: a text encoder, UNet or adapter."""
    return name.endswith("_sha256") and f"{name.removesuffix('_sha256')}_path" in _METHOD_OPTIONS


@dataclass(frozen=True)
class TrainingRun:
    """A folder of checkpoints with the last one's metadata, and the losses of every step (none where they were not kept)."""

    folder: Path
    checkpoint: Path  # without its suffix
    metadata: dict[str, Any]
    steps: tuple[dict[str, float], ...]


def collect(roots: Sequence[Path]) -> tuple[list[ImageRun], list[TrainingRun]]:
    """The runs in folders and below them, by path.

    Raises UserError for a folder that is missing, for folders without any run of images, and for runs that are incomplete: no
    record or manifest, images that are missing or changed, scores that are damaged or about other images.
    """
    images, trainings = [], []
    for folder in _folders(roots):
        if (folder / "run.json").exists() or (folder / manifest.NAME).exists():
            images.append(read_images(folder))
        found = read_training(folder)
        if found:
            trainings.append(found)
    if not images:
        raise UserError(f"there is no run of generate.py (run.json with {manifest.NAME}) in {', '.join(map(str, roots))}")
    return images, trainings


def _folders(roots: Sequence[Path]) -> list[Path]:
    """Every folder below the roots that is not hidden, each once, links not followed; OSError for one that cannot be listed."""
    found: dict[Path, Path] = {}
    for root in roots:
        if not root.is_dir():
            raise UserError(f"there is no folder {root}")
        for place, _, _ in walk(root):
            found.setdefault(place.resolve(), place)
    return list(found.values())


def read_images(folder: Path) -> ImageRun:
    """A run whose images are those of its manifest, with scores that are about them."""
    record, lines = read_run(folder)
    try:
        every = [(line["row"], line["copy"], line["seed"], line["sha256"]) for line in lines.values()]
        sorted(every, key=lambda each: each[:3])
    except (KeyError, TypeError):
        raise UserError(f"{folder / manifest.NAME} is of an earlier release or damaged; draw the images again") from None
    check_complete(folder, option=None)
    if any(digest for *_, digest in every):
        image_hashes(folder)
    return ImageRun(folder, record, lines, tuple(read_scores(folder, lines)))


def read_training(folder: Path) -> TrainingRun | None:
    """The training run that a folder holds, if any, by the metadata of its last checkpoint."""
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
    """The losses of every step; none where there is no such file, UserError where it is damaged."""
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
