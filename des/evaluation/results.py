"""Reads the result files of the scorers, and checks that they are about the images that the manifest names."""

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from des.data.run_record import MALFORMED, Lines, read_json
from des.evaluation.scorer_identity import detector_identity
from des.utils.choices import MODEL_VARIANT
from des.utils.errors import UserError
from des.utils.files import sha256_texts
from des.utils.folders import visible

MEANS = {
    "clip_score": "CLIP score",
    "pickscore": "PickScore",
    "blipscore": "BLIP score",
    "imagereward": "ImageReward",
    "lpips": "LPIPS",
}
_BESIDE = ("fid", "kid", "lpips", "pickscore", "blipscore", "imagereward")  # fid.py writes {folder}_{job}.json


FOLDER_OPTIONS = ("folder_dir", "image_folder", "gen_imgs_path")  # options of the scorers that name the image folder


@dataclass(frozen=True)
class Score:
    """One score of a folder of images.

    `kind` is asr (images that a detector counts), accuracy (images that show their label), mean (of one score per image, higher is
    better), or fid, kid or lpips (lower is better). `value` is a percentage for the first two; `low` and `high` are its 95%
    interval, or None. Scores of several folders can be compared if `title` and `identity` are equal.
    """

    path: Path
    kind: str
    title: str
    identity: str
    value: float
    low: float | None
    high: float | None
    counts: str  # as shown: 3/60, 66 images
    content: dict[str, Any]


def score_files(folder: Path, lines: Iterable[str]) -> list[Path]:
    """The detectors' result files in a folder: JSON files with a list of images, except the cards of single images."""
    cards = {Path(name).with_suffix(".json").name for name in lines} | {"run.json"}
    paths = [path for path in visible(folder, "*.json") if path.name not in cards]
    return [path for path in paths if isinstance(read_json(path).get("images"), list)]


def check_place(output_dir: Path | None, images: Path, results: Iterable[Path]) -> None:
    """Raise UserError if the JSON files `results` cannot be written, or are results about another folder than `images` in `output_dir`.

    In the image folder itself (`output_dir` is None) a result is replaced, because it is about the same images.
    """
    for path in results:
        above = next(parent for parent in path.absolute().parents if parent.exists())
        if not os.access(above, os.W_OK):
            raise UserError(f"{above} is read-only, so {path.name} cannot be written there; name a folder with --output_dir")
        if output_dir is None or not path.exists():
            continue
        try:
            arguments = read_json(path)["made_by"]["arguments"]
            about = next(Path(arguments[name]) for name in FOLDER_OPTIONS if name in arguments)
        except (UserError, StopIteration, *MALFORMED):
            raise UserError(f"{path} is not a result that a scorer may replace; name another --output_dir") from None
        if about.resolve() != images.resolve():
            raise UserError(f"{path} is the result of another image folder, {about}; name another --output_dir for {images}")


def findings_sha256(content: Mapping[str, Any]) -> str:
    """The checksum of a detector's result (its JSON): the findings of its images, and the detector's facts."""
    return sha256_texts([json.dumps([content["images"], content["detector"]], sort_keys=True, default=str)])


def check_scores(path: Path, content: Mapping[str, Any], lines: Lines) -> None:
    """Raise UserError if scores are not about the images that the manifest names, or if k and n do not match their images.

    An accuracy leaves out rows without a label, so the manifest may name more images than it.
    """
    try:
        scored = {image["file"]: image["sha256"] for image in content["images"]}
        labelled = content["made_by"]["arguments"].get("label_column") is not None
        skipped = lines.keys() if labelled else {*content["unreadable"], *content.get("never_drawn", ())}
        k, n = sum(image["hit"] for image in content["images"]), len(scored)
        claimed = content["k"], content["n"]
    except MALFORMED:
        raise UserError(f"{path} is no complete result of a scorer; score the folder again") from None
    _refuse_stale(path, scored, lines, skipped)
    if claimed != (k, n):
        raise UserError(f"{path} says {claimed[0]} of {claimed[1]}, but its images give {k} of {n}; score the folder again")
    if content.get("findings_sha256", findings_sha256(content)) != findings_sha256(content):
        raise UserError(f"{path} was edited: its findings do not match their checksum; score the folder again")


def _refuse_stale(path: Path, scored: Mapping[str, str | None], lines: Lines, skipped: Iterable[str] = ()) -> None:
    stale = sorted(name for name, digest in scored.items() if name not in lines or lines[name]["sha256"] != digest)
    lacking = sorted(lines.keys() - scored.keys() - set(skipped))
    if stale or lacking:
        what = f"a score of another image than the folder has ({stale[0]})" if stale else f"no score for {lacking[0]}"
        raise UserError(f"{path} is stale: it has {what}; score the folder again")


def read_scores(folder: Path, lines: Lines) -> list[Score]:
    """All scores from the JSON files in and beside a folder. Raises UserError for a file that is not about the folder's images."""
    scores = []
    for path in score_files(folder, lines):
        content = read_json(path)
        check_scores(path, content, lines)
        scores.append(_share(path, content))
    if (folder / "clipscore.json").is_file():
        scores.append(_mean(folder / "clipscore.json", "clip_score", lines))
    for job in _BESIDE:
        path = folder.with_name(f"{folder.name}_{job}.json")
        if path.is_file():
            scores += _distances(path, lines) if job in ("fid", "kid") else [_mean(path, job, lines)]
    return [_titled(score) for score in scores]


def read_score(path: Path, lines: Lines) -> list[Score]:
    """The scores of one JSON file at any path. Raises UserError if it is no scorer's result, or not about the manifest's images."""
    content = read_json(path)
    if isinstance(content.get("images"), list):
        check_scores(path, content, lines)
        return [_share(path, content)]
    if "variants" in content:
        return _distances(path, lines)
    names = [name for name in MEANS if name in content]
    if not names:
        raise UserError(
            f"{path} is not a scorer's result: it has no images with verdicts, no FID or KID, and none of {', '.join(MEANS)}"
        )
    return [_mean(path, name, lines) for name in names]


def _share(path: Path, content: dict[str, Any]) -> Score:
    try:
        labelled = content["made_by"]["arguments"].get("label_column") is not None
        return Score(
            path, "accuracy" if labelled else "asr", str(content["what"]), detector_identity(content["detector"]),
            *(100 * _finite(content[name]) for name in ("fraction", "low", "high")), f"{content['k']}/{content['n']}", content,
        )  # fmt: skip
    except MALFORMED:
        raise UserError(f"{path} is no complete result of a scorer; score the folder again") from None


def _titled(score: Score) -> Score:
    """A score by --other_prompts with the hash of its prompts in the title, so that it is compared only with scores by the same list."""
    other = score.content.get("other_prompts_sha256")
    return replace(score, title=f"{score.title}, by other prompts ({str(other)[:8]})") if other else score


def _mean(path: Path, name: str, lines: Lines) -> Score:
    """The mean of a JSON file, checked against the CSV table beside it."""
    table = path.with_suffix(".csv")
    try:
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        scored = {row["image"]: row["sha256"] for row in rows}
        mean = math.fsum(_finite(row[name]) for row in rows) / len(rows)
    except (OSError, ZeroDivisionError, *MALFORMED):
        raise UserError(f"{table} cannot be read, so the images of {path.name} are unknown; score the folder again") from None
    content = read_json(path)
    _refuse_stale(path, scored, lines, content.get("never_drawn", ()))
    try:
        value, low, high = (None if content.get(key) is None else _finite(content[key]) for key in (name, "low", "high"))
        models = {key: digest for key, digest in content.items() if key.endswith("_sha256")}
        if not math.isclose(value, mean, rel_tol=1e-6, abs_tol=1e-9) or content["n"] != len(rows):
            raise UserError(
                f"{path} says {value} for {content['n']} images, but {table.name} gives {mean}; score the folder again"
            )
        identity = sha256_texts([json.dumps(models, sort_keys=True)])
        kind = "lpips" if name == "lpips" else "mean"
        return Score(path, kind, MEANS[name], identity, value, low, high, f"{len(rows)} images", content)
    except MALFORMED:
        raise UserError(f"{path} is no complete result of a scorer; score the folder again") from None


def _distances(path: Path, lines: Lines) -> list[Score]:
    """The FID or KID of each variant, checked against the manifest by the hash of the images, or by their number in older files."""
    content = read_json(path)
    never = content.get("never_drawn", ())
    kept = sorted(line["sha256"] for name, line in lines.items() if line["sha256"] and name not in never)
    try:
        if content["generated"] != len(kept) or content.get("generated_sha256", sha256_texts(kept)) != sha256_texts(kept):
            raise UserError(f"{path} is stale: it is about other images than the folder has; compute it again")
        compared = [content["extractor_sha256"], content["reference"], content.get("reference_sha256")]
        compared += [content["configuration_sha256"]] if content.get("configuration_sha256") else []
        compared += (
            [content["ref_stats"]["sha256"]] if content.get("reference_sha256") is None and "ref_stats" in content else []
        )
        kind = "kid" if "kid" in content else "fid"
        compared += [content["subsets"], content["subset_size"], content["seed"]] if kind == "kid" else []
        identity = sha256_texts([json.dumps(compared)])
        counts = f"{content['generated']} images, {content['reference']} reference"
        features = {name: "another model's features" if name == MODEL_VARIANT else name for name in content["variants"]}
        return [
            Score(path, kind, f"{kind.upper()} ({features[name]})", identity, _finite(value), None, None, counts, content)
            for name, value in content["variants"].items()
        ]
    except MALFORMED:
        raise UserError(f"{path} is no complete result of fid.py; compute it again") from None


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number
