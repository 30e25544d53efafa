"""Before and after: which runs belong together, and the figures that a comparison rests on."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from des.cli import UserError
from des.records import Score
from des.report.collect import ORIGINAL, ImageRun

LOWER_IS_BETTER = ("asr", "fid")
_ORDER = ("asr", "accuracy", "mean", "fid")
_TOLD = {
    "learning_rate": "lr {}", "lambda_safe": "λ {}", "concept_guidance_scale": "α {}", "epoch": "epoch {}", "batch_size": "batch {}",
    "seed": "seed {}", "ablation": "losses {}", "target": "target {}",
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """The original or a protected model, as the columns of tables and the points of plots name it."""

    identity: str
    method: str
    label: str

    @property
    def original(self) -> bool:
        return self.method == ORIGINAL


@dataclass(frozen=True)
class Measure:
    """One row of the summary: what was measured on which set, and each model's score, None where it has none."""

    set_name: str
    kind: str
    title: str
    identity: str
    scores: tuple[Score | None, ...]


@dataclass(frozen=True)
class ImageSet:
    """One prompt list under one set of conditions, and the run of each model, by its number."""

    name: str
    runs: dict[int, ImageRun]


@dataclass(frozen=True)
class Comparison:
    """All runs of one original model and of those protected from it."""

    base: str
    models: tuple[Model, ...]
    sets: tuple[ImageSet, ...]
    measures: tuple[Measure, ...]

    @property
    def original(self) -> int | None:
        """The number of the original model, if its images are there."""
        return next((i for i, model in enumerate(self.models) if model.original), None)

    @property
    def protected(self) -> list[int]:
        return [i for i, model in enumerate(self.models) if not model.original]

    def of_kind(self, *kinds: str) -> list[Measure]:
        return [measure for measure in self.measures if measure.kind in kinds]


def compare(runs: Sequence[ImageRun]) -> list[Comparison]:
    """One comparison for each original model; UserError where two runs claim the same place."""
    return [_comparison(base, [run for run in runs if run.base == base]) for base in dict.fromkeys(run.base for run in runs)]


def _comparison(base: str, runs: list[ImageRun]) -> Comparison:
    of_model: dict[str, list[ImageRun]] = {}
    for run in sorted(runs, key=lambda run: run.method != ORIGINAL):
        of_model.setdefault(run.identity, []).append(run)
    if sum(theirs[0].method == ORIGINAL for theirs in of_model.values()) > 1:
        first, second = [theirs[0].folder for theirs in of_model.values() if theirs[0].method == ORIGINAL][:2]
        raise UserError(f"{first} and {second} are by two different original models {base}; make a report of each")
    labels = _labels([theirs[0] for theirs in of_model.values()])
    models = tuple(
        Model(identity, theirs[0].method, label) for (identity, theirs), label in zip(of_model.items(), labels, strict=True)
    )
    number = {model.identity: i for i, model in enumerate(models)}
    places: dict[tuple[str, str], dict[int, ImageRun]] = {}
    times = Counter((run.key, run.identity) for run in runs)
    repeated = {key for (key, _), count in times.items() if count > 1}  # one list under several names: those tell them apart
    for run in runs:
        place = places.setdefault((run.key, run.folder.name if run.key in repeated else ""), {})
        other = place.setdefault(number[run.identity], run)
        if other is not run:
            raise UserError(f"{other.folder} and {run.folder} are the same model's images of the same prompts; leave one out")
    names = _names([next(iter(place.values())) for place in places.values()])
    sets = [ImageSet(name, place) for name, place in zip(names, places.values(), strict=True)]
    sets.sort(key=lambda each: not any(score.kind == "asr" for run in each.runs.values() for score in run.scores))
    measures = sorted((one for each in sets for one in _measures(each, len(models))), key=lambda one: _ORDER.index(one.kind))
    return Comparison(base, models, tuple(sets), tuple(measures))


def _measures(images: ImageSet, models: int) -> list[Measure]:
    found: dict[tuple[str, str, str], dict[int, Score]] = {}
    for i, run in images.runs.items():
        for score in run.scores:
            place = found.setdefault((score.kind, score.title, score.identity), {})
            if i in place:
                raise UserError(f"{place[i].path} and {score.path} are the same measure of the same images; leave one out")
            place[i] = score
    return [Measure(images.name, *what, tuple(scores.get(i) for i in range(models))) for what, scores in found.items()]


def _labels(runs: list[ImageRun]) -> list[str]:
    """Short names of models, by what tells them apart: the method, then how the encoder was trained, then where it is."""
    facts = [_training_facts(run) for run in runs]
    protected = [told for run, told in zip(runs, facts, strict=True) if run.method == "des"]
    vary = [key for key in _TOLD if len({str(told.get(key)) for told in protected}) > 1]
    labels = []
    for run, told in zip(runs, facts, strict=True):
        name = "original" if run.method == ORIGINAL else "DES" if run.method == "des" else run.method
        labels.append(" ".join([name, *(_TOLD[key].format(_short(told[key])) for key in vary if key in told)]))
    times = Counter(labels)
    for i, run in enumerate(runs):
        if times[labels[i]] > 1:
            path = run.record["made_by"]["arguments"].get("text_encoder_path")
            labels[i] += f" {'/'.join(Path(str(path)).parts[-2:])}" if path else f" {run.identity[:6]}"
    return [
        label if labels.count(label) == 1 else f"{label} {run.identity[:6]}" for label, run in zip(labels, runs, strict=True)
    ]


def _training_facts(run: ImageRun) -> Mapping[str, Any]:
    """What the record of a run says of how its first protected encoder was trained."""
    protection = run.record.get("protection")
    told = [each for each in protection.values() if isinstance(each, dict)] if isinstance(protection, dict) else []
    return told[0] if told else {}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "".join(map(str, value)) if isinstance(value, list) else str(value)


def _names(runs: list[ImageRun]) -> list[str]:
    """Names of sets: their folders', with the settings that differ where several share one."""
    names = []
    for run in runs:
        same = [other for other in runs if other.folder.name == run.folder.name]
        vary = [name for name, value in run.conditions.items() if any(other.conditions.get(name) != value for other in same)]
        told = ", ".join(f"{name.replace('_', ' ')} {str(run.conditions[name])[:8]}" for name in vary[:3])
        told = told or (f"{len(run.drawn)} images" if len(same) > 1 else "")
        names.append(f"{run.folder.name} ({told})" if told else run.folder.name)
    return [name if names.count(name) == 1 else f"{name} {run.key[:6]}" for name, run in zip(names, runs, strict=True)]


@dataclass(frozen=True)
class Spread:
    """The mean of several figures, and the smallest and largest of them."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.fmean(values), min(values), max(values))

    def show(self, unit: str = "", digits: int = 1) -> str:
        """The mean, with the range where there is one."""
        mean, low, high = (f"{value:.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean}{unit}" + (f" ({low} to {high})" if low != high else "")


def pooled(measures: Sequence[Measure], models: int) -> list[Spread | None]:
    """Each model's mean over measures (every set counts the same), over those that all models with any of them have.

    None for a model without any, and for all where models share no set.
    """
    having = [i for i in range(models) if any(measure.scores[i] for measure in measures)]
    shared = [measure for measure in measures if all(measure.scores[i] for i in having)]
    return [
        Spread.of([measure.scores[i].value for measure in shared]) if i in having and shared else None for i in range(models)
    ]


def groups(measures: Sequence[Measure]) -> dict[tuple[str, str], list[Measure]]:
    """Measures by what they are (title and identity), over the sets."""
    found: dict[tuple[str, str], list[Measure]] = {}
    for measure in measures:
        found.setdefault((measure.title, measure.identity), []).append(measure)
    return found


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The numbers of the points (x, y) that no other beats, lower being better in both, by x."""
    best = [
        i for i, (x, y) in enumerate(points)
        if not any(u <= x and v <= y and (u, v) != (x, y) for u, v in points)
    ]  # fmt: skip
    return sorted(best, key=lambda i: points[i])


def headline(comparison: Comparison) -> list[str]:
    """What changed, in a phrase a measure that original and protected models share: `ASR of mushroom: 98.3% → 0.0%`.

    Accuracies of labels speak only where no mean and no FID does.
    """
    told, before = [], comparison.original
    kinds = ("asr", "mean", "fid") if comparison.of_kind("mean", "fid") else ("asr", "accuracy")
    for (title, _), measures in groups(comparison.of_kind(*kinds)).items():
        spreads = pooled(measures, len(comparison.models))
        after = [spreads[i].mean for i in comparison.protected if spreads[i]]
        if before is None or spreads[before] is None or not after:
            continue
        unit, digits = ("%", 1) if measures[0].kind in ("asr", "accuracy") else ("", 2)
        sets = f", {measures[0].set_name}" if len(measures) == 1 else f", mean of {len(measures)} sets"
        told.append(f"{title}{sets}: {spreads[before].mean:.{digits}f}{unit} → {Spread.of(after).show(unit, digits)}")
    return told
