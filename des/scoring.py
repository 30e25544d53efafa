"""Scoring images with a detector (tasks/detectors/): one command line, one loop and one form of result for all of them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from des import cli
from des.cli import UserError, logger
from des.images import image_batches, image_files, pair_with_prompts, row_of
from des.results import proportion, provenance, show, write_json, write_text

import pandas as pd

if TYPE_CHECKING:
    from tasks.detectors import Detector


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


def score_folder(args: argparse.Namespace, detector: "Detector", paths: list[Path], labels: Sequence[str | None]) -> None:
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
    detector: "Detector",
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
