"""Scoring images with a detector (tasks/detectors/): one command line, one loop and one form of result for all of them."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from des.data import claims, manifest
from des.data.image_folders import image_hashes, pair_with_prompts
from des.data.images import BLURRED, image_batches, pairing_notes, row_of, without_never_drawn
from des.data.truncation import truncated_counts
from des.evaluation.detectors.base import Detector
from des.evaluation.scorer_identity import detector_identity
from des.utils import cli
from des.utils.errors import UserError
from des.utils.files import findings_sha256, replacing, sha256_texts, write_json, write_text
from des.utils.folders import visible
from des.utils.locks import locked
from des.utils.logs import logger
from des.utils.provenance import provenance
from des.utils.resume import Partial
from des.utils.stats import proportion, show

import pandas as pd
from PIL import Image, PngImagePlugin


def images_of(args: argparse.Namespace) -> pd.DataFrame:
    """The images to score, in columns `image` and `sha256`; with --csv_path beside the columns of their rows.

    `attrs` are as `pair_with_prompts` gives them. Raises UserError where images of the folder's run lack, unless --expected.
    """
    if args.csv_path:
        return pair_with_prompts(args.folder_dir, args.csv_path, args.expected, args.skip_unreadable, args.other_prompts)
    if args.other_prompts:
        raise UserError("--other_prompts needs --csv_path, the list that is meant")
    digests = image_hashes(args.folder_dir, args.expected, args.skip_unreadable)
    if args.expected is None:
        claims.check_complete(args.folder_dir)
    digests, never = without_never_drawn(digests)
    images = pd.DataFrame({"image": list(digests), "sha256": list(digests.values())})
    images.attrs = {"never_drawn": [str(path.relative_to(args.folder_dir)) for path in never]} if never else {}
    return images


def score_folder(args: argparse.Namespace, detector: Detector, images: pd.DataFrame) -> None:
    """Score images and write `{output_name}.txt` and `.json` beside them.

    `images` has columns `image`, `sha256` and `label`, the class that counts. What an interrupted run scored is not scored again.
    Raises UserError for an unreadable image, before a result is written, unless --skip_unreadable; then also where none is left.
    """
    paths, labels = images["image"].tolist(), images["label"].tolist()
    keys = {path: f"{path.relative_to(args.folder_dir)} {digest} {label}" for path, digest, label in
            zip(paths, images["sha256"], labels, strict=True)}  # fmt: skip
    outputs = [args.folder_dir / f"{args.output_name}.txt", *result_files(args.folder_dir, args.output_name, detector).values()]
    cli.check_outputs(outputs, [args.csv_path, args.log_file])
    with locked(args.folder_dir / f".{args.output_name}.lock", f"the scores {args.output_name}"):
        partial = Partial(args.folder_dir / f"{args.output_name}.json", stamp_of(detector))
        partial.found |= scored_before(args.folder_dir, args.output_name, detector)
        todo = images[[keys[path] not in partial.found for path in paths]]
        if len(todo) < len(paths):
            logger.info("%d of %d images were scored before", len(paths) - len(todo), len(paths))
        unreadable = _score(args, detector, todo, keys, partial)
        scored = images[[path not in unreadable for path in paths]]
        if scored.empty:
            raise UserError(f"none of the {len(paths)} images in {args.folder_dir} can be read")
        if unreadable:
            logger.warning("%d of %d images could not be read and are not counted", len(unreadable), len(paths))
        found = [partial.found[keys[path]] for path in scored["image"]]
        findings = {verdict: [each[verdict] for each in found] for verdict in detector.titles}
        files = dict(zip((str(path.relative_to(args.folder_dir)) for path in scored["image"]), scored["sha256"], strict=True))
        skipped = sorted(str(path.relative_to(args.folder_dir)) for path in unreadable)
        print(write_verdicts(args, args.folder_dir, args.output_name, detector, files, findings, skipped, images.attrs))
        partial.finish()


def _score(
    args: argparse.Namespace, detector: Detector, images: pd.DataFrame, keys: dict[Path, str], partial: Partial
) -> set[Path]:
    """Add the findings of images to `partial`, batch by batch; returns those that could not be read."""
    paths, label_of = images["image"].tolist(), dict(zip(images["image"], images["label"], strict=True))
    unreadable: list[Path] = []
    reading = args.batch_size, "score", args.num_workers, detector.prepare, unreadable if args.skip_unreadable else None
    for start, prepared in zip(range(0, len(paths), args.batch_size), image_batches(paths, *reading), strict=True):
        batch = [path for path in paths[start : start + args.batch_size] if path not in unreadable]
        verdicts = detector.score(prepared, [label_of[path] for path in batch]) if batch else {}
        partial.add({keys[path]: {verdict: found[i] for verdict, found in verdicts.items()} for i, path in enumerate(batch)})
    return set(unreadable)


def scored_before(folder: Path, output_name: str, detector: Detector) -> dict[str, dict[str, Any]]:
    """The findings of the result files that are there, by the keys of `score_folder`, where these detectors made them."""
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
    """A hash of all that makes a detector's figures comparable."""
    return sha256_texts(f"{verdict} {detector_identity(facts)}" for verdict, facts in detector.facts.items())


def write_verdicts(
    args: argparse.Namespace,
    folder: Path,
    output_name: str,
    detector: Detector,
    files: dict[str, str | None],
    findings: dict[str, list[dict[str, Any]]],
    unreadable: Sequence[str] = (),
    pairing: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Write what a detector found into `folder`, and return its line for people, one a verdict.

    `files` are those that `findings` are about, in order, with their sha256 (None: not kept). Each verdict's numbers go to its
    file of `result_files`, the lines of all to `{output_name}.txt`. `pairing` is recorded, as `pair_with_prompts` explains it.
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
        write_json(path, facts | {"findings_sha256": findings_sha256(facts), "made_by": provenance(args)})
    text = "\n".join(lines)
    write_text(folder / f"{output_name}.txt", text + "\n")
    return text


class Scorecards:
    """What detectors found in images as they were drawn: one small JSON file an image, named as the image is."""

    def __init__(self, detectors: dict[str, Detector], output_names: dict[str, str], label: str | None, folder: Path):
        """Keep the cards in `folder`; `label` names the class that counts, for a detector that is asked for one."""
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
        findings = {}
        for name, detector in self.detectors.items():
            verdicts = detector.score([detector.prepare(image.convert("RGB"))], [self.label])
            findings[name] = {verdict: found for verdict, (found,) in verdicts.items()}
        card = {"drawn": line, "detectors": self.stamp, "findings": findings}
        write_json(path.with_suffix(".json"), card | {"sha256": _checksum(card)})

    def write(self, args: argparse.Namespace, expected: Sequence[Path]) -> list[str]:
        """Write the verdicts over all cards in the folder, those of other shards too; returns their lines for people.

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
            told = "%s lacks the scores of %d images that its run claims (row %d first), so no result is written yet; draw those too"
            logger.warning(told, self.folder, len(lacking), min(lacking)[0])
            return []
        kept = sorted((path for path, found in cards.items() if found is not None), key=lambda path: (row_of(path), path.name))
        files = {path.name: drawn[path.name]["sha256"] for path in kept}
        lines = []
        for name, detector in self.detectors.items():
            findings = {verdict: [cards[path][name][verdict] for path in kept] for verdict in detector.titles}
            lines.append(write_verdicts(args, self.folder, self.output_names[name], detector, files, findings))
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
