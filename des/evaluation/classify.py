"""Scoring images with a detector: the options, the result files, and the scores of images as they are drawn."""

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from des.data import claims, manifest
from des.data.image_folders import image_hashes, pair_with_prompts, pairing_notes, without_never_drawn
from des.data.images import BLURRED, row_of
from des.data.truncation import truncated_counts
from des.evaluation.batches import Item, Reading, measure_images
from des.evaluation.detectors.base import Detector
from des.evaluation.results import findings_sha256
from des.evaluation.scorer_identity import detector_identity
from des.utils import cli
from des.utils.errors import UserError
from des.utils.files import replacing, sha256_texts, write_json, write_text
from des.utils.folders import visible
from des.utils.locks import locked
from des.utils.logs import logger
from des.utils.resume import Findings
from des.utils.stats import proportion, show

import pandas as pd
from PIL import Image, PngImagePlugin


def images_of(
    folder: Path,
    csv_path: Path | None = None,
    expected: int | None = None,
    skip_unreadable: bool = False,
    other_prompts: bool = False,
) -> pd.DataFrame:
    """The images to score, in columns `image` and `sha256`; with a prompt CSV, beside the columns of their rows.

    The parameters and `attrs` are those of `pair_with_prompts`. Raises UserError where images of the folder's run are missing,
    unless `expected` gives their number.
    """
    if csv_path:
        return pair_with_prompts(folder, csv_path, expected, skip_unreadable, other_prompts)
    if other_prompts:
        raise UserError("--other_prompts needs --csv_path, the list that is meant")
    digests = image_hashes(folder, expected, skip_unreadable)
    if expected is None:
        claims.check_complete(folder)
    digests, never = without_never_drawn(digests)
    images = pd.DataFrame({"image": list(digests), "sha256": list(digests.values())})
    images.attrs = {"never_drawn": [str(path.relative_to(folder)) for path in never]} if never else {}
    return images


def score_folder(
    folder: Path,
    output_name: str,
    detector: Detector,
    images: pd.DataFrame,
    reading: Reading,
    made_by: Mapping[str, Any],
    skip_unreadable: bool = False,
) -> str:
    """Score images, write `{output_name}.txt` and `.json` into `folder`, and return the text. An interrupted run is resumed.

    `images` has columns `image`, `sha256` and `label`, the class that counts; `made_by` is the provenance to record. Raises
    UserError for an unreadable image before any result is written; with `skip_unreadable`, only where no image can be read.
    """
    with locked(folder / f".{output_name}.lock", f"the scores {output_name}"):
        findings = Findings(folder / f"{output_name}.json", stamp_of(detector))
        findings.found |= scored_before(folder, output_name, detector)
        names = [str(path.relative_to(folder)) for path in images["image"]]
        rows = zip(names, images["sha256"], images["label"], images["image"], strict=True)
        items = [Item(f"{name} {digest} {label}", path, label) for name, digest, label, path in rows]
        unreadable: list[Path] = []
        found = measure_images(
            items, partial(verdicts, detector), findings, reading, detector.prepare, unreadable if skip_unreadable else None
        )
        if not found:
            raise UserError(f"none of the {len(items)} images in {folder} can be read")
        if unreadable:
            logger.warning("%d of %d images could not be read and are not counted", len(unreadable), len(items))
        skipped = sorted(str(path.relative_to(folder)) for path in unreadable)
        files = {name: digest for name, digest in zip(names, images["sha256"], strict=True) if name not in skipped}
        by_verdict = {verdict: [each[verdict] for each in found] for verdict in detector.titles}
        text = write_verdicts(made_by, folder, output_name, detector, files, by_verdict, skipped, images.attrs)
        findings.finish()
        return text


def verdicts(detector: Detector, prepared: list, labels: Sequence[str | None]) -> list[dict[str, dict[str, Any]]]:
    """A detector's findings by verdict, for each image."""
    found = detector.score(prepared, labels)
    return [{verdict: each[i] for verdict, each in found.items()} for i in range(len(prepared))]


def scored_before(folder: Path, output_name: str, detector: Detector) -> dict[str, dict[str, Any]]:
    """The findings of earlier result files by the keys of `score_folder`; empty where another detector made them."""
    found: dict[str, dict[str, Any]] = {}
    for verdict, path in result_files(folder, output_name, detector).items():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if detector_identity(content["detector"]) != detector_identity(detector.facts[verdict]):
                return {}
            for image in _as_written(path, content):
                finding = {name: value for name, value in image.items() if name not in ("file", "row", "sha256")}
                key = f"{image['file']} {image['sha256']} {finding.get('label')}"
                found.setdefault(key, {})[verdict] = finding
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return {}
    return found


def _as_written(path: Path, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The images of a result; ValueError where its checksum is another one, KeyError where an earlier version wrote none."""
    if content["findings_sha256"] != findings_sha256(content):
        logger.warning("%s was edited, so its images are scored again", path)
        raise ValueError("edited")
    return content["images"]


def result_files(folder: Path, output_name: str, detector: Detector) -> dict[str, Path]:
    """The JSON file of each verdict: `{output_name}.json` of the first, `{output_name}_{verdict}.json` of further ones."""
    names = [output_name, *(f"{output_name}_{verdict}" for verdict in list(detector.titles)[1:])]
    return {verdict: folder / f"{name}.json" for verdict, name in zip(detector.titles, names, strict=True)}


def stamp_of(detector: Detector) -> str:
    """A hash of everything that must be equal for a detector's figures to compare."""
    return sha256_texts(f"{verdict} {detector_identity(facts)}" for verdict, facts in detector.facts.items())


def write_verdicts(
    made_by: Mapping[str, Any],
    folder: Path,
    output_name: str,
    detector: Detector,
    files: dict[str, str | None],
    findings: dict[str, list[dict[str, Any]]],
    unreadable: Sequence[str] = (),
    pairing: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Write the findings of a detector into `folder`, and return its text, one line a verdict.

    `files` are the images of `findings`, in order, with their sha256 (None where the image was discarded). Each verdict's numbers go to its
    file of `result_files`, the lines of all to `{output_name}.txt`. `pairing` is recorded as well: see `pairing_notes`.
    """
    lines = []
    for verdict, path in result_files(folder, output_name, detector).items():
        found = findings[verdict]
        score, summary = proportion(sum(finding["hit"] for finding in found), len(found)), detector.summary(verdict, found)
        parts = [f"{detector.titles[verdict]}: {show(score)}", detector.line(summary)]
        parts += [f"{len(unreadable)} unreadable images are not counted"] if unreadable else []
        parts += pairing_notes(pairing)
        lines.append(", ".join(filter(None, parts)))
        facts = {**score, "what": detector.titles[verdict], **summary, "detector": detector.facts[verdict], **pairing}
        facts["unreadable"] = list(unreadable)
        facts |= truncated_counts(folder, [row_of(Path(name)) for name in files])
        facts["images"] = [
            {"file": name, "row": row_of(Path(name)), "sha256": digest, **finding}
            for (name, digest), finding in zip(files.items(), found, strict=True)
        ]
        write_json(path, facts | {"findings_sha256": findings_sha256(facts), "made_by": made_by})
    text = "\n".join(lines)
    write_text(folder / f"{output_name}.txt", text + "\n")
    return text


class ImageScores:
    """The findings of detectors in images as they are drawn: one small JSON file an image (a card), named as the image is."""

    def __init__(self, detectors: dict[str, Detector], output_names: dict[str, str], label: str | None, folder: Path):
        """Keep the cards in `folder`; `label` is the class that counts, for detectors that need one."""
        self.detectors = detectors
        self.output_names = output_names
        self.label = label
        self.folder = folder
        self.stamp = sha256_texts([*(f"{name} {stamp_of(detector)}" for name, detector in detectors.items()), str(label)])

    def read(self, path: Path, line: dict[str, Any] | None) -> dict[str, Any] | None:
        """The findings by detector and verdict on the card of the image at `path`, whose line in the manifest is given.

        None unless the card is whole and as it was written, these detectors wrote it, and it is about that image.
        """
        try:
            content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            same = line is not None and content["drawn"] == line and content["detectors"] == self.stamp
            return content["findings"] if same and content["sha256"] == _checksum(content) else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def score(self, path: Path, line: dict[str, Any], image: Image.Image) -> None:
        """Score the image that belongs at `path`: alone, so that its figures do not depend on what is drawn beside it."""
        findings = {
            name: verdicts(detector, [detector.prepare(image.convert("RGB"))], [self.label])[0]
            for name, detector in self.detectors.items()
        }
        card = {"drawn": line, "detectors": self.stamp, "findings": findings}
        write_json(path.with_suffix(".json"), card | {"sha256": _checksum(card)})

    def write(self, made_by: Mapping[str, Any], expected: Sequence[Path]) -> list[str]:
        """Write the verdicts over all cards in the folder, those of other shards too; returns their lines.

        Nothing is written while cards of images that the run claims are missing: the shard that finishes last writes. Rows that are
        never drawn do not count. Raises UserError where one of `expected` was lost meanwhile.
        """
        drawn = manifest.read(self.folder)
        record = claims.read_record(self.folder)
        left_out = claims.left_out(self.folder)
        paths = [path.with_suffix(".png") for path in visible(self.folder, "*p*.json") if row_of(path) not in (None, *left_out)]
        cards = {path: self.read(path, drawn.get(path.name)) for path in paths}
        missing = [path for path in expected if cards.get(path) is None]
        if missing:
            raise UserError(f"{missing[0].with_suffix('.json')} was lost while others were drawn; run this again")
        other = sum(found is None for found in cards.values())
        if other:
            logger.warning("%d cards in %s are of other detectors and not counted", other, self.folder)
        scored = {(drawn[path.name]["row"], drawn[path.name]["copy"]) for path, found in cards.items() if found is not None}
        lacking = claims.claimed_keys(self.folder, record) - scored
        if lacking:
            logger.warning(
                "%s lacks the scores of %d images that its run claims (row %d first), so no result is written yet; draw those too",
                self.folder, len(lacking), min(lacking)[0],
            )  # fmt: skip
            return []
        kept = sorted((path for path, found in cards.items() if found is not None), key=lambda path: (row_of(path), path.name))
        files = {path.name: drawn[path.name]["sha256"] for path in kept}
        lines = []
        for name, detector in self.detectors.items():
            findings = {verdict: [cards[path][name][verdict] for path in kept] for verdict in detector.titles}
            lines.append(write_verdicts(made_by, self.folder, self.output_names[name], detector, files, findings))
        return lines


def _checksum(card: Mapping[str, Any]) -> str:
    return sha256_texts([json.dumps([card["drawn"], card["detectors"], card["findings"]], sort_keys=True)])


def blurred(image: Image.Image) -> Image.Image:
    """A thumbnail of 128x128 of which only colours are left."""
    return image.convert("RGB").resize((12, 12), Image.Resampling.BOX).resize((128, 128), Image.Resampling.BICUBIC)


def save_blurred(image: Image.Image, path: Path) -> None:
    """Save a blurred thumbnail, marked so that no scorer takes it for the image."""
    mark = PngImagePlugin.PngInfo()
    mark.add_text(*BLURRED)
    with replacing(path) as temporary:
        blurred(image).save(temporary, format="PNG", pnginfo=mark)


def check_score_files(args: argparse.Namespace, detector: Detector) -> None:
    """Raise UserError where a result would be written over an input or the log."""
    outputs = [args.folder_dir / f"{args.output_name}.txt", *result_files(args.folder_dir, args.output_name, detector).values()]
    cli.check_outputs(outputs, [args.csv_path, args.log_file])


def open_folder(args: argparse.Namespace) -> pd.DataFrame:
    """The images that the options of `add_folder` name, as `images_of` returns them."""
    return images_of(args.folder_dir, args.csv_path, args.expected, args.skip_unreadable, args.other_prompts)
