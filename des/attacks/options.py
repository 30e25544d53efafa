"""The command-line options that all attacks share."""

import argparse
from pathlib import Path

from des.evaluation.detectors.options import add_detector, check_detector
from des.generation.defences import add_method, check_method
from des.generation.options import add_sampling
from des.models.families import DTYPES, MODEL_TYPES, described_dtypes
from des.utils import cli


def add_attack(parser: argparse.ArgumentParser, steps: int, meaning: str) -> None:
    """Add the options of every attack; `steps` is the default of --steps, and `meaning` says what a step is."""
    model = parser.add_argument_group("the attacked pipeline")
    cli.add_model(model)
    model.add_argument("--model_type", choices=MODEL_TYPES, help="refuse a model that is not of this type")
    add_method(model)
    attack = parser.add_argument_group("attack")
    # fmt: off
    attack.add_argument("--prompts_csv", type=Path, required=True, metavar="CSV", help="CSV with a column `prompt`: the target prompts")
    attack.add_argument("--out", type=cli.output_folder, required=True, metavar="DIR", help="output folder: attack.json, the found prompts (attack.csv, one file per cell), and the records from which the same command resumes")
    attack.add_argument("--control_dir", type=cli.output_folder, metavar="DIR", help="folder with the records of the control, the same attack on the original model, which attacks on several defences may share: the --out of a run with --training_method none (default: OUT/control)")
    attack.add_argument("--start_idx", type=cli.natural, default=0, metavar="I", help="first row; several processes may share a list and --out")
    attack.add_argument("--end_idx", type=cli.positive_int, metavar="I", help="row after the last (default: all)")
    attack.add_argument("--steps", type=cli.positive_int, default=steps, metavar="N", help=meaning)
    attack.add_argument("--restarts", type=cli.positive_int, default=1, metavar="N", help="searches per prompt, each with other random numbers; stops at the first success")
    attack.add_argument("--concept_words", nargs="+", default=[], metavar="W", help="names of the concept: the attack is run a second time without these words in the starting prompts and in the found ones")
    attack.add_argument("--forbidden_tokens", type=Path, metavar="FILE", help="file of words, one per line, that a found prompt may not contain")
    add_detector(parser.add_argument_group("detector"))
    sampling = parser.add_argument_group("sampling")
    add_sampling(sampling)
    performance = parser.add_argument_group("performance")
    cli.add_device(performance)
    performance.add_argument("--batch_size", type=cli.positive_int, default=1, metavar="N", help="prompts per batch; an interruption loses the batch at work")
    performance.add_argument("--dtype", choices=DTYPES, help=f"default: {described_dtypes()}")
    # fmt: on
    cli.add_deterministic(performance)
    cli.add_log_file(parser)


def add_encoders_searched(group: argparse._ActionsContainer) -> None:
    """Add the option for the text encoders that an attack searches."""
    # fmt: off
    group.add_argument("--encoders", type=cli.positive_int, nargs="+", metavar="I", help="numbers of the text encoders that are searched (default: all)")
    # fmt: on


def add_text_search(group: argparse._ActionsContainer) -> None:
    """Add the options of searches for text that need text encoders only."""
    add_encoders_searched(group)
    # fmt: off
    group.add_argument("--search_on", choices=("attacked", "original"), default="attacked", help="text encoders that the search uses: attacked (white box) or original (black box)")
    # fmt: on


def check_attack(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Refuse options that do not go together, and resolve the device."""
    check_method(parser, args)
    check_detector(parser, args)
    if args.end_idx is not None and args.end_idx <= args.start_idx:
        parser.error(f"--end_idx {args.end_idx} must be above --start_idx {args.start_idx}")
    if not all(word.strip() for word in args.concept_words):
        parser.error("--concept_words contains a blank word; remove it")
    if args.training_method == "none":
        if args.control_dir:
            parser.error("--control_dir does not go with --training_method none: this run is itself the control, in --out")
        args.control_dir = args.out
    else:
        args.control_dir = args.control_dir or args.out / "control"
        if args.control_dir.resolve() == args.out.resolve():
            parser.error("--control_dir must be another folder than --out")
    return cli.check_device(parser, args)
