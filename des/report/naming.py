"""Labels of models, sets and attacks by the settings in which they differ, and groups of models that differ only in the training seed."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from des.report.collect import OF_ATTACKED, ORIGINAL, AttackRun, ImageRun
from des.utils.files import sha256_texts

_FACTS = {
    "learning_rate": "lr {}", "lambda_safe": "λ {}", "concept_guidance_scale": "α {}", "epoch": "epoch {}", "batch_size": "batch {}",
    "seed": "seed {}", "ablation": "losses {}", "target": "target {}",
}  # fmt: skip
_WORDS = {  # of settings in the names of sets
    "num_inference_steps": "{} steps", "guidance_scale": "guidance {}", "height": "height {}", "width": "width {}",
    "scheduler": "{}", "prompts_sha256": "prompt list", "scheduler_sha256": "scheduler settings",
}  # fmt: skip
_DEMO_SETS = {  # names of the demo's sets, by their prompt lists
    "demo_plain.csv": "plain name", "demo_synonyms.csv": "held-out names", "demo_indirect.csv": "held-out phrases",
    "demo_benign.csv": "other objects", "demo_neighbour.csv": "near neighbour",
}  # fmt: skip
_ATTACKS = {
    "mma": "MMA-Diffusion", "ring_a_bell": "Ring-A-Bell", "concept_inversion": "concept inversion", "uda": "UnlearnDiffAtk",
    "p4d": "P4D", "random_prefix": "random prefix",
}  # fmt: skip
_OF_ATTACKS = ("tokens", "objective", "steps")  # settings that the label of an attack always has
# metadata and arguments that do not belong to the training settings
_OUTCOMES = ("seed", "file", "file_sha256", "encoder_sha256", "embeddings", "made_by")
_NOT_TRAINING = ("seed", "output_dir", "safe_embedding_path", "device", "log_file", "resume", "report_to")


def model_labels(runs: list[ImageRun], seeds: bool = True) -> list[str]:
    """Short labels of models: the method, then the training settings that differ, then the path if labels are still equal.

    Without `seeds`, models that differ only in the training seed share a label.
    """
    facts = [_training_facts(run) for run in runs]
    protected = [known for run, known in zip(runs, facts, strict=True) if run.method == "des"]
    vary = [key for key in _FACTS if len({str(known.get(key)) for known in protected}) > 1 and (seeds or key != "seed")]
    labels = []
    for run, known in zip(runs, facts, strict=True):
        name = "original" if run.method == ORIGINAL else "DES" if run.method == "des" else run.method
        labels.append(" ".join([name, *(_FACTS[key].format(_short(known[key])) for key in vary if key in known)]))
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
    """One key per run, equal for models that differ only in the training seed; unique if the training settings are unknown."""
    keys = [_training_key(run) for run in runs]
    times = Counter(keys)
    seeds = {
        key: {_training_facts(run).get("seed") for run, other in zip(runs, keys, strict=True) if other == key} for key in times
    }
    return [key if key and len(seeds[key]) == times[key] else run.identity for run, key in zip(runs, keys, strict=True)]


def _training_key(run: ImageRun) -> str | None:
    """A hash of the training settings of all encoders of a model, without the seed; None if they are not recorded."""
    protection = run.record.get("protection")
    if run.method != "des" or not isinstance(protection, dict) or not protection:
        return None
    training: dict[str, Any] = {}
    for index, each in protection.items():
        made_by = each.get("made_by") if isinstance(each, dict) else None
        arguments = made_by.get("arguments") if isinstance(made_by, dict) else None
        if not isinstance(arguments, dict) or "seed" not in each:
            return None
        settings = {name: value for name, value in each.items() if name not in _OUTCOMES}
        training[index] = [settings, {name: value for name, value in arguments.items() if name not in _NOT_TRAINING}]
    return sha256_texts([json.dumps(training, sort_keys=True)])


def _training_facts(run: ImageRun) -> Mapping[str, Any]:
    """The recorded training settings of the first protected encoder of a run; empty if there are none."""
    protection = run.record.get("protection")
    found = [each for each in protection.values() if isinstance(each, dict)] if isinstance(protection, dict) else []
    return found[0] if found else {}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "".join(map(str, value)) if isinstance(value, list) else str(value)


def set_names(runs: list[ImageRun]) -> list[str]:
    """Names of sets from their folders' names, with the settings that differ if several folders share a name.

    The sets of the demo's prompt lists are named in words.
    """
    names = []
    for run in runs:
        same = [other for other in runs if other.folder.name == run.folder.name]
        differing = [_setting(name, same, run) for name in run.conditions | run.later_conditions]
        settings = ", ".join([each for each in differing if each][:3]) or (f"{len(run.drawn)} images" if len(same) > 1 else "")
        listed = Path(str(run.record["made_by"]["arguments"].get("prompts_csv"))).name
        name = _DEMO_SETS.get(listed) or run.folder.name.replace("_", " ")
        names.append(f"{name} ({settings})" if settings else name)
    return [name if names.count(name) == 1 else f"{name}, set {names[: i + 1].count(name)}" for i, name in enumerate(names)]


def _setting(name: str, runs: Sequence[ImageRun], run: ImageRun) -> str:
    """A setting of `run` as text, such as `50 steps`, or `prompt list 2` for a hash; empty if it is equal in all `runs`."""
    values = list(dict.fromkeys(str((each.conditions | each.later_conditions).get(name)) for each in runs))
    value = (run.conditions | run.later_conditions).get(name)
    if len(values) < 2:
        return ""
    if name.endswith("_sha256"):
        return f"{_WORDS.get(name, name.removesuffix('_sha256').replace('_', ' '))} {values.index(str(value)) + 1}"
    return _WORDS.get(name, f"{name.replace('_', ' ')} {{}}").format("default" if value is None else str(value)[:40])


def attack_labels(attacks: Sequence[AttackRun]) -> list[tuple[str, str]]:
    """The name of each attack, and its folder with the settings that tell it from others of that name: `mma: tokens 16, steps 60`."""
    labels = []
    for attack in attacks:
        name = attack.content["attack"]
        same = [other.model.settings for other in attacks if other.content["attack"] == name]
        settings = {
            key: each for key, each in attack.model.settings.items() if key not in OF_ATTACKED and not key.endswith("_sha256")
        }
        vary = [key for key in settings if key not in _OF_ATTACKS and len({str(other.get(key)) for other in same}) > 1]
        shown = [
            f"{key.replace('_', ' ')} {_short(settings[key])}" for key in (*_OF_ATTACKS, *vary) if settings.get(key) is not None
        ]
        labels.append((_ATTACKS.get(name, name), ": ".join([attack.folder.name, *([", ".join(shown)] if shown else [])])))
    return labels
