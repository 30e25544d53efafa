"""Check a folder of images that generate.py drew: its files, its scores, and a sample of images drawn again. Or check a checkpoint.

    python scripts/verify.py results/des/stable-diffusion-v1-5/t2i_sneaky --sample 4 --device cuda:0
    python scripts/verify.py --checkpoint checkpoints/des_sexual/1e-05_0.3/checkpoint-2.pt --device cuda:0

Compares every image with the manifest, the manifest with run.json, and every score file in and beside the folder with the images
that it scored (FID, CLIP score, PickScore, BLIP score and ImageReward too). Then it draws a random sample again from the recorded
command and compares pixels; where images were discarded, the scores. Run it in the folder where the command was run, with
the same files in place. For a checkpoint, it measures how far the checkpoint moves the embeddings of its concept and of neutral
prompts. The exit code is 1 if anything differs or a checkpoint may not protect.
"""

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from des.utils import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "folder", type=cli.folder, nargs="?", metavar="DIR", help="folder of images with run.json and manifest.jsonl"
    )
    sampled = parser.add_argument_group("for a folder")
    of_checkpoint = parser.add_argument_group("instead of a folder")
    of_checkpoint.add_argument("--checkpoint", type=Path, metavar="CKPT", help="a protected text encoder")
    cli.add_model(of_checkpoint)
    cli.add_encoder_index(of_checkpoint)
    of_checkpoint.add_argument(
        "--concept_prompt", nargs="+", metavar="TEXT", help="for a checkpoint whose metadata names no concept"
    )
    sampled.add_argument("--sample", type=cli.natural, default=4, metavar="N", help="images to draw again")
    sampled.add_argument("--seed", type=cli.natural, default=0, metavar="S", help="seeds the choice of the sample")
    sampled.add_argument(
        "--tolerance", type=cli.natural, default=0, metavar="L",
        help="levels (of 255) that a pixel may differ by: 0 on the machine that drew the images, some on another",
    )  # fmt: skip
    cli.add_device(parser.add_argument_group("performance"))
    args = parser.parse_args(argv)
    if (args.folder is None) == (args.checkpoint is None):
        parser.error("name a folder of images, or --checkpoint CKPT, and not both")
    if args.concept_prompt and args.checkpoint is None:
        parser.error("--concept_prompt needs --checkpoint")
    return cli.check_device(parser, args)


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.data import manifest
from des.data.claims import check_complete
from des.data.image_folders import image_hashes
from des.data.images import read_image
from des.data.run_record import read_run
from des.evaluation.detectors.options import add_scoring
from des.evaluation.results import MEANS, Score, read_scores
from des.evaluation.scored_images import mean_and_interval
from des.models.encoders import family_if_any, load_encoder
from des.models.shift import concepts_of, describe, embedding_of, measure, recorded, shifts_of
from des.utils import cli, logs
from des.utils.errors import UserError
from des.utils.scripts import run_script
from des.utils.stats import proportion

import numpy as np
import pandas as pd
import torch


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logs.setup_logging()
    if args.checkpoint:
        check_checkpoint(args)
        return
    run, lines = read_run(args.folder)
    check_complete(args.folder, option=None)
    kept = {name: line for name, line in lines.items() if line["sha256"]}
    if kept:
        image_hashes(args.folder)
    print(f"{len(kept)} images match {manifest.NAME}, {len(lines) - len(kept)} were scored and discarded")
    for path in dict.fromkeys(score.path for score in map(check_interval, read_scores(args.folder, lines))):
        print(f"{path.name} is about these images")
    sample = random.Random(args.seed).sample(sorted(lines), min(args.sample, len(lines)))
    for name in sample:
        print(redraw(args, run, lines[name]))


def check_checkpoint(args: argparse.Namespace) -> None:
    """Print how far a checkpoint moves embeddings. Raises UserError if it may not protect, or if that is unknown."""
    known = concepts_of(recorded(args.checkpoint))
    if known and args.concept_prompt and known != args.concept_prompt:
        raise UserError(f"the metadata of {args.checkpoint} names the concept itself; leave out --concept_prompt")
    encoder = load_encoder(
        args.model_path, args.text_encoder_idx, args.device, embedding_of(args.checkpoint), variant=args.variant
    )
    metadata = measure(encoder, args.checkpoint, family_if_any(args.model_path), args.concept_prompt)
    for reader, shift in shifts_of(metadata).items():
        print(f"{reader}{describe(shift)}")
    if metadata["doubt"]:
        raise UserError(f"{args.checkpoint}: {metadata['doubt']}")
    if metadata["shift"]["concept"] is None:
        raise UserError(
            f"whether {args.checkpoint} protects is unknown, because its metadata names no concept; pass --concept_prompt"
        )


def redraw(args: argparse.Namespace, run: dict[str, Any], line: dict[str, Any]) -> str:
    """Draw one image again, and return a line that says so. Raises UserError if it differs."""
    path = args.folder / line["file"]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        options = command(run["made_by"]["arguments"], line, keep_scoring=line["sha256"] is None)
        run_script("generate.py", *options, "--results_dir", results, "--device", args.device)
        (again,) = results.rglob(path.with_suffix(".json" if line["sha256"] is None else ".png").name)
        if line["sha256"] is None:
            old, new = (json.loads(each.read_text(encoding="utf-8")) for each in (path.with_suffix(".json"), again))
            if _verdicts(old["findings"]) != _verdicts(new["findings"]):
                raise UserError(f"{path.name} has other verdicts when it is drawn again")
            return f"{path.name} drawn again: the same verdicts"
        old, new = (np.asarray(read_image(each)).astype(int) for each in (path, again))
    gap = int(np.abs(old - new).max()) if old.shape == new.shape else 255
    if gap > args.tolerance:
        raise UserError(f"{path.name} is another image when it is drawn again: pixels differ by up to {gap} of 255")
    return f"{path.name} drawn again: " + ("the same pixels" if gap == 0 else f"pixels differ by up to {gap} of 255")


def command(arguments: dict[str, Any], line: dict[str, Any], keep_scoring: bool) -> list[str]:
    """The options of generate.py that draw one image again, from the recorded ones, without those that write other files.

    Options of scorers change no pixel, so they are left out unless `keep_scoring` is set.
    """
    row = {"start_idx": line["row"], "end_idx": line["row"] + 1}
    here = {"results_dir": None, "device": None, "log_prompts": False}  # `redraw` adds a folder and a device
    here |= {"blur": False, "attention_slicing": False}  # options of earlier versions
    left_out = options_of(cli.add_log_file) | (set() if keep_scoring else options_of(add_scoring))
    argv = []
    for name, value in (arguments | row | here).items():
        if name in left_out or value is None or value is False or value == []:  # 0 is a value, and equals False
            continue
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        else:
            argv.append(f"--{name}" if value is True else f"--{name}={value}")  # a value may start with a dash
    return argv


def options_of(add: Callable[[argparse.ArgumentParser], object]) -> set[str]:
    """The names of the options that a function adds to a parser."""
    parser = argparse.ArgumentParser()
    add(parser)
    return set(vars(parser.parse_args([])))


def check_interval(score: Score) -> Score:
    """Return the score. Raises UserError if its share or interval does not follow from its counts."""
    if score.kind in ("asr", "accuracy"):
        expected = proportion(score.content["k"], score.content["n"])
        if any(not math.isclose(score.content[name], expected[name], abs_tol=1e-9) for name in ("fraction", "low", "high")):
            raise UserError(f"{score.path} has a share or interval that its counts do not give; score the folder again")
    if score.kind in ("mean", "lpips"):
        _check_mean(score)
    return score


def _check_mean(score: Score) -> None:
    """Compare the interval of a mean with the one of the table beside it."""
    rows = pd.read_csv(score.path.with_suffix(".csv"))
    name = next(name for name, title in MEANS.items() if title == score.title)
    _, interval = mean_and_interval(torch.tensor(rows[name].tolist(), dtype=torch.float64))
    recorded = {"low": score.low, "high": score.high}
    if any(not math.isclose(recorded[end] or 0.0, value, rel_tol=1e-6, abs_tol=1e-9) for end, value in interval.items()):
        raise UserError(f"{score.path} has an interval that the scores beside it do not give; score the folder again")


def _verdicts(findings: dict[str, Any]) -> dict[str, Any]:
    return {name: {verdict: found["hit"] for verdict, found in verdicts.items()} for name, verdicts in findings.items()}


if __name__ == "__main__":
    cli.run(main)
