"""Generate an image for each prompt of a CSV, with the original model or a protected one.

    python generate.py --model_path stable-diffusion-v1-5/stable-diffusion-v1-5 --device cuda:0 \\
        --prompts_csv datasets/coco_prompts.csv --output_path t2i_coco --end_idx 10000 \\
        --training_method des --text_encoder_path checkpoints/des_sexual/1e-05_0.3/checkpoint-2.pt

Images go to results/{training_method}/{model}/{output_path}/{output_path}_{training_method}_{row}p.png, with run.json beside
them. Image i is drawn from seed S + i: it is the same in any order, shard or resume, and at another --batch_size up to rounding.
Several GPUs share the rows under: accelerate launch generate.py ...
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # before a `tasks` of anyone else's

from des.evaluation.detectors.options import add_scoring, check_scoring
from des.generation.defences import add_method, check_method
from des.generation.options import add_sampling, open_dtype
from des.models.families import DTYPES, MODEL_TYPES, described_dtypes
from des.utils import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    main_group = parser.add_argument_group("main")
    cli.add_model(main_group)
    main_group.add_argument("--model_type", choices=MODEL_TYPES, help="refuse a model that is not of this type")
    cli.add_drop_t5(main_group)
    add_method(main_group)
    # fmt: off
    main_group.add_argument("--learned_tokens", type=Path, metavar="FILE", help="input embeddings that scripts/attacks/concept_inversion.py learned, as new tokens of this model")
    # fmt: on
    files = parser.add_argument_group("prompts and images")
    source = files.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts_csv", type=Path, metavar="CSV", help="column `prompt`; blank rows do not count")
    source.add_argument("--prompt", metavar="TEXT", help="one prompt instead of a CSV")
    # fmt: off
    files.add_argument("--output_path", required=True, metavar="NAME", help="name of the image folder, and start of each file's name")
    files.add_argument("--results_dir", type=cli.output_folder, default=Path("results"), metavar="DIR", help="parent folder of the image folders")
    files.add_argument("--start_idx", type=cli.natural, default=0, metavar="I", help="first row")
    files.add_argument("--end_idx", type=cli.positive_int, metavar="I", help="row after the last (default: all)")
    files.add_argument("--num_images_per_prompt", type=cli.positive_int, default=1, metavar="N", help="image k above 0 of a row is named {row}p_{k}")
    files.add_argument("--init_images", type=Path, metavar="DIR", help="image to image: an image for each row, named {row}.png or ..._{row}p.png")
    files.add_argument("--mask_images", type=Path, metavar="DIR", help="inpainting: white or opaque where --init_images changes")
    sampling = parser.add_argument_group("sampling")
    add_sampling(sampling)
    sampling.add_argument("--strength", type=cli.number(float, 0, 1, low_open=True), metavar="X", help="strength of image to image and inpainting: 1 ignores --init_images")
    sampling.add_argument("--use_refiner", action="store_true", help="SDXL: finish with the refiner, on the same text encoder 2")
    sampling.add_argument("--refiner_path", metavar="R", help="default: stabilityai/stable-diffusion-xl-refiner-1.0")
    sampling.add_argument("--high_noise_frac", type=cli.number(float, 0, 1, low_open=True, high_open=True), metavar="F", help="share of the steps that run before the refiner (default: 0.8)")
    # fmt: on
    sampling.add_argument("--log_prompts", action="store_true", help="log each prompt with its row as it is drawn")
    performance = parser.add_argument_group("performance")
    cli.add_device(performance)
    performance.add_argument("--batch_size", type=cli.positive_int, default=4, metavar="N", help="images at a time")
    performance.add_argument("--dtype", choices=DTYPES, help=f"default: {described_dtypes()}")
    cli.add_deterministic(performance)
    performance.add_argument("--enable_model_cpu_offload", action="store_true", help="keep on the GPU only the model in use")
    performance.add_argument(
        "--attention_slicing",
        action=cli.Removed,
        instead="to save memory, use --enable_model_cpu_offload",
    )
    add_scoring(parser)
    cli.add_log_file(parser)
    args = parser.parse_args(argv)
    check_method(parser, args)
    check_scoring(parser, args)
    if args.use_row_settings and not args.prompts_csv:
        parser.error("--use_row_settings needs --prompts_csv")
    if (args.init_images is None) != (args.strength is None):
        parser.error("--init_images DIR and --strength X go together: one was given without the other")
    if args.mask_images and not args.init_images:
        parser.error("--mask_images needs --init_images")
    if args.use_refiner and args.init_images:
        parser.error("--use_refiner does not go with --init_images")
    if not args.use_refiner and (args.refiner_path or args.high_noise_frac):
        parser.error("--refiner_path and --high_noise_frac need --use_refiner")
    if args.end_idx is not None and args.end_idx <= args.start_idx:
        parser.error(f"--end_idx {args.end_idx} must be above --start_idx {args.start_idx}")
    if (
        not args.output_path.strip()
        or not Path(args.output_path).name
        or Path(args.output_path).is_absolute()
        or ".." in Path(args.output_path).parts
    ):
        parser.error("--output_path must be the name of a folder below the results, without ..")
    cli.check_device(parser, args)
    if args.enable_model_cpu_offload and args.device.type == "cpu":
        parser.error("--enable_model_cpu_offload needs a GPU")
    return args


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.data import manifest
from des.data.image_folders import image_of_row
from des.data.images import image_name, read_image
from des.data.prompts import check_placeholders, never_drawn, read_rows, rows_to_draw
from des.data.run_record import Sampling, claim, recorded_settings
from des.data.truncation import truncated_by_encoder
from des.evaluation.classify import ImageScores
from des.evaluation.detectors.options import OUTPUT_NAMES, open_scorers
from des.generation.defences import open_defence
from des.generation.image_run import RunFolder, finish, lines_of, reserved, settings_of
from des.generation.sampler import Sampler, batches, check_inputs, check_refiner, check_sizes, row_settings
from des.models.learned_tokens import load_learned_tokens, read_learned_tokens
from des.models.model_files import model_name
from des.models.pipelines import family_of, open_pipeline, open_refiner, place, readers, unprotected_encoders
from des.models.shift import UNMEASURED, in_doubt, is_unmeasured
from des.utils import cli, logs
from des.utils.errors import UserError
from des.utils.logs import logger, progress
from des.utils.processes import Processes
from des.utils.provenance import provenance

import pandas as pd
import torch
from diffusers import DiffusionPipeline

INPUTS = {
    "text": (),
    "image": ("init_image",),
    "inpaint": ("init_image", "mask_image"),
}  # for `--init_images` and so on, by mode


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.deterministic:
        cli.make_deterministic()
    processes = Processes(args.device)
    args.device = processes.device
    logs.setup_logging(args.log_file, quiet=not processes.is_main)
    table = pd.DataFrame({"prompt": [args.prompt]}) if args.prompt is not None else read_rows(args.prompts_csv)
    prompts = table["prompt"].tolist()
    check_placeholders(prompts, read_learned_tokens(args.learned_tokens)[0] if args.learned_tokens else [])
    rows = rows_to_draw(prompts, args.start_idx, args.end_idx, args.negative_prompt)
    dtype = settle(args)
    mode = "inpaint" if args.mask_images else "image" if args.init_images else "text"
    folders = {name: getattr(args, f"{name}s") for name in INPUTS[mode]}
    inputs = {name: image_of_row(path, rows) for name, path in folders.items()}
    scorers = open_scorers(args)
    pipe = open_pipeline(args.model_path, dtype, args.model_type, args.scheduler, mode, args.variant, args.drop_t5)
    sampling = Sampling.of(vars(args))
    drawn_with = row_settings(sampling, pipe, table, args.prompts_csv)
    check_sizes(pipe, (drawn_with[row] for row in rows))
    check_inputs(inputs, drawn_with)
    defence = open_defence(args)
    applied = defence.apply(pipe)
    learned = load_learned_tokens(pipe, args.learned_tokens) if args.learned_tokens else None
    refiner = open_refiner(args.refiner_path, pipe, args.variant) if args.use_refiner else None
    check_refiner(pipe, refiner, sampling)
    for each in (pipe, refiner):
        if each is not None:
            place(each, args.device, args.enable_model_cpu_offload)
    folder = args.results_dir / args.training_method / model_name(args.model_path) / args.output_path
    names = {
        (row, copy): folder / image_name(Path(args.output_path).name, args.training_method, row, copy)
        for row in rows
        for copy in range(args.num_images_per_prompt)
    }
    size = min(args.batch_size, len(prompts) * args.num_images_per_prompt)
    left_out = set(never_drawn(prompts, negative_prompt=args.negative_prompt))
    drawable = [row for row in range(len(prompts)) if row not in left_out]  # of all shards
    truncated = truncated_by_encoder(readers(pipe, args.max_sequence_length), prompts, drawable)
    sampler = Sampler(pipe, refiner, sampling, prompts, drawn_with, inputs, size)
    cards = ImageScores(scorers, OUTPUT_NAMES, args.cls_class, folder)
    with reserved(folder, rows) if processes.is_main else contextlib.nullcontext():
        if processes.is_main:
            settings = settings_of(sampler, defence, args.refiner_path, folders, args.discard_images, args.variant)
            settings |= {"learned_tokens_sha256": learned["sha256"]} if learned else {}
            claim(folder, provenance(args), prompts, settings, applied, names, truncated)
        processes.wait()
        settings = recorded_settings(folder)
        run = RunFolder(folder, names, lines_of(sampler, names, settings), args.discard_images)
        drawn, seconds = make(run, sampler, cards, processes, args.log_prompts)
        processes.wait()
        if processes.is_main:
            finish(folder, drawn, seconds, lambda: cards.write(provenance(args), list(names.values())) if scorers else [])
    which = described(args.training_method, applied, pipe)
    where = "scored in" if args.discard_images else "in"
    if processes.is_main:
        logger.info("%d images of %s %s %s", count_done(run, cards), which, where, folder)


def make(run: RunFolder, sampler: Sampler, cards: ImageScores, processes: Processes, log_prompts: bool) -> tuple[int, float]:
    """Draw and score this process's share of the images that are missing.

    Returns the number of images drawn, and the seconds that the model took for them.
    """
    mine = processes.share(list(run.names))
    found = manifest.read(run.folder)
    todo = [key for key in mine if not run.is_done(key, found, cards)]
    part = " (the first one's share)" if processes.count > 1 else ""
    message = "%d images to draw into %s, %d already done, by %s%s"
    logger.info(message, len(todo), run.folder, len(mine) - len(todo), processes, part)
    seconds = 0.0
    with progress(None, desc=run.folder.name, total=len(todo), unit="image") as bar:
        for batch in batches(todo, sampler.settings, sampler.size):
            for row in dict.fromkeys(row for row, _ in batch if log_prompts):
                logger.info("row %d: %s", row, sampler.prompts[row])
            start = time.monotonic()
            images = sampler.draw(batch)
            seconds += time.monotonic() - start
            for key, image in zip(batch, images, strict=True):
                line = run.save(key, image)
                if cards.detectors:
                    cards.score(run.names[key], line, image)
            bar.update(len(batch))
    drawn = set(todo)
    for key in mine if cards.detectors else []:  # images that were found done may lack these scores
        path, line = run.names[key], found.get(run.names[key].name)
        if key not in drawn and cards.read(path, line) is None:
            cards.score(path, line, read_image(path))
    return len(todo), seconds


def described(method: str, applied: Mapping[Any, Any], pipe: DiffusionPipeline) -> str:
    """Name the model that drew the images, with what is known about its protection."""
    if method == "none":
        return "the original model"
    rest = unprotected_encoders(pipe, applied) if any(isinstance(i, int) for i in applied) else []
    of_rest = f", whose text encoder {' and '.join(map(str, rest))} is the original, NOT protected," if rest else ""
    if in_doubt(applied):
        return f"the model with {method}, WHICH MAY NOT PROTECT IT (see the warning above){of_rest or ','}"
    if any(map(is_unmeasured, applied.values())):
        return f"the model with {method} ({UNMEASURED}){of_rest}"
    return f"the model with {method}{of_rest}" if rest else f"the model protected by {method}"


def count_done(run: RunFolder, cards: ImageScores) -> int:
    """The number of images of a run. Raises UserError if one is neither in the folder as the manifest says, nor scored."""
    found = manifest.read(run.folder)
    missing = [key for key in run.names if not run.is_done(key, found, cards)]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(run.names)} images are not in {run.folder} (row {missing[0][0]} first); run the command again"
        )
    return len(run.names)


def settle(args: argparse.Namespace) -> torch.dtype:
    """Fill in the options that were left out with the defaults of the model's family; returns the dtype."""
    if args.use_refiner:
        family = family_of(args.model_path)
        if family.name != "sdxl":
            raise UserError(f"--use_refiner is for SDXL only, and {args.model_path} is a {family.name}")
        args.refiner_path = args.refiner_path or "stabilityai/stable-diffusion-xl-refiner-1.0"
        args.high_noise_frac = args.high_noise_frac or 0.8
    dtype = open_dtype(args)
    if args.strength and int(args.num_inference_steps * args.strength) < 1:
        raise UserError(f"--strength {args.strength} leaves no step of {args.num_inference_steps}; raise one of them")
    return dtype


if __name__ == "__main__":
    cli.run(main)
