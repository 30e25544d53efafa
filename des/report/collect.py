"""Finding runs below folders: images that generate.py drew with their scores, and checkpoints that train_des.py made."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from des import manifest
from des.checkpoints import read_metadata
from des.cli import UserError, logger
from des.folders import walk
from des.images import image_hashes
from des.plots import LOSSES
from des.records import Lines, Score, read_run, read_scores
from des.results import sha256_texts

ORIGINAL = "none"
_OF_THE_MODEL = ("training_method", "model_path", "base_model_path", "unet_sha256", "adapter_sha256", "components")
_OF_NO_PIXEL = ("discard_images", "deterministic")
_METADATA = "-metadata.json"
Key = tuple[int, int]  # row and copy


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
    def base(self) -> str:
        """The original model's name, as results are filed under it."""
        return Path(str(self.settings.get("base_model_path") or self.settings.get("model_path"))).name

    @cached_property
    def identity(self) -> str:
        """What tells protected models apart: the method, and the hashes of text encoders, UNet and adapter."""
        own = {name: self.settings[name] for name in sorted(self.settings) if name.endswith("_sha256") and _of_model(name)}
        model = self.settings.get("model_path") if self.method == "safegen" else None
        return sha256_texts([self.method, json.dumps(own, sort_keys=True), str(model)])

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """The settings that two runs must share for a comparison: all but those of the model."""
        return {name: value for name, value in self.settings.items() if not _of_model(name) and name not in _OF_NO_PIXEL}

    @cached_property
    def drawn(self) -> dict[Key, dict[str, Any]]:
        """The manifest's lines by row and copy."""
        return dict(sorted(((line["row"], line["copy"]), line) for line in self.lines.values()))

    @cached_property
    def key(self) -> str:
        """A hash of conditions, rows and seeds: equal for runs that can be compared image by image."""
        seeds = [[*key, line["seed"]] for key, line in self.drawn.items()]
        return sha256_texts([json.dumps(self.conditions, sort_keys=True), json.dumps(seeds)])


def _of_model(name: str) -> bool:
    return name in _OF_THE_MODEL or (name.startswith("text_encoder") and name.endswith("_sha256"))


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
