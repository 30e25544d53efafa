"""The provenance section of the page: settings, versions, hashes, commit and command line of every run and score.

The page is meant to be shared, so paths outside the working directory are shortened, and no prompt of a list is shown.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from des.report.collect import ATTACK, AttackRun, ImageRun, TrainingRun

_PARTS = 3  # last parts shown of a path outside the working directory
_NOT_SHOWN = ("prompt",)
_SPELT = {("img_batch_classify.py", "device"): "devices", ("img_batch_classify_q16.py", "device"): "devices"}
_TRAINING = (
    "epoch", "learning_rate", "lambda_safe", "concept_prompt", "concept_guidance_scale", "concept_norm", "batch_size", "ablation",
    "concept_term", "target", "seed", "precision", "optimizer", "embedding", "sequence_length", "base_encoder_sha256", "encoder_sha256",
    "file_sha256", "embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class ProvenanceEntry:
    """The origin of a run or score: a title, facts by name, and the command line."""

    title: str
    facts: dict[str, str]
    command: str


def of_images(run: ImageRun, title: str) -> list[ProvenanceEntry]:
    """The origin of a run's images, and of each score about them."""
    made_by = run.record["made_by"]
    facts = {name: display(value) for name, value in run.settings.items() if value is not None and value is not False}
    facts |= {"images": str(len(run.lines)), "left out": str(len(run.record.get("left_out") or []))}
    entries = [ProvenanceEntry(f"{title}: images in {short_path(run.folder)}", facts | machine(made_by), command(made_by))]
    for path, content in {score.path: score.content for score in run.scores}.items():
        skipped = ("images", "classes", "made_by", "unreadable")
        shown = {name: display(value) for name, value in content.items() if name not in skipped}
        made_by = content["made_by"] if isinstance(content.get("made_by"), dict) else {}
        entries.append(ProvenanceEntry(f"{title}: {path.name}", shown | machine(made_by), command(made_by)))
    return entries


def of_training(run: TrainingRun, title: str) -> ProvenanceEntry:
    """The origin of a checkpoint."""
    made_by = run.metadata["made_by"]
    facts = {name: display(run.metadata[name]) for name in _TRAINING if name in run.metadata}
    return ProvenanceEntry(f"{title}: {short_path(run.checkpoint)}", facts | machine(made_by), command(made_by))


def of_attack(attack: AttackRun, title: str) -> ProvenanceEntry:
    """The origin of an attack's result, with the settings of the attacked model's first cell."""
    content, made_by = attack.content, attack.content["made_by"]
    facts = {name: display(value) for name, value in attack.model.settings.items() if value is not None and value is not False}
    facts |= {"rows": str(len(content["rows"])), "left out": str(content.get("never_drawn", 0))}
    facts |= {
        name: display(content[name]) for name in ("control_floor", "paper_control", "detector") if content.get(name) is not None
    }
    return ProvenanceEntry(f"{title}: {short_path(attack.folder / ATTACK)}", facts | machine(made_by), command(made_by))


def machine(made_by: Mapping[str, Any]) -> dict[str, str]:
    """The commit, versions and kind of device."""
    versions = made_by.get("versions")
    shown = {"commit": made_by.get("git_commit"), "python": made_by.get("python"), "device": made_by.get("device")}
    shown |= versions if isinstance(versions, dict) else {}
    return {name: display(value) for name, value in shown.items() if value is not None}


def command(made_by: Mapping[str, Any]) -> str:
    """The command line, from the recorded arguments."""
    arguments = made_by.get("arguments")
    words = ["python", str(made_by.get("script", ""))]
    for name, value in (arguments if isinstance(arguments, dict) else {}).items():
        if name == "concept_term":  # train_des.py's --no_concept_term
            name, value = "no_concept_term", value is False
        if value is None or value is False or value == []:  # by identity, since 0 is a value and equals False
            continue
        if name in _NOT_SHOWN:
            value = "…"
        words += [
            f"--{_SPELT.get((words[1], name), name)}",
            *(display(each) for each in (value if isinstance(value, list) else [value]) if each is not True),
        ]
    return " ".join(word if word == "…" else shlex.quote(word) for word in words)


def display(value: Any) -> str:
    """A recorded value as text; absolute paths are shortened."""
    if isinstance(value, dict | list):
        return json.dumps(_cut(value), ensure_ascii=False)
    return _cut(str(value)) if isinstance(value, str | Path) else f"{value}"


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _cut(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_cut(each) for each in value]
    return short_path(Path(value)) if isinstance(value, str) and value.startswith("/") and "\n" not in value else value


def short_path(path: Path) -> str:
    """A path relative to the working directory, or the last parts of a path outside it."""
    if not path.is_absolute():
        return str(path)
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return "/".join(("…", *path.parts[1:][-_PARTS:]))
