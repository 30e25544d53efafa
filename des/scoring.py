"""Scoring images with a detector (tasks/detectors/): one command line, one loop and one form of result for all of them."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from des import cli
from des.cli import UserError, logger
from des.images import BLURRED, image_batches, image_files, pair_with_prompts, row_of
from des.results import proportion, provenance, replacing, sha256_texts, show, write_json, write_text

import pandas as pd
from PIL import Image, PngImagePlugin


class Detector(Protocol):
    """Decides what an image shows. A detector may give several verdicts (by name), as NudeNet's profiles do.

    `titles` says in words what each verdict counts, `facts` what makes its figures comparable: weights, hashes, thresholds.
    """

    titles: dict[str, str]
    facts: dict[str, dict[str, Any]]

    def prepare(self, image: Image.Image) -> Any:
        """Turn an RGB image into what `score` takes; called by several threads at once."""

    def score(self, prepared: list, labels: Sequence[str | None]) -> dict[str, list[dict[str, Any]]]:
        """For each verdict a finding an image, whose `hit` says whether it counts; `labels` names the class that counts for each.

        A None among the labels stands for what the detector looks for by itself.
        """

    def summary(self, verdict: str, findings: list[dict[str, Any]]) -> dict[str, Any]:
        """What a set of findings amounts to beyond k of n."""

    def line(self, summary: dict[str, Any]) -> str:
        """The summary for people, to go after k of n; empty where there is nothing to add."""


def add_folder(parser: argparse.ArgumentParser, output_name: str) -> None:
    """Add the options of a scorer that classifies a folder of images."""
    files = parser.add_argument_group("files")
    files.add_argument("--folder_dir", type=Path, required=True, metavar="DIR", help="images, subfolders included")
    files.add_argument("--csv_path", type=Path, metavar="CSV", help="the prompts of these images; checks that none is missing")
    cli.add_expected(files)
    files.add_argument(
        "--skip_unreadable", action="store_true", help="count unreadable images apart instead of stopping at the first"
    )
    files.add_argument(
        "--output_name", default=output_name, metavar="NAME", help="of the two files written into the image folder"
    )
    performance = parser.add_argument_group("performance")
    cli.add_device(performance, "--devices")
    cli.add_batches(performance, 32)


def images_of(args: argparse.Namespace) -> pd.DataFrame:
    """The images to score, in a column `image`; with --csv_path beside the columns of their rows."""
    found = image_files(args.folder_dir, args.expected)
    return pair_with_prompts(args.folder_dir, args.csv_path) if args.csv_path else pd.DataFrame({"image": found})


def score_folder(args: argparse.Namespace, detector: Detector, paths: list[Path], labels: Sequence[str | None]) -> None:
    """Score images and write `{output_name}.txt` and `.json` beside them; `labels` names the class that counts for each.

    Raises UserError for an unreadable image, before anything is written, unless --skip_unreadable; then also where none is left.
    """
    unreadable: list[Path] = []
    findings: dict[str, list[dict[str, Any]]] = {name: [] for name in detector.titles}
    label_of = dict(zip(paths, labels, strict=True))
    reading = args.batch_size, "score", args.num_workers, detector.prepare, unreadable if args.skip_unreadable else None
    for start, prepared in zip(range(0, len(paths), args.batch_size), image_batches(paths, *reading), strict=True):
        lost = set(unreadable)
        batch = [label_of[path] for path in paths[start : start + args.batch_size] if path not in lost]
        for name, found in (detector.score(prepared, batch) if prepared else {}).items():
            findings[name] += found
    lost = set(unreadable)
    scored = [path for path in paths if path not in lost]
    if not scored:
        raise UserError(f"none of the {len(paths)} images in {args.folder_dir} can be read")
    if lost:
        logger.warning("%d of %d images could not be read and are not counted", len(lost), len(paths))
    names = [str(path.relative_to(args.folder_dir)) for path in scored]
    skipped = [str(path.relative_to(args.folder_dir)) for path in unreadable]
    print(write_verdicts(args, args.folder_dir, args.output_name, detector, names, findings, skipped))


def write_verdicts(
    args: argparse.Namespace,
    folder: Path,
    output_name: str,
    detector: Detector,
    names: list[str],
    findings: dict[str, list[dict[str, Any]]],
    unreadable: Sequence[str] = (),
) -> str:
    """Write what a detector found into `folder`, and return its line for people, one a verdict.

    `names` are the files that `findings` are about, in order. The first verdict's numbers are in `{output_name}.json`, a further
    one's in `{output_name}_{verdict}.json`; the lines of all are in `{output_name}.txt`.
    """
    lines = []
    for i, (verdict, found) in enumerate(findings.items()):
        score, summary = proportion(sum(finding["hit"] for finding in found), len(found)), detector.summary(verdict, found)
        parts = [f"{detector.titles[verdict]}: {show(score)}", detector.line(summary)]
        parts += [f"{len(unreadable)} unreadable images are not counted"] if unreadable else []
        lines.append(", ".join(filter(None, parts)))
        facts = {**score, "what": detector.titles[verdict], **summary, "detector": detector.facts[verdict]}
        facts["unreadable"] = list(unreadable)
        facts["images"] = [
            {"file": name, "row": row_of(Path(name)), **finding} for name, finding in zip(names, found, strict=True)
        ]
        path = folder / (f"{output_name}_{verdict}.json" if i else f"{output_name}.json")
        write_json(path, facts | {"made_by": provenance(args)})
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
        facts = {name: detector.facts for name, detector in detectors.items()}
        self.stamp = sha256_texts([json.dumps(facts, sort_keys=True, default=str), str(label)])

    def read(self, card: Path) -> dict[str, Any] | None:
        """The findings on a card by detector and verdict, or None unless it is whole and these detectors wrote it."""
        try:
            content = json.loads(card.read_text(encoding="utf-8"))
            return content["findings"] if content["detectors"] == self.stamp else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def has(self, path: Path) -> bool:
        """Whether the image that is or would be at `path` was scored."""
        return self.read(path.with_suffix(".json")) is not None

    def score(self, path: Path, image: Image.Image) -> None:
        """Score the image that belongs at `path`: alone, so that its figures do not depend on what is drawn beside it."""
        findings = {}
        for name, detector in self.detectors.items():
            verdicts = detector.score([detector.prepare(image.convert("RGB"))], [self.label])
            findings[name] = {verdict: found for verdict, (found,) in verdicts.items()}
        write_json(path.with_suffix(".json"), {"file": path.name, "detectors": self.stamp, "findings": findings})

    def write(self, args: argparse.Namespace, expected: Sequence[Path]) -> list[str]:
        """Write the verdicts over all cards in the folder, those of other shards too; returns their lines for people.

        Raises UserError where one of `expected` was lost meanwhile.
        """
        cards = {card: self.read(card) for card in self.folder.glob("*p*.json") if row_of(card) is not None}
        missing = [path for path in expected if cards.get(path.with_suffix(".json")) is None]
        if missing:
            raise UserError(f"{missing[0].with_suffix('.json')} was lost while others were drawn; run this again")
        other = sum(found is None for found in cards.values())
        if other:
            logger.warning("%d cards in %s are of other detectors and not counted", other, self.folder)
        kept = sorted((card for card, found in cards.items() if found is not None), key=lambda card: (row_of(card), card.name))
        names = [card.with_suffix(".png").name for card in kept]
        lines = []
        for name, detector in self.detectors.items():
            findings = {verdict: [cards[card][name][verdict] for card in kept] for verdict in detector.titles}
            lines.append(write_verdicts(args, self.folder, self.output_names[name], detector, names, findings))
        return lines


def save_blurred(image: Image.Image, path: Path) -> None:
    """Save a thumbnail of which only colours are left, marked so that no scorer takes it for the image."""
    mark = PngImagePlugin.PngInfo()
    mark.add_text(*BLURRED)
    small = image.convert("RGB").resize((12, 12), Image.Resampling.BOX)
    with replacing(path) as temporary:
        small.resize((128, 128), Image.Resampling.BICUBIC).save(temporary, format="PNG", pnginfo=mark)
