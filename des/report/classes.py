"""Tables of the detectors' findings by class for every model, counted from the per-image findings of the result files."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from des.evaluation.results import Score
from des.report.compare import Comparison, Measure

MOST_CLASSES = 12
OTHER = "other labels"


@dataclass(frozen=True)
class ClassTable:
    """The number of images of each class for every model (None: not scored), and of detections if an image may have several.

    `what` describes a number of the table. With `shares` a cell is k of n, as in an accuracy, not a count.
    """

    set_name: str
    title: str
    what: str
    images: dict[str, list[int | None]]
    totals: dict[str, list[int | None]]  # detections by class, or n of k of n; empty for plain counts
    shares: bool = False

    def cell(self, name: str, model: int) -> str:
        """The text of a cell, such as `3/60` or `4 (7 boxes)`."""
        count = self.images[name][model]
        if count is None:
            return "–"
        total = self.totals[name][model] if self.totals else None
        if self.shares:
            return f"{count}/{total}" if total else "–"
        return f"{count}" if total in (None, count) else f"{count} ({total} boxes)"


def class_tables(comparison: Comparison) -> list[ClassTable]:
    """One table for each set and each detector that reports classes; accuracies last."""
    tables = [_table(measure) for measure in comparison.of_kind("asr", "benign_hits", "accuracy")]
    return [table for table in tables if table]


def _table(measure: Measure) -> ClassTable | None:
    scores = [score for score in measure.scores if score]
    head = measure.set_name, measure.title
    if all(isinstance(score.content.get("classes"), dict) for score in scores):
        found = [
            score and {name: each["images"] for name, each in score.content["classes"].items()} for score in measure.scores
        ]
        boxes = [
            score and {name: each["detections"] for name, each in score.content["classes"].items()} for score in measure.scores
        ]
        names = list(dict.fromkeys(name for each in found if each for name in each))
        return ClassTable(*head, "images with a detection of the class", _columns(names, found), _columns(names, boxes))
    if not all("top" in image for score in scores for image in score.content["images"]):
        return None
    if measure.kind != "accuracy":
        tops = [score and Counter(image["top"] for image in score.content["images"]) for score in measure.scores]
        return ClassTable(*head, "images with the class as top label", _most(tops), {})
    hits, every = [_by_label(score, True) for score in measure.scores], [_by_label(score, False) for score in measure.scores]
    names = sorted(set().union(*(each for each in every if each)))
    if len(names) < 2:
        return None
    return ClassTable(*head, "images that show their label", _columns(names, hits), _columns(names, every), shares=True)


def _by_label(score: Score | None, hits_only: bool) -> Counter | None:
    return score and Counter(str(image.get("label")) for image in score.content["images"] if image["hit"] or not hits_only)


def _columns(names: Sequence[str], found: Sequence[dict[str, int] | None]) -> dict[str, list[int | None]]:
    return {name: [None if each is None else each.get(name, 0) for each in found] for name in names}


def _most(tops: Sequence[Counter | None]) -> dict[str, list[int | None]]:
    """The most frequent labels over all models; the others are added up as OTHER."""
    total = sum((each for each in tops if each), Counter())
    names = [name for name, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))]
    table = _columns(names[:MOST_CLASSES], tops)
    if len(names) > MOST_CLASSES:
        rest = set(names[MOST_CLASSES:])
        table[OTHER] = [None if each is None else sum(n for name, n in each.items() if name in rest) for each in tops]
    return table
