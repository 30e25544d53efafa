"""Generate an image for each prompt of a CSV, with the original model or a protected one.

    python generate.py --model_path stable-diffusion-v1-5/stable-diffusion-v1-5 --device cuda:0 \\
        --prompts_csv datasets/coco_prompts.csv --output_path t2i_coco --end_idx 10000 \\
        --training_method des --text_encoder_path checkpoints/des_sexual/1e-05_0.3/checkpoint-2.pt

Images go to results/{training_method}/{model}/{output_path}/{output_path}_{training_method}_{row}p.png, with run.json beside
them. Image i is drawn from seed S + i: it is the same in any order, shard or resume, and at another --batch_size up to rounding.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image

from des import cli
from des.cli import UserError, logger, progress
from des.images import image_name, is_complete
from des.pipelines import MODEL_TYPES, open_pipeline, protect, text_encoder_sha256
from des.prompts import never_drawn, read_prompts
from des.results import provenance, replacing, sha256_texts, write_json

METHODS = ("none", "des")
RUN_SETTINGS = (
    "model_path",
    "training_method",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "height",
    "width",
    "negative_prompt",
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    main_group = parser.add_argument_group("main")
    cli.add_model(main_group)
    main_group.add_argument("--model_type", choices=MODEL_TYPES, help="refuse a model that is not of this type")
    main_group.add_argument("--training_method", choices=METHODS, default="none", help="none is the original model")
    main_group.add_argument(
        "--text_encoder_path", type=Path, metavar="CKPT", help="the protected text encoder, for --training_method des"
    )
    files = parser.add_argument_group("prompts and images")
    source = files.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts_csv", type=Path, metavar="CSV", help="column `prompt`; blank rows do not count")
    source.add_argument("--prompt", metavar="TEXT", help="one prompt instead of a CSV")
    files.add_argument(
        "--output_path", required=True, metavar="NAME", help="name of the image folder, and start of each file's name"
    )
    files.add_argument(
        "--results_dir", type=Path, default=Path("results"), metavar="DIR", help="where the folders of images go"
    )
    files.add_argument("--start_idx", type=cli.natural, default=0, metavar="I", help="first row")
    files.add_argument("--end_idx", type=cli.positive_int, metavar="I", help="row after the last (default: all)")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--seed", type=cli.natural, default=42, metavar="S", help="row i is drawn with seed S + i")
    sampling.add_argument("--num_inference_steps", type=cli.positive_int, default=50, metavar="N", help="denoising steps")
    sampling.add_argument(
        "--guidance_scale", type=cli.number(float, 0), default=7.5, metavar="G", help="classifier-free guidance"
    )
    sampling.add_argument("--negative_prompt", metavar="TEXT", help="what the images should not show")
    sampling.add_argument("--height", type=cli.positive_int, metavar="H", help="pixels (default: the model's)")
    sampling.add_argument("--width", type=cli.positive_int, metavar="W", help="pixels (default: the model's)")
    performance = parser.add_argument_group("performance")
    cli.add_device(performance)
    performance.add_argument("--batch_size", type=cli.positive_int, default=4, metavar="N", help="images at a time")
    args = parser.parse_args(argv)
    if (args.training_method == "des") != (args.text_encoder_path is not None):
        parser.error("--training_method des and --text_encoder_path CKPT go together: one was given without the other")
    if args.end_idx is not None and args.end_idx <= args.start_idx:
        parser.error(f"--end_idx {args.end_idx} must be above --start_idx {args.start_idx}")
    if not args.output_path.strip() or Path(args.output_path).is_absolute() or ".." in Path(args.output_path).parts:
        parser.error("--output_path is a folder's name below the results, without ..")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cli.setup_logging()
    prompts = [args.prompt] if args.prompt is not None else read_prompts(args.prompts_csv)
    rows = rows_to_draw(args, prompts)
    pipe = open_pipeline(args.model_path, args.device, args.model_type)
    checkpoint = protect(pipe, args.text_encoder_path) if args.text_encoder_path else None
    folder = args.results_dir / args.training_method / Path(args.model_path).name / args.output_path
    claim(folder, args, prompts, text_encoder_sha256(pipe), checkpoint)

    names = {row: folder / image_name(Path(args.output_path).name, args.training_method, row) for row in rows}
    todo = [row for row in rows if not is_complete(names[row])]
    logger.info("%d images to draw into %s, %d found done", len(todo), folder, len(rows) - len(todo))
    size = min(args.batch_size, len(prompts))
    with progress(todo, desc=args.output_path, unit="image") as bar:
        for start in range(0, len(todo), size):
            batch = todo[start : start + size]
            for row, image in zip(batch, draw(pipe, args, prompts, batch, size), strict=True):
                with replacing(names[row]) as temporary:
                    image.save(temporary, format="PNG")
            bar.update(len(batch))
    logger.info("%d images of the %s text encoder in %s", len(rows), "DES-protected" if checkpoint else "original", folder)


def rows_to_draw(args: argparse.Namespace, prompts: list[str]) -> list[int]:
    """Row numbers from --start_idx to --end_idx, without those that are never drawn."""
    end = len(prompts) if args.end_idx is None else args.end_idx
    if end > len(prompts):
        logger.info("--end_idx %d is beyond the list; drawing up to its end, row %d", end, len(prompts) - 1)
    if args.start_idx >= len(prompts):
        raise UserError(f"--start_idx {args.start_idx} is beyond the list of {len(prompts)} prompts")
    dropped = set(never_drawn(prompts))
    rows = range(args.start_idx, min(end, len(prompts)))
    kept = [row for row in rows if row not in dropped]
    if len(kept) < len(rows):
        left_out = len(rows) - len(kept)
        logger.info(
            "%d of %d prompts are left out: they put minors in a sexual context, and are never drawn", left_out, len(rows)
        )
    if not kept:
        raise UserError("no prompt is left to draw")
    return kept


def claim(folder: Path, args: argparse.Namespace, prompts: list[str], encoder_sha256: str, checkpoint: dict | None) -> None:
    """Write run.json, or raise UserError when `folder` holds images that other settings made."""
    settings = {name: getattr(args, name) for name in RUN_SETTINGS}
    settings |= {"text_encoder_sha256": encoder_sha256, "prompts_sha256": sha256_texts(prompts)}
    path = folder / "run.json"
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))["settings"]
        except (ValueError, KeyError):
            raise UserError(
                f"{path} cannot be read, so the images beside it are of unknown origin; choose another --output_path"
            ) from None
        changed = [f"{name} ({before.get(name)}, now {value})" for name, value in settings.items() if before.get(name) != value]
        if changed:
            raise UserError(
                f"{folder} holds images of another run, with another {', '.join(changed)}; choose another --output_path"
            )
    elif folder.is_dir() and any(folder.glob("*.png")):
        raise UserError(f"{folder} holds images of unknown origin (no run.json); choose another --output_path")
    write_json(
        path, {"settings": settings, "checkpoint": checkpoint, "left_out": never_drawn(prompts), "made_by": provenance(args)}
    )


def draw(pipe: DiffusionPipeline, args: argparse.Namespace, prompts: list[str], rows: list[int], size: int) -> list[Image]:
    """Draw the images of some rows, each from its own generator.

    A batch is filled up to `size` by repeating its last row: arithmetic rounds differently at another batch size, and so each
    image is the same to the last bit whatever is drawn beside it, or was drawn before.
    """
    filled = rows + rows[-1:] * (size - len(rows))
    generators = [torch.Generator("cpu").manual_seed(args.seed + row) for row in filled]
    negative = None if args.negative_prompt is None else [args.negative_prompt] * size
    options = {"height": args.height, "width": args.width, "negative_prompt": negative, "generator": generators}
    steps = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    return pipe([prompts[row] for row in filled], **steps, **options).images[: len(rows)]


if __name__ == "__main__":
    cli.run(main)
