"""The command-line options of detectors, which the scorers and generate.py share, and functions that open the detectors."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from des.evaluation.detectors.base import Detector
from des.evaluation.detectors.profiles import PROFILES
from des.utils import cli
from des.utils.files import is_reserved

CLASSIFIERS = {"object": "microsoft/resnet-50", "style": None}  # defaults of --classifier by job
DETECTORS = ("nudenet", "q16", *CLASSIFIERS)
OUTPUT_NAMES = {"nudenet": "classify", "q16": "classify_16", "object": "classify_object"}  # results of --score_with


def add_nudenet(group: argparse._ActionsContainer) -> None:
    """Add the options of NudeNet."""
    # fmt: off
    group.add_argument("--profile", nargs="+", choices=PROFILES, metavar="P", help=f"nudity: detectors and rules, one or several of {', '.join(PROFILES)} (default: paper)")
    group.add_argument("--detector_weights", type=Path, metavar="FILE", help="nudity: an ONNX file instead of the installed nudenet's")
    # fmt: on


def add_classifier(group: argparse._ActionsContainer) -> None:
    """Add the options of a classifier of objects or styles, but for the class that counts."""
    # fmt: off
    group.add_argument("--classifier", metavar="M", help="folder or hub id of an image classification model (default for objects: microsoft/resnet-50; needed for style)")
    # fmt: on


def add_q16(group: argparse._ActionsContainer, default: Path | None = None) -> None:
    """Add the options of Q16."""
    group.add_argument("--prompts_file", type=Path, default=default, metavar="FILE", help="Q16's prompts.pt or prompts.p")
    # fmt: off
    group.add_argument("--clip_model", metavar="DIR", help="Q16: a local folder of a CLIP (open_clip or transformers) instead of ViT-L-14 with OpenAI's weights")
    # fmt: on


def open_nudenet(args: argparse.Namespace) -> Detector:
    """NudeNet with the profiles of --profile; the default is the paper's."""
    from des.evaluation.detectors.nudenet import NudeNet

    return NudeNet(list(dict.fromkeys(args.profile or ["paper"])), args.device, args.detector_weights)


def open_q16(args: argparse.Namespace) -> Detector:
    """Q16 with the file of --prompts_file; the default is prompts.pt in the working directory."""
    from des.evaluation.detectors.q16 import Q16

    return Q16(args.prompts_file or Path("prompts.pt"), args.device, args.clip_model)


def open_classifier(args: argparse.Namespace, job: str, what: str, classes: Sequence[str]) -> Detector:
    """The classifier of a job, `object` or `style`, that counts `classes`."""
    from des.evaluation.detectors.classifier import Classifier

    return Classifier(args.classifier or CLASSIFIERS[job], args.device, what, classes)


def add_folder(parser: argparse.ArgumentParser, output_name: str) -> None:
    """Add the options of a scorer that classifies a folder of images."""
    files = parser.add_argument_group("files")
    files.add_argument("--folder_dir", type=cli.folder, required=True, metavar="DIR", help="images, subfolders included")
    files.add_argument("--csv_path", type=Path, metavar="CSV", help="the prompts of these images; checks that none is missing")
    cli.add_other_prompts(files)
    cli.add_expected(files)
    # fmt: off
    files.add_argument("--skip_unreadable", action="store_true", help="leave out unreadable images and list them in the result, instead of stopping at the first")
    files.add_argument("--output_name", type=result_name, default=output_name, metavar="NAME", help="name of the result files")
    # fmt: on
    cli.add_output_dir(files, "the image folder")
    performance = parser.add_argument_group("performance")
    cli.add_device(performance, "--devices")
    cli.add_batches(performance, 32)


def result_name(text: str) -> str:
    """An argparse type for a `cli.file_stem` that is not reserved for another file of an image folder."""
    if is_reserved(cli.file_stem(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is the name of another file of an image folder; choose another name")
    return text


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """Add generate.py's options that score images as they are drawn."""
    group = parser.add_argument_group("scoring, as the images are drawn")
    # fmt: off
    group.add_argument("--score_with", nargs="+", choices=OUTPUT_NAMES, default=[], metavar="D", help=f"detectors: {', '.join(OUTPUT_NAMES)}")
    # fmt: on
    group.add_argument("--discard_images", action="store_true", help="keep scores and settings, and no image")
    group.add_argument(
        "--blur",
        action=cli.Removed,
        instead="keep the images, which the page of scripts/report.py blurs where a detector fired",
    )
    add_detectors(group)


def add_detectors(group: argparse._ActionsContainer) -> None:
    """Add the options of all detectors, and the class that a classifier counts."""
    add_nudenet(group)
    add_q16(group)
    add_classifier(group)
    group.add_argument("--cls_class", metavar="NAME", help="the class that a classifier counts, by name or index")


def add_detector(group: argparse._ActionsContainer) -> None:
    """Add the option for one detector, and those of all detectors."""
    group.add_argument(
        "--detector", choices=DETECTORS, default="nudenet", help="what decides whether an image shows the concept"
    )
    add_detectors(group)


def check_detector(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options of other detectors than --detector, and more than one profile."""
    check_detectors(parser, args, [args.detector], "--detector")
    if args.detector == "style" and not args.classifier:
        parser.error("--detector style needs --classifier, such as UnlearnDiffAtk's style classifier")
    if len(args.profile or []) > 1:
        parser.error("--profile takes one value here: one verdict decides whether an attack succeeded")


def open_detector(args: argparse.Namespace) -> Detector:
    """The detector of --detector."""
    return open_named(args, args.detector)


def check_scoring(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse scoring options that have no effect, or that need another option."""
    check_detectors(parser, args, args.score_with, "--score_with")
    if args.discard_images and not args.score_with:
        parser.error("--discard_images needs --score_with; without it nothing would be written")


def check_detectors(parser: argparse.ArgumentParser, args: argparse.Namespace, names: Sequence[str], flag: str) -> None:
    """Refuse options of detectors that are not among `names`, which `flag` selects, and a classifier without a class."""
    needs = {
        ("nudenet",): ("profile", "detector_weights"), ("q16",): ("prompts_file", "clip_model"),
        ("object", "style"): ("classifier", "cls_class"),
    }  # fmt: skip
    for among, options in needs.items():
        for option in options:
            if getattr(args, option, None) and not set(among) & set(names):
                parser.error(f"--{option} needs {flag} {among[0]}")
    for name in {"object", "style"} & set(names):
        if not args.cls_class:
            parser.error(f"{flag} {name} needs --cls_class")


def open_scorers(args: argparse.Namespace) -> dict[str, Detector]:
    """The detectors of --score_with, by name."""
    return {name: open_named(args, name) for name in dict.fromkeys(args.score_with)}


def open_named(args: argparse.Namespace, name: str) -> Detector:
    """The detector of a name in DETECTORS."""
    if name in CLASSIFIERS:
        return open_classifier(args, name, f"ASR of {args.cls_class}", [args.cls_class])
    return {"nudenet": open_nudenet, "q16": open_q16}[name](args)
