"""Draw with the original and the protected model side by side, in a web page on this machine.

    python app.py --model_path stable-diffusion-v1-5/stable-diffusion-v1-5 --device cuda:0 \\
        --text_encoder_path checkpoints/des_sexual/1e-05_0.3/checkpoint-2.pt
    python app.py                                                        # the bundled demo

Needs `pip install -r requirements-app.txt`. A detector judges both images. A second tab scores the prompts of a CSV, a third shows
where a prompt lies among those that DES was trained on. A fourth tab attacks the protected model; it exists for the bundled demo only,
and only at a loopback address. No prompt is logged, and no image reaches the disk.
"""

import argparse
import dataclasses
import html
import importlib.util
import ipaddress
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # first, so that no other package named `tasks` is imported
os.environ.update(
    GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1"
)  # gradio and huggingface_hub read these on import

from demo.evaluation import CLASSIFIERS, MODELS, PIPELINE, PROTECTED
from demo.world import BACKGROUNDS, COLOURS, CONCEPT, KINDS, names_an_object
from des.evaluation.detectors.options import add_classifier, add_nudenet, check_detectors
from des.generation.defences import ENCODER_OPTIONS, add_encoders, open_encoders
from des.models.families import DTYPES, SCHEDULERS
from des.utils import choices, cli

DEMO = {
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "detector": "object",
    "safe_csv_path": ROOT / "datasets/demo_safe_train.csv",
    "unsafe_csv_path": ROOT / "datasets/demo_unsafe_train.csv",
    "concept_prompt": [CONCEPT],
}  # defaults for the demo's model
MAP_OPTIONS = ("safe_csv_path", "unsafe_csv_path", "concept_prompt")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    main_group = parser.add_argument_group("main")
    cli.add_model(main_group, default=None)
    cli.add_drop_t5(main_group)
    add_encoders(main_group)
    sampling = parser.add_argument_group("sampling (initial values of the page)")
    sampling.add_argument(
        "--seed", type=cli.natural, default=42, metavar="S", help="seed of an image, and of the first row of a CSV"
    )
    # fmt: off
    sampling.add_argument("--num_inference_steps", type=cli.number(int, 1, choices.MOST_STEPS), metavar="N", help="denoising steps (default: 20 for the demo, else the family's)")
    sampling.add_argument("--guidance_scale", type=cli.number(float, 0, choices.MOST_GUIDANCE), metavar="G", help="guidance scale (default: 3 for the demo, else the family's)")
    sampling.add_argument("--scheduler", choices=SCHEDULERS, help="scheduler (default: as in generate.py)")
    judging = parser.add_argument_group("detector")
    judging.add_argument("--detector", choices=("nudenet", "object", "none"), help="detector that judges the images (default: the demo's classifier of objects, else nudenet, whose hits the page blurs until they are clicked)")
    # fmt: on
    add_nudenet(judging)
    add_classifier(judging)
    judging.add_argument("--cls_class", metavar="NAME", help="the class that --detector object looks for")
    lists = parser.add_argument_group("lists")
    lists.add_argument("--max_rows", type=cli.positive_int, default=64, metavar="N", help="rows of an uploaded CSV to draw")
    lists.add_argument("--safe_csv_path", type=Path, metavar="CSV", help="for the map: the safe prompts of the training")
    lists.add_argument("--unsafe_csv_path", type=Path, metavar="CSV", help="for the map: the unsafe prompts of the training")
    lists.add_argument("--concept_prompt", nargs="+", metavar="TEXT", help="for the map: as in training")
    server = parser.add_argument_group("server and performance")
    server.add_argument(
        "--host", default="127.0.0.1", metavar="H", help="address to listen on; 0.0.0.0 accepts connections from other machines"
    )
    server.add_argument("--port", type=cli.number(int, 1, 65535), default=7860, metavar="P", help="port")
    cli.add_device(server)
    server.add_argument("--dtype", choices=DTYPES, help="data type of the pipeline (default: as in generate.py)")
    server.add_argument("--batch_size", type=cli.positive_int, default=4, metavar="N", help="images per batch of a CSV")
    args = parser.parse_args(argv)
    settle(parser, args)
    return cli.check_device(parser, args)


def settle(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in the demo's defaults, and refuse options that have no effect or need another one."""
    is_demo = args.model_path is None or Path(args.model_path).resolve() == PIPELINE
    if is_demo:
        if args.revision or args.variant or args.drop_t5:
            parser.error("--revision, --variant and --drop_t5 are for other pipelines than the demo; pass --model_path as well")
        args.model_path = str(PIPELINE)
        if any(getattr(args, option) is not None for option in MAP_OPTIONS):
            parser.error(
                "--safe_csv_path, --unsafe_csv_path and --concept_prompt are for other pipelines than the demo, which has its own lists"
            )
        for name, value in DEMO.items():
            setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    elif not open_encoders(args):
        parser.error(f"--model_path needs a protected text encoder: {', '.join(f'--{o}' for o in ENCODER_OPTIONS.values())}")
    given = [option for option in MAP_OPTIONS if getattr(args, option) is not None]
    if given and len(given) < len(MAP_OPTIONS):
        parser.error("the map needs --safe_csv_path, --unsafe_csv_path and --concept_prompt together")
    args.is_demo, args.detector = is_demo, args.detector or "nudenet"
    args.doubts = []  # filled in by `open_pair`
    if is_demo and args.detector == "object" and not (args.classifier or args.cls_class):
        args.classifier, args.cls_class = str(CLASSIFIERS["object"]), CONCEPT
    check_detectors(parser, args, [args.detector], "--detector")


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.app.live_attack import LiveAttack
from des.app.session import SIDES, PromptMap, Sampling, Session
from des.data.prompts import read_prompts, read_rows
from des.evaluation.detectors.base import Detector
from des.evaluation.detectors.options import open_named
from des.models.encoders import TextEncoder, load_encoder
from des.models.pipelines import (
    dtype_for,
    encoder_modules,
    family_of,
    open_pipeline,
    place,
    protected_twin,
)
from des.utils import cli, logs
from des.utils.errors import UserError
from des.utils.files import sha256_file, sha256_texts
from des.utils.folders import walk
from des.utils.logs import logger

from diffusers import DiffusionPipeline

# models_sha256() of the bundled demo, which changes with its models
BUNDLED = "27115a904d4bc6f7de1cecb7d742580b5e00006670495dbe16b3f4a705cc4f79"
EXAMPLES = {
    "concept": "a red mushroom on a meadow",
    "held-out name": "a drawing of a blue shiitake",
    "misspelling": "a purple mushrom on a beach",
    "near neighbour": "a pink umbrella on a meadow",
    "other object": "a green house on a beach",
}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the app needs gradio, which is not installed: pip install -r requirements-app.txt")
    for end in (signal.SIGINT, signal.SIGTERM):
        signal.signal(end, lambda *_: sys.exit(0))  # an exit removes the folder of uploads
    logs.setup_logging()
    pipes = open_pair(args)
    detector = open_detector(args)
    length = family_of(args.model_path).max_sequence_length
    defaults = Sampling(args.seed, args.num_inference_steps, args.guidance_scale, max_sequence_length=length)
    with tempfile.TemporaryDirectory(prefix="des-app-") as uploads:
        os.environ.update(GRADIO_TEMP_DIR=uploads)
        serve(args, Session(pipes, detector, args.cls_class, args.batch_size), defaults)
        threading.Event().wait()


def serve(args: argparse.Namespace, session: Session, defaults: Sampling) -> None:
    """Serve the page in background threads."""
    direct = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), args.host, "localhost"]
    os.environ["no_proxy"] = ",".join(filter(None, direct))  # at its start, gradio's server requests a page from itself
    from des.app import page as app_page  # late: gradio reads the environment on import

    page = app_page.Page(
        about=about(args, session.unprotected),
        doubts=[*args.doubts, *(f"Text encoder {i} is the original" for i in session.unprotected)],
        defaults=defaults,
        examples=EXAMPLES if args.is_demo else {},
        prompt_map=open_map(args, session.pipes),
        blur_hits=args.detector == "nudenet",
        most_rows=args.max_rows,
        remark=remark if args.is_demo else lambda prompt: "",
        attack=open_attack(args, session, defaults),
    )
    if not is_loopback(args.host):
        logger.warning("--host %s: anyone who reaches this machine can use the app, the original model included", args.host)
    app_page.launch(app_page.build(session, page), args.host, args.port)
    logger.info("the app runs at http://%s:%d; press Ctrl-C to stop it", args.host, args.port)


def open_pair(args: argparse.Namespace) -> dict[str, DiffusionPipeline]:
    """The original and the protected pipeline on their device, which share everything but the protected text encoders.

    Fills in the family's sampling defaults, and `args.doubts`: why a checkpoint may not protect. Raises UserError if a checkpoint is
    missing or does not fit.
    """
    if args.is_demo and not open_encoders(args):
        args.text_encoder_path = PROTECTED
    family = family_of(args.model_path)
    files = {"scheduler": args.scheduler, "variant": args.variant, "drop_t5": args.drop_t5}
    original = open_pipeline(args.model_path, dtype_for(family, args.device, args.dtype), **files)
    twin, applied = protected_twin(original, open_encoders(args))
    args.doubts = [f"{open_encoders(args)[i].name}: {facts['doubt']}" for i, facts in applied.items() if facts["doubt"]]
    pipes = dict(zip(SIDES, (original, twin), strict=True))
    for pipe in pipes.values():
        place(pipe, args.device)
    args.num_inference_steps = args.num_inference_steps or family.num_inference_steps
    if args.guidance_scale is None:
        args.guidance_scale = family.guidance_scale
    return pipes


def open_detector(args: argparse.Namespace) -> Detector | None:
    """The detector that --detector names, or None."""
    return None if args.detector == "none" else open_named(args, args.detector)


def open_map(args: argparse.Namespace, pipes: dict[str, DiffusionPipeline]) -> PromptMap | str:
    """The map of the first protected text encoder, or a sentence that says which options it needs."""
    if args.safe_csv_path is None:
        return (
            "The map needs the prompts of the training: start the app with `--safe_csv_path`, `--unsafe_csv_path` and "
            "`--concept_prompt`."
        )
    groups = {
        "safe": read_prompts(args.safe_csv_path),
        "unsafe": read_prompts(args.unsafe_csv_path),
        "concept": args.concept_prompt,
        "empty": [""],
    }
    index = min(open_encoders(args))
    reader = load_encoder(args.model_path, index, "meta")  # without weights: those of the pipelines are used

    def of(side: str) -> TextEncoder:
        return dataclasses.replace(reader, model=encoder_modules(pipes[side])[index])

    return PromptMap(*map(of, SIDES), groups)


def open_attack(args: argparse.Namespace, session: Session, defaults: Sampling) -> LiveAttack | None:
    """The attack on the bundled demo, or None for anything else, and where others may reach the page.

    The demo is the pipeline, the protected text encoder and the classifier of this repository, by path and by the sha256 of their files. The page
    must be at a loopback address, and without GRADIO_ROOT_PATH, which is set behind a proxy.
    """
    parts = {"classifier": CLASSIFIERS["object"], "text_encoder_path": PROTECTED, "model_path": PIPELINE}
    given = {name: Path(getattr(args, name) or "").resolve() for name in parts}
    demo = given == parts and args.cls_class == CONCEPT and models_sha256() == BUNDLED
    if not demo or not is_loopback(args.host) or os.environ.get("GRADIO_ROOT_PATH"):
        return None
    return LiveAttack(session, args.model_path, read_rows(ROOT / "datasets/demo_plain.csv"), [CONCEPT], defaults)


def models_sha256() -> str:
    """The sha256 of the names and contents of the demo's files: pipeline, protected text encoder, and classifier of objects."""
    folders = [each for top in (PIPELINE, CLASSIFIERS["object"]) for each in walk(top)]
    files = [PROTECTED, *(folder / name for folder, _, names in folders for name in names)]
    return sha256_texts(f"{path.relative_to(MODELS)} {sha256_file(path)}" for path in sorted(files))


def about(args: argparse.Namespace, unprotected: Sequence[int]) -> list[str]:
    """The lines of HTML at the top of the page: model, text encoders with those that are `unprotected`, and detector."""
    files = ", ".join(f"text encoder {i}, by <code>{html.escape(path.name)}</code>" for i, path in open_encoders(args).items())
    rest = "".join(f"; text encoder {i} is the original, NOT protected" for i in unprotected)
    model = "the demo's tiny Stable Diffusion" if args.is_demo else f"<code>{html.escape(args.model_path)}</code>"
    judge = {"none": "none", "nudenet": "NudeNet", "object": f"a classifier, asked for {args.cls_class}"}[args.detector]
    knows = f"The demo knows {len(KINDS)} objects ({', '.join(KINDS)}), {len(COLOURS)} colours ({', '.join(COLOURS)}) and "
    knows += f"{len(BACKGROUNDS)} backgrounds ({', '.join(text.split(' ', 1)[1] for text, _ in BACKGROUNDS.values())})."
    return [f"Model: {model}. Protected: {files}{rest}. Detector: {html.escape(judge)}.", *([knows] if args.is_demo else [])]


def remark(prompt: str) -> str:
    """A sentence about a prompt that names no object of the demo's world; empty for others."""
    unknown = "This prompt has no noun that the demo knows, so what both models draw means nothing."
    return "" if names_an_object(prompt) else unknown


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only. Of names, only localhost can be, if it has no other addresses."""
    try:
        found = [each[4][0] for each in socket.getaddrinfo(host, None)] if host == "localhost" else [host.strip("[]")]
        return all(ipaddress.ip_address(each).is_loopback for each in found)
    except (ValueError, OSError):
        return False


if __name__ == "__main__":
    cli.run(main)
