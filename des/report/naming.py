"""Names of models and sets, by what tells them apart, and which models differ by their training seed only."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from des.report.collect import ORIGINAL, ImageRun
from des.utils.files import sha256_texts

_TOLD = {
    "learning_rate": "lr {}", "lambda_safe": "λ {}", "concept_guidance_scale": "α {}", "epoch": "epoch {}", "batch_size": "batch {}",
    "seed": "seed {}", "ablation": "losses {}", "target": "target {}",
}  # fmt: skip
_OUTCOMES = ("seed", "file", "file_sha256", "encoder_sha256", "embeddings", "made_by")  # of a checkpoint's metadata
_NOT_TRAINING = (
    "seed",
    "output_dir",
    "safe_embedding_path",
    "device",
    "log_file",
    "resume",
    "report_to",
)  # of its command line


def model_labels(runs: list[ImageRun], seeds: bool = True) -> list[str]:
    """Short names of models, by what tells them apart: the method, then how the encoder was trained, then where it is.

    Without `seeds` models that differ by their training seed only share a name.
    """
    facts = [_training_facts(run) for run in runs]
    protected = [told for run, told in zip(runs, facts, strict=True) if run.method == "des"]
    vary = [key for key in _TOLD if len({str(told.get(key)) for told in protected}) > 1 and (seeds or key != "seed")]
    labels = []
    for run, told in zip(runs, facts, strict=True):
        name = "original" if run.method == ORIGINAL else "DES" if run.method == "des" else run.method
        labels.append(" ".join([name, *(_TOLD[key].format(_short(told[key])) for key in vary if key in told)]))
    if not seeds:
        return labels
    times = Counter(labels)
    for i, run in enumerate(runs):
        if times[labels[i]] > 1:
            path = run.record["made_by"]["arguments"].get("text_encoder_path")
            labels[i] += f" {'/'.join(Path(str(path)).parts[-2:])}" if path else f" {run.identity[:6]}"
    return [
        label if labels.count(label) == 1 else f"{label} {run.identity[:6]}" for label, run in zip(labels, runs, strict=True)
    ]


def seed_groups(runs: list[ImageRun]) -> list[str]:
    """A key for each model's run, equal for models that were trained alike but for the seed; a key of its own where that is unknown."""
    keys = [_training_key(run) for run in runs]
    times = Counter(keys)
    seeds = {
        key: {_training_facts(run).get("seed") for run, own in zip(runs, keys, strict=True) if own == key} for key in times
    }
    return [key if key and len(seeds[key]) == times[key] else run.identity for run, key in zip(runs, keys, strict=True)]


def _training_key(run: ImageRun) -> str | None:
    """A hash of how all of a model's encoders were trained, but for the seed; None where the record does not say."""
    protection = run.record.get("protection")
    if run.method != "des" or not isinstance(protection, dict) or not protection:
        return None
    told: dict[str, Any] = {}
    for index, each in protection.items():
        made_by = each.get("made_by") if isinstance(each, dict) else None
        arguments = made_by.get("arguments") if isinstance(made_by, dict) else None
        if not isinstance(arguments, dict) or "seed" not in each:
            return None
        settings = {name: value for name, value in each.items() if name not in _OUTCOMES}
        told[index] = [settings, {name: value for name, value in arguments.items() if name not in _NOT_TRAINING}]
    return sha256_texts([json.dumps(told, sort_keys=True)])


def _training_facts(run: ImageRun) -> Mapping[str, Any]:
    """What the record of a run says of how its first protected encoder was trained."""
    protection = run.record.get("protection")
    told = [each for each in protection.values() if isinstance(each, dict)] if isinstance(protection, dict) else []
    return told[0] if told else {}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "".join(map(str, value)) if isinstance(value, list) else str(value)


def set_names(runs: list[ImageRun]) -> list[str]:
    """Names of sets: their folders', with the settings that differ where several share one."""
    names = []
    for run in runs:
        same = [other for other in runs if other.folder.name == run.folder.name]
        vary = [name for name, value in run.conditions.items() if any(other.conditions.get(name) != value for other in same)]
        told = ", ".join(f"{name.replace('_', ' ')} {str(run.conditions[name])[:8]}" for name in vary[:3])
        told = told or (f"{len(run.drawn)} images" if len(same) > 1 else "")
        names.append(f"{run.folder.name} ({told})" if told else run.folder.name)
    return [name if names.count(name) == 1 else f"{name} {run.key[:6]}" for name, run in zip(names, runs, strict=True)]
