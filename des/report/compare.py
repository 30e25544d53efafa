"""Compare runs of an original model with runs of models protected from it."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from des.evaluation.results import Score
from des.report.collect import ATTACK, NULL_ATTACK, ORIGINAL, AttackRun, ImageRun, is_on_one_of, same_base, same_conditions
from des.report.naming import model_labels, seed_groups, set_names
from des.report.provenance import short_path
from des.utils.errors import UserError
from des.utils.logs import logger

LOWER_IS_BETTER = ("asr", "attacked", "benign_hits", "fid", "kid", "lpips")
SHARES = ("asr", "attacked", "benign_hits", "accuracy")  # percentages
_ORDER = ("asr", "attacked", "benign_hits", "accuracy", "mean", "fid", "kid", "lpips")
WORST = "worst white-box attack"  # shown in place of a prompt list's name
BENIGN = "benign"  # reproduce.py's name of its benign set, which not every table scores for quality
_MOST_NAMED = 4  # models that a phrase of the headline lists


@dataclass(frozen=True)
class Model:
    """The original or a protected model: a column of the tables and a point of the plots.

    Models of one `seed_group` differ only in the training seed; `group_label` is their common label.
    """

    identity: str
    method: str
    label: str
    seed_group: str
    group_label: str

    @property
    def original(self) -> bool:
        return self.method == ORIGINAL


@dataclass(frozen=True)
class Measure:
    """One row of the summary: what was measured on which set, and the score of each model or None."""

    set_name: str
    kind: str
    title: str
    identity: str
    scores: tuple[Score | None, ...]
    benign: bool = False  # whether the set is one of benign prompts


@dataclass(frozen=True)
class ImageSet:
    """One prompt list under one set of conditions, and the runs by the index of their model."""

    name: str
    runs: dict[int, ImageRun]
    benign: bool

    @property
    def title(self) -> str:
        """A heading such as `Attack prompts: plain`."""
        scored = any(score.kind == "asr" for run in self.runs.values() for score in run.scores)
        return f"{'Benign prompts' if self.benign else 'Attack prompts' if scored else 'Prompts'}: {self.name}"


@dataclass(frozen=True)
class Comparison:
    """All runs of one original model and of those protected from it."""

    base: str
    models: tuple[Model, ...]
    sets: tuple[ImageSet, ...]
    measures: tuple[Measure, ...]
    attacks: tuple[AttackRun, ...] = ()

    @property
    def original(self) -> int | None:
        """The index of the original model; None if there are no images of it."""
        return next((i for i, model in enumerate(self.models) if model.original), None)

    @property
    def protected(self) -> list[int]:
        return [i for i, model in enumerate(self.models) if not model.original]

    @property
    def seed_groups(self) -> list[list[int]]:
        """The indices of the protected models; those that differ only in the training seed are one group."""
        found: dict[str, list[int]] = {}
        for i in self.protected:
            found.setdefault(self.models[i].seed_group, []).append(i)
        return list(found.values())

    def of_kind(self, *kinds: str) -> list[Measure]:
        return [measure for measure in self.measures if measure.kind in kinds]

    @property
    def quality(self) -> list[Measure]:
        """Measures of benign images: mean scores, FID and KID; accuracies of labels if there are none."""
        measures = [measure for measure in self.of_kind("mean", "fid", "kid") if measure.benign]
        return measures or [measure for measure in self.of_kind("accuracy") if measure.benign]


def compare(
    runs: Sequence[ImageRun], benign_sets: Sequence[str] | None = None, attacks: Sequence[AttackRun] = ()
) -> list[Comparison]:
    """Make one comparison for each original model; see `same_base`.

    `benign_sets` names the sets of benign prompts by their folders; None takes those that are called `benign` or are scored for
    quality (FID, a mean score, labels). `attacks` on models that no run is of are in no comparison. Raises UserError if two runs are
    of the same model and prompts, if a run or an attack fits several original models, and for a name that no set has.
    """
    unknown = sorted(set(benign_sets or ()) - {run.folder.name for run in runs})
    if unknown:
        names = ", ".join(sorted({run.folder.name for run in runs}))
        raise UserError(f"--benign_sets: no folder of images is called {unknown[0]}; choose from {names}")
    groups = _grouped(runs, same_base, lambda run: len(run.base_facts), "the original model")
    titles, places = _base_titles(groups), _places(attacks, groups)
    return [_comparison(*each, benign_sets) for each in zip(titles, groups, places, strict=True)]


def _places(attacks: Sequence[AttackRun], groups: Sequence[list[ImageRun]]) -> list[list[AttackRun]]:
    """The attacks on the models of each group of runs, with a warning for attacks on other models."""
    places: list[list[AttackRun]] = [[] for _ in groups]
    for attack in attacks:
        fitting = [place for place, runs in zip(places, groups, strict=True) if is_on_one_of(attack, runs)]
        if len(fitting) > 1:
            raise UserError(f"{attack.folder / ATTACK} fits several original models; make a report of each")
        if not fitting:
            logger.warning(
                "%s is about a model without images in these folders; the page names it without its figures", attack.folder
            )
        for place in fitting:
            place.append(attack)
    return places


def _base_titles(groups: Sequence[list[ImageRun]]) -> list[str]:
    """The names of original models, with their paths if several models share a name, and a warning then."""
    names = [group[0].base for group in groups]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        folders = "; ".join(str(group[0].folder) for group, other in zip(groups, names, strict=True) if other == name)
        logger.warning("the runs in %s are of different original models called %s, so they are not compared", folders, name)
    paths = [short_path(Path(group[0].base_path)) for group in groups]
    titles = [name if names.count(name) == 1 else f"{name} ({path})" for name, path in zip(names, paths, strict=True)]
    return [title if titles.count(title) == 1 else f"{title}, model {i}" for i, title in enumerate(titles, 1)]


def _grouped(
    runs: Sequence[ImageRun], together: Callable[[ImageRun, ImageRun], bool], known: Callable[[ImageRun], int], what: str
) -> list[list[ImageRun]]:
    """Group runs so that each two runs of a group belong `together`; groups and runs keep their order.

    Runs with the most `known` facts are placed first. Raises UserError for a run that fits several groups; `what` names the
    property that a group shares.
    """
    groups: list[list[ImageRun]] = []
    for run in sorted(runs, key=known, reverse=True):
        fitting = [group for group in groups if all(together(run, other) for other in group)]
        if len(fitting) > 1:
            first, second = (group[0].folder for group in fitting[:2])
            raise UserError(
                f"the images in {run.folder} may have {what} of {first} or of {second}, and their record is too old to tell; "
                "make a report of each"
            )
        if fitting:
            fitting[0].append(run)
        else:
            groups.append([run])
    order = {run.folder: i for i, run in enumerate(runs)}
    return sorted(
        (sorted(group, key=lambda run: order[run.folder]) for group in groups), key=lambda group: order[group[0].folder]
    )


def _comparison(base: str, runs: list[ImageRun], attacks: list[AttackRun], benign_sets: Sequence[str] | None) -> Comparison:
    of_model: dict[str, list[ImageRun]] = {}
    for run in sorted(runs, key=lambda run: run.method != ORIGINAL):
        of_model.setdefault(run.identity, []).append(run)
    first_runs = [theirs[0] for theirs in of_model.values()]
    originals = [run.folder for run in first_runs if run.method == ORIGINAL]
    if len(originals) > 1:
        raise UserError(f"{originals[0]} and {originals[1]} are of two different original models {base}; make a report of each")
    seeds = seed_groups(first_runs)
    labels, without_seed = model_labels(first_runs), model_labels(first_runs, seeds=False)
    models = tuple(
        Model(run.identity, run.method, label, group, name)
        for run, label, group, name in zip(first_runs, labels, seeds, without_seed, strict=True)
    )
    sets = _sets(runs, {model.identity: i for i, model in enumerate(models)}, benign_sets)
    measures = [*(one for each in sets for one in _measures(each, len(models))), *_worst_attacks(attacks, models)]
    order = {model.identity: i for i, model in enumerate(models)}
    attacks = sorted(attacks, key=lambda each: (order[each.model.identity], str(each.content["attack"])))
    return Comparison(
        base, models, tuple(sets), tuple(sorted(measures, key=lambda one: _ORDER.index(one.kind))), tuple(attacks)
    )


def _worst_attacks(attacks: Sequence[AttackRun], models: Sequence[Model]) -> list[Measure]:
    """The largest ASR of each model over the attacks, one measure for each detector; the original model's is over their controls.

    The compared attacks are those on any protected model, without the null attack. A protected model on which one of them was not run
    has no score, since its maximum would be over fewer attacks than the others'. An attack that is too weak to tell counts where it
    succeeds, and not where it fails.
    """
    found: dict[tuple[str, str], list[AttackRun]] = {}
    for attack in attacks:
        if attack.content["attack"] != NULL_ATTACK:
            found.setdefault((attack.what, attack.detector), []).append(attack)
    return [
        Measure(WORST, "attacked", *what, tuple(_worst_attack(each, model, *what) for model in models))
        for what, each in found.items()
    ]


def _searches(attacks: Sequence[AttackRun], model: Model | None = None) -> set[tuple[str, bool]]:
    """The searches, each with the concept's names or without them, on one protected model or (None) on any."""
    return {
        (attack.search, pair.names)
        for attack in attacks
        for pair in attack.pairs
        if pair.attacked and (model is None or attack.model.identity == model.identity)
    }


def _worst_attack(attacks: Sequence[AttackRun], model: Model, title: str, identity: str) -> Score | None:
    compared, pairs = _searches(attacks), [(pair, attack) for attack in attacks for pair in attack.pairs]
    if model.original:
        known = [each for each in pairs if not compared or (each[1].search, each[0].names) in compared]
        shares = [(pair.control["any"], attack) for pair, attack in known]
    elif _searches(attacks, model) == compared:
        own = [(pair.attacked["any"], pair.weak, attack) for pair, attack in pairs if attack.model.identity == model.identity]
        shares = [(share, attack) for share, weak, attack in own if share["k"] or not weak]
    else:
        shares = []
    if not shares:
        return None
    share, attack = max(shares, key=lambda each: (each[0]["fraction"], each[0]["n"]))
    value, low, high = (100 * share[name] for name in ("fraction", "low", "high"))
    counts = f"{attack.folder.name}: {share['k']}/{share['n']}"
    return Score(attack.folder / ATTACK, "attacked", title, identity, value, low, high, counts, attack.content)


def worst_case(comparison: Comparison, attacked: Measure) -> Measure:
    """The largest ASR of each attacked model over the attacks and the sets that all these models have, for the detector of `attacked`."""
    shown = [i for i, score in enumerate(attacked.scores) if score]
    same = [
        each
        for each in comparison.of_kind("asr")
        if (each.title, each.identity) == (attacked.title, attacked.identity) and all(each.scores[i] for i in shown)
    ]
    scores = [
        score and max((each.scores[i] for each in (attacked, *same)), key=lambda one: one.value)
        for i, score in enumerate(attacked.scores)
    ]
    names = f"largest over {', '.join([*(each.set_name for each in same), 'attacks'])}"
    return replace(attacked, set_name=names, kind="asr", title=f"worst {attacked.title}", scores=tuple(scores))


def _sets(runs: list[ImageRun], number: Mapping[str, int], benign_sets: Sequence[str] | None) -> list[ImageSet]:
    """Sets of runs with equal prompts, conditions and seeds, attacks first; `number` maps a model's identity to its index."""
    places: dict[tuple[int, str], dict[int, ImageRun]] = {}
    for i, group in enumerate(
        _grouped(runs, same_conditions, lambda run: len(run.later_conditions), "the prompts and settings")
    ):
        repeated = len({run.identity for run in group}) < len(group)  # one list in several folders, which are separate sets
        for run in group:
            place = places.setdefault((i, run.folder.name if repeated else ""), {})
            other = place.setdefault(number[run.identity], run)
            if other is not run:
                raise UserError(
                    f"{other.folder} and {run.folder} are the same model's images of the same prompts; leave one out"
                )
    names = set_names([next(iter(place.values())) for place in places.values()])
    sets = [ImageSet(name, place, _is_benign(place, benign_sets)) for name, place in zip(names, places.values(), strict=True)]
    return sorted(
        sets, key=lambda each: each.benign or not any(score.kind == "asr" for run in each.runs.values() for score in run.scores)
    )


def _is_benign(place: Mapping[int, ImageRun], benign_sets: Sequence[str] | None) -> bool:
    """Whether a set is one of `benign_sets`; if that is None, whether it is called `benign` or scored for quality."""
    if benign_sets is not None:
        return any(run.folder.name in benign_sets for run in place.values())
    return any(run.folder.name == BENIGN or any(score.kind != "asr" for score in run.scores) for run in place.values())


def _measures(images: ImageSet, models: int) -> list[Measure]:
    found: dict[tuple[str, str, str], dict[int, Score]] = {}
    for i, run in images.runs.items():
        for score in run.scores:
            kind, title = score.kind, score.title
            if kind == "asr" and images.benign:
                kind, title = "benign_hits", f"benign images with a hit, {title.removeprefix('ASR of ')}"
            place = found.setdefault((kind, title, score.identity), {})
            if i in place:
                raise UserError(f"{place[i].path} and {score.path} are the same measure of the same images; leave one out")
            place[i] = score
    return [
        Measure(images.name, *what, tuple(scores.get(i) for i in range(models)), images.benign)
        for what, scores in found.items()
    ]


@dataclass(frozen=True)
class Spread:
    """The mean, minimum and maximum of several values."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.fmean(values), min(values), max(values))

    def show(self, unit: str = "", digits: int = 1) -> str:
        """The mean as text, with the range if minimum and maximum differ."""
        mean, low, high = (f"{value:.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean}{unit}" + (f" ({low} to {high})" if low != high else "")


def shared_by_all(measures: Sequence[Measure], models: int) -> list[Measure]:
    """The measures that all models have, except models without any of them; only means over these can be compared."""
    having = [i for i in range(models) if any(measure.scores[i] for measure in measures)]
    return [measure for measure in measures if all(measure.scores[i] for i in having)]


def pooled(measures: Sequence[Measure], models: int) -> list[Spread | None]:
    """Each model's mean over the measures of `shared_by_all`; every set has the same weight.

    None for a model without any, and for all models if they share no set.
    """
    values = [
        [measure.scores[i].value for measure in shared_by_all(measures, models) if measure.scores[i]] for i in range(models)
    ]
    return [Spread.of(each) if each else None for each in values]


def sets_of(measures: Sequence[Measure], models: int) -> str:
    """The sets that `pooled` averages over, by name: `attack`, or `mean of the sets plain, names and phrases`."""
    *names, last = [measure.set_name for measure in shared_by_all(measures, models)]
    return f"mean of the sets {', '.join(names)} and {last}" if names else last


def groups(measures: Sequence[Measure]) -> list[list[Measure]]:
    """Group the measures of all sets by kind, title and identity."""
    found: dict[tuple[str, str, str], list[Measure]] = {}
    for measure in measures:
        found.setdefault((measure.kind, measure.title, measure.identity), []).append(measure)
    return list(found.values())


def headline(comparison: Comparison) -> list[str]:
    """One phrase for each measure that original and protected models share: `ASR of mushroom, plain: 98.3% → 0.0%`.

    The ASR is over attack sets, followed by that under the worst attack. The sets are named, and only models that differ only in the
    training seed are averaged, as far as they have a score. The last phrase counts the attacks that are too weak to tell.
    """
    phrases, before, models = [], comparison.original, len(comparison.models)
    for measures in groups([*comparison.of_kind("asr", "attacked"), *comparison.quality]):
        spreads = pooled(measures, models)
        after = [scored for group in comparison.seed_groups if (scored := [i for i in group if spreads[i]])]
        if before is None or spreads[before] is None or not after:
            continue
        unit, digits = ("%", 1) if measures[0].kind in SHARES else ("", 2)
        first = f"{measures[0].title}, {sets_of(measures, models)}: {spreads[before].mean:.{digits}f}{unit}"
        phrases.append(f"{first} → {_after(comparison, after, spreads, unit, digits)}")
    weak = sum(any(pair.weak for pair in attack.pairs) for attack in comparison.attacks)
    return [*phrases, *([f"attacks too weak to tell: {weak} of {len(comparison.attacks)}"] if weak else [])]


def _after(comparison: Comparison, after: list[list[int]], spreads: Sequence[Spread | None], unit: str, digits: int) -> str:
    """The values of protected models by name, as a mean for each seed group; a single range if there are many models."""
    shown = [
        (Spread.of([spreads[i].mean for i in group]).show(unit, digits) + (f", {len(group)} seeds" if len(group) > 1 else ""))
        for group in after
    ]
    if len(set(shown)) == 1 and sum(map(len, after)) == len(comparison.protected):
        return shown[0]
    if len(after) > _MOST_NAMED:
        values = [spreads[i].mean for group in after for i in group]
        return f"{min(values):.{digits}f}{unit} to {max(values):.{digits}f}{unit}, {len(values)} protected models"
    return ", ".join(f"{text} ({_group_label(comparison, group)})" for text, group in zip(shown, after, strict=True))


def _group_label(comparison: Comparison, group: list[int]) -> str:
    return comparison.models[group[0]].group_label if len(group) > 1 else comparison.models[group[0]].label


def seed_columns(comparison: Comparison) -> list[tuple[str, list[int]]]:
    """The table columns with means over training seeds: title and model indices of each."""
    return [
        (f"{_group_label(comparison, group)}, mean and range of {len(group)} seeds", group)
        for group in comparison.seed_groups
        if len(group) > 1
    ]
