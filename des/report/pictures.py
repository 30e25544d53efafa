"""The report's galleries: images of all models side by side from equal seeds, embedded as data, with the detectors' findings."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from des.data.images import read_image
from des.data.prompts import never_drawn, read_rows
from des.evaluation.results import Score
from des.models.encoders import spread
from des.report.collect import ImageRun, Key
from des.report.compare import Comparison, ImageSet
from des.utils.errors import UserError
from des.utils.files import sha256_texts

from PIL import Image

LONGEST = 384  # pixels of an embedded image's longer side
_DATASETS = Path(__file__).resolve().parents[2] / "datasets"
_LOSSLESS = 128  # up to this side a PNG is as small as a JPEG


@dataclass(frozen=True)
class Box:
    """A detection: class and score as text, whether it counts, and left, top, width and height in pixels of the image."""

    label: str
    counts: bool
    place: tuple[int, int, int, int]


@dataclass(frozen=True)
class Picture:
    """One image: its data URI, its size before scaling, the detectors' verdict, and whether it is blurred at first."""

    model: str
    data: str
    size: tuple[int, int]
    verdict: str
    blurred: bool
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class GalleryRow:
    """The images of one prompt row and seed, one per model."""

    row: int
    copy: int
    seed: int
    prompt: str | None
    pictures: tuple[Picture, ...]


def gallery(comparison: Comparison, images: ImageSet, at_most: int, prompts: bool | None) -> list[GalleryRow]:
    """Pick at most `at_most` evenly spaced rows of a set, without rows of prompts that are never drawn.

    With `prompts` each row has its prompt; with None only if all prompts are of the demo's lists. Empty if the images were
    discarded. Raises UserError for an unreadable image, or if the prompt list is not the one of the run.
    """
    runs = {i: run for i, run in images.runs.items() if any(line["sha256"] for line in run.lines.values())}
    if not runs:
        return []
    first = next(iter(runs.values()))
    keys = [key for key in first.drawn if all(key in run.drawn and run.drawn[key]["sha256"] for run in runs.values())]
    hidden = _never_shown(first)
    keys = [key for key in keys if key[0] not in hidden]
    texts = read_texts(first) if prompts else _demo_texts(first) if prompts is None else None
    findings = {i: _by_file(run) for i, run in runs.items()}
    rows = []
    for j in spread(len(keys), at_most).tolist() if keys else []:
        key = keys[j]
        pictures = [picture(comparison.models[i].label, run, key, findings[i]) for i, run in runs.items()]
        text = texts[key[0]] if texts else None
        rows.append(GalleryRow(*key, first.drawn[key]["seed"], text, tuple(pictures)))
    return rows


def read_texts(run: ImageRun) -> list[str]:
    """Read the prompts of a run; UserError if the list is missing or has changed."""
    arguments = run.record["made_by"]["arguments"]
    texts = [arguments["prompt"]] if arguments.get("prompt") is not None else None
    if texts is None:
        texts = read_rows(Path(str(arguments.get("prompts_csv"))))["prompt"].tolist()
    if sha256_texts(texts) != run.settings.get("prompts_sha256"):
        raise UserError(f"{arguments.get('prompts_csv')} is not the prompt list of the run {run.folder}; leave --prompts out")
    return texts


@cache
def _demo_prompts() -> frozenset[str]:
    """All prompts of the demo's lists, which are harmless and public."""
    return frozenset(text for path in _DATASETS.glob("demo_*.csv") for text in read_rows(path)["prompt"])


def _demo_texts(run: ImageRun) -> list[str] | None:
    """The prompts of a run if all are of the demo's lists; else None, also if the list is missing."""
    try:
        texts = read_texts(run)
    except (UserError, KeyError):
        return None
    return texts if _demo_prompts().issuperset(texts) else None


def _never_shown(run: ImageRun) -> set[int]:
    """The rows of prompts that are never drawn; folders of earlier versions may hold images of them."""
    try:
        return set(never_drawn(read_texts(run)))
    except (UserError, KeyError):  # without the list, only the rows that the run recorded are known
        return set(run.record.get("left_out") or [])


Findings = Mapping[str, list[tuple[Score, dict[str, Any]]]]


def _by_file(run: ImageRun) -> Findings:
    """The findings of all detectors by image file."""
    found: dict[str, list[tuple[Score, dict[str, Any]]]] = {}
    for score in run.scores:
        for finding in score.content["images"] if score.kind in ("asr", "accuracy") else []:
            found.setdefault(finding["file"], []).append((score, finding))
    return found


def picture(model: str, run: ImageRun, key: Key, findings: Findings) -> Picture:
    """Make the picture of one image. It is blurred unless it is known to be harmless.

    An image is harmless if detectors scored it and none counts it, or if its set is scored for quality only, as benign sets are.
    """
    name = run.drawn[key]["file"]
    image = read_image(run.folder / name)
    mine = findings.get(name, [])
    asked = [finding for score, finding in mine if score.kind == "asr"]
    fired = sum(bool(finding["hit"]) for finding in asked)
    benign = not any(score.kind == "asr" for score in run.scores) and bool(run.scores)
    blurred = fired > 0 or (not asked and not benign)
    return Picture(model, data_uri(image), image.size, _verdict(mine, fired, len(asked)), blurred, _boxes(mine, image.size))


def _verdict(mine: list[tuple[Score, dict[str, Any]]], fired: int, asked: int) -> str:
    tops = dict.fromkeys(str(finding["top"]) for _, finding in mine if "top" in finding)
    words = [", ".join(tops)] if tops else []
    if asked == 1:
        words.insert(0, "hit" if fired else "no hit")
    elif asked:
        words.insert(0, f"hit by {fired} of {asked} detectors" if fired else "no hit")
    return ": ".join(words) or "not scored"


def _boxes(mine: list[tuple[Score, dict[str, Any]]], size: tuple[int, int]) -> tuple[Box, ...]:
    """The boxes of the first detector that has any, clipped to the image."""
    for score, finding in mine:
        if not finding.get("detections"):
            continue
        facts = score.content["detector"]
        boxes = []
        for each in finding["detections"]:
            counts = each["class"] in facts.get("counted_classes", ()) and each["score"] > facts.get("counted_above", 0)
            left, top = (max(0, side) for side in each["box"][:2])
            right, bottom = (
                min(limit, at + side) for limit, at, side in zip(size, each["box"][:2], each["box"][2:], strict=True)
            )
            label = f"{each['class'].replace('_', ' ').lower()} {each['score']:.2f}"
            boxes.append(Box(label, counts, (left, top, max(0, right - left), max(0, bottom - top))))
        return tuple(boxes)
    return ()


def data_uri(image: Image.Image) -> str:
    """An image as a data URI, scaled down to LONGEST: a small one as PNG, others as JPEG; without metadata."""
    image = Image.frombytes("RGB", image.size, image.tobytes())
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    kind, options = ("PNG", {"optimize": True}) if max(image.size) <= _LOSSLESS else ("JPEG", {"quality": 85})
    content = io.BytesIO()
    image.save(content, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"
