"""Scoring images with a detector: the images to score, the result files, and scoring during generation."""

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from des.data import claims, manifest
from des.data.image_folders import image_hashes, pair_with_prompts, pairing_notes, without_never_drawn
from des.data.images import row_of
from des.data.truncation import truncated_counts
from des.evaluation.batches import Item, Reading, measure_images
from des.evaluation.detectors.base import Detector
from des.evaluation.results import check_place, findings_sha256
from des.evaluation.scorer_identity import detector_identity
from des.utils import cli
from des.utils.errors import UserError
from des.utils.files import sha256_texts, write_json, write_text
from des.utils.folders import visible
from des.utils.locks import locked
from des.utils.logs import logger
from des.utils.resume import Findings
from des.utils.stats import proportion, show

import pandas as pd
from PIL import Image


def images_of(
    folder: Path,
    csv_path: Path | None = None,
    expected: int | None = None,
    skip_unreadable: bool = False,
    other_prompts: bool = False,
) -> pd.DataFrame:
    """Return the images to score, in columns `image` and `sha256`, joined with the columns of a prompt CSV if one is given.

    The parameters and `attrs` are those of `pair_with_prompts`. Raises UserError if images of the folder's run are missing,
    unless `expected` gives their number.
    """
    if csv_path:
        return pair_with_prompts(folder, csv_path, expected, skip_unreadable, other_prompts)
    if other_prompts:
        raise UserError("--other_prompts needs --csv_path, the prompt list to use")
    digests = image_hashes(folder, expected, skip_unreadable)
    if expected is None:
        claims.check_complete(folder)
    digests, never = without_never_drawn(digests)
    images = pd.DataFrame({"image": list(digests), "sha256": list(digests.values())})
    images.attrs = {"never_drawn": [str(path.relative_to(folder)) for path in never]} if never else {}
    return images


def score_folder(
    folder: Path,
    output: Path,
    detector: Detector,
    images: pd.DataFrame,
    reading: Reading,
    made_by: Mapping[str, Any],
    skip_unreadable: bool = False,
) -> str:
    """Score the images of `folder`, write `{output}.txt` and `{output}.json`, and return the text. An interrupted run is resumed.

    `images` has columns `image`, `sha256` and `label`, the class that counts; `made_by` is the provenance to record. Raises
    UserError for an unreadable image before any result is written; with `skip_unreadable`, only if no image can be read.
    """
    with locked(output.with_name(f".{output.name}.lock"), f"the scores {output.name}"):
        findings = Findings(_with_suffix(output, ".json"), stamp_of(detector))
        findings.found |= scored_before(output, detector)
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
        text = write_verdicts(made_by, folder, output, detector, files, by_verdict, skipped, images.attrs)
        findings.finish()
        return text


def verdicts(detector: Detector, prepared: list, labels: Sequence[str | None]) -> list[dict[str, dict[str, Any]]]:
    """Run a detector on a batch; returns one dictionary of findings by verdict per image."""
    found = detector.score(prepared, labels)
    return [{verdict: each[i] for verdict, each in found.items()} for i in range(len(prepared))]


def scored_before(output: Path, detector: Detector) -> dict[str, dict[str, Any]]:
    """Read the findings of earlier result files, by the keys of `score_folder`; empty if another detector wrote them."""
    found: dict[str, dict[str, Any]] = {}
    for verdict, path in result_files(output, detector).items():
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
    """The images of a result. Raises ValueError if its checksum does not match, and KeyError if it has none (earlier versions)."""
    if content["findings_sha256"] != findings_sha256(content):
        logger.warning("%s was edited, so its images are scored again", path)
        raise ValueError("edited")
    return content["images"]


def result_files(output: Path, detector: Detector) -> dict[str, Path]:
    """The JSON file of each verdict: `{output}.json` for the first, `{output}_{verdict}.json` for the others."""
    ends = [".json", *(f"_{verdict}.json" for verdict in list(detector.titles)[1:])]
    return {verdict: _with_suffix(output, end) for verdict, end in zip(detector.titles, ends, strict=True)}


def _with_suffix(output: Path, suffix: str) -> Path:
    """`output` with `suffix` at its end; a dot in its name, as in `q16_v1.0`, begins no suffix."""
    return output.with_name(output.name + suffix)


def stamp_of(detector: Detector) -> str:
    """A hash of everything that must be equal for two results of a detector to be comparable."""
    return sha256_texts(f"{verdict} {detector_identity(facts)}" for verdict, facts in detector.facts.items())


def write_verdicts(
    made_by: Mapping[str, Any],
    folder: Path,
    output: Path,
    detector: Detector,
    files: dict[str, str | None],
    findings: dict[str, list[dict[str, Any]]],
    unreadable: Sequence[str] = (),
    pairing: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Write the findings of a detector about images in `folder`, and return the text, one line per verdict.

    `files` are the images of `findings`, in order, with their sha256 (None for a discarded image). Each verdict's numbers go to its
    file of `result_files`, all lines to `{output}.txt`. `pairing` holds further facts to record; see `pairing_notes`.
    """
    lines = []
    for verdict, path in result_files(output, detector).items():
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
    write_text(_with_suffix(output, ".txt"), text + "\n")
    return text


class ImageScores:
    """Scores images during generation. The findings of each image go to a small JSON file, the card, with the image's name."""

    def __init__(self, detectors: dict[str, Detector], output_names: dict[str, str], label: str | None, folder: Path):
        """Store the cards in `folder`; `label` is the class that counts, for detectors that need one."""
        self.detectors = detectors
        self.output_names = output_names
        self.label = label
        self.folder = folder
        self.stamp = sha256_texts([*(f"{name} {stamp_of(detector)}" for name, detector in detectors.items()), str(label)])

    def read(self, path: Path, line: dict[str, Any] | None) -> dict[str, Any] | None:
        """Read the findings, by detector and verdict, from the card of the image at `path`; `line` is the image's manifest line.

        Returns None if the card is missing, damaged or edited, was written by other detectors, or is about another image.
        """
        try:
            content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            same = line is not None and content["drawn"] == line and content["detectors"] == self.stamp
            return content["findings"] if same and content["sha256"] == _checksum(content) else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def score(self, path: Path, line: dict[str, Any], image: Image.Image) -> None:
        """Score the image of `path` as a batch of one, so that its scores do not depend on the other images of the batch."""
        findings = {
            name: verdicts(detector, [detector.prepare(image.convert("RGB"))], [self.label])[0]
            for name, detector in self.detectors.items()
        }
        card = {"drawn": line, "detectors": self.stamp, "findings": findings}
        write_json(path.with_suffix(".json"), card | {"sha256": _checksum(card)})

    def write(self, made_by: Mapping[str, Any], expected: Sequence[Path]) -> list[str]:
        """Write the results over all cards in the folder, including those of other shards; returns their lines.

        Writes nothing while the card of an image that the run claims is missing, so the shard that finishes last writes. Rows that
        are never drawn do not count. Raises UserError if the card of one of the `expected` images is missing.
        """
        drawn = manifest.read(self.folder)
        record = claims.read_record(self.folder)
        left_out = claims.left_out(self.folder)
        paths = [path.with_suffix(".png") for path in visible(self.folder, "*p*.json") if row_of(path) not in (None, *left_out)]
        cards = {path: self.read(path, drawn.get(path.name)) for path in paths}
        missing = [path for path in expected if cards.get(path) is None]
        if missing:
            raise UserError(f"{missing[0].with_suffix('.json')} disappeared during generation; run this command again")
        other = sum(found is None for found in cards.values())
        if other:
            logger.warning("%d score files in %s were written by other detectors and are not counted", other, self.folder)
        scored = {(drawn[path.name]["row"], drawn[path.name]["copy"]) for path, found in cards.items() if found is not None}
        lacking = claims.claimed_keys(self.folder, record) - scored
        if lacking:
            logger.warning(
                "%s lacks the scores of %d images of its run (row %d first), so no result is written yet; generate those images too",
                self.folder, len(lacking), min(lacking)[0],
            )  # fmt: skip
            return []
        kept = sorted((path for path, found in cards.items() if found is not None), key=lambda path: (row_of(path), path.name))
        files = {path.name: drawn[path.name]["sha256"] for path in kept}
        lines = []
        for name, detector in self.detectors.items():
            findings = {verdict: [cards[path][name][verdict] for path in kept] for verdict in detector.titles}
            output = self.folder / self.output_names[name]
            lines.append(write_verdicts(made_by, self.folder, output, detector, files, findings))
        return lines


def _checksum(card: Mapping[str, Any]) -> str:
    return sha256_texts([json.dumps([card["drawn"], card["detectors"], card["findings"]], sort_keys=True)])


def blurred(image: Image.Image) -> Image.Image:
    """A thumbnail of 128x128 pixels that shows only blurred colours."""
    return image.convert("RGB").resize((12, 12), Image.Resampling.BOX).resize((128, 128), Image.Resampling.BICUBIC)


def check_score_files(args: argparse.Namespace, detector: Detector) -> Path:
    """Return the path of the results without suffix. Raises UserError if they would overwrite an input, the log or other results."""
    output = (args.output_dir or args.folder_dir) / args.output_name
    results = result_files(output, detector).values()
    cli.check_outputs([_with_suffix(output, ".txt"), *results], [args.csv_path, args.log_file])
    check_place(args.output_dir, args.folder_dir, results)
    return output


def open_folder(args: argparse.Namespace) -> pd.DataFrame:
    """Return the images that the options of `add_folder` select; see `images_of`."""
    return images_of(args.folder_dir, args.csv_path, args.expected, args.skip_unreadable, args.other_prompts)
