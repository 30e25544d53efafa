"""Generate an image for each prompt of a CSV, with the original model or a protected one.

    python generate.py --model_path stable-diffusion-v1-5/stable-diffusion-v1-5 --device cuda:0 \\
        --prompts_csv datasets/coco_prompts.csv --output_path t2i_coco --end_idx 10000 \\
        --training_method des --text_encoder_path checkpoints/des_sexual/1e-05_0.3/checkpoint-2.pt

Images go to results/{training_method}/{model}/{output_path}/{output_path}_{training_method}_{row}p.png, with run.json beside
them. Image i is drawn from seed S + i: it is the same in any order, shard or resume, and at another --batch_size up to rounding.
Several GPUs share the rows under: accelerate launch generate.py ...
"""

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

from des import cli
from des.cli import UserError, logger, progress
from des.images import image_name, image_of_row, is_complete, read_image
from des.methods import METHODS, add_method, check_method
from des.pipelines import (
    DTYPES,
    MODEL_TYPES,
    SCHEDULERS,
    dtype_for,
    encoder_sha256s,
    family_of,
    open_pipeline,
    open_refiner,
    place,
)
from des.processes import Processes
from des.prompts import never_drawn, read_prompts
from des.results import provenance, replacing, sha256_file, sha256_texts, write_json

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

NOT_SETTINGS = (
    "prompts_csv", "prompt", "output_path", "results_dir", "start_idx", "end_idx", "device", "batch_size", "num_images_per_prompt",
    "text_encoder_path", "text_encoder_2_path", "text_encoder_3_path", "unet_path", "adapter_path", "init_images", "mask_images",
    "enable_model_cpu_offload", "attention_slicing", "model_type",
)  # fmt: skip
INPUTS = {
    "text": (),
    "image": ("init_image",),
    "inpaint": ("init_image", "mask_image"),
}  # for `--init_images` and so on, by mode
COPY_SEED = 1_000_003  # between the seeds of a row's images


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    main_group = parser.add_argument_group("main")
    cli.add_model(main_group)
    main_group.add_argument("--model_type", choices=MODEL_TYPES, help="refuse a model that is not of this type")
    add_method(main_group)
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
    files.add_argument(
        "--num_images_per_prompt",
        type=cli.positive_int,
        default=1,
        metavar="N",
        help="image k above 0 of a row is named {row}p_{k}",
    )
    files.add_argument(
        "--init_images",
        type=Path,
        metavar="DIR",
        help="image to image: an image for each row, named {row}.png or ..._{row}p.png",
    )
    files.add_argument("--mask_images", type=Path, metavar="DIR", help="inpainting: white where --init_images is drawn anew")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--seed", type=cli.natural, default=42, metavar="S", help="row i is drawn with seed S + i")
    sampling.add_argument(
        "--num_inference_steps", type=cli.positive_int, metavar="N", help="denoising steps (default: 50; SD3 28)"
    )
    sampling.add_argument(
        "--guidance_scale", type=cli.number(float, 0), metavar="G", help="guidance (default: 7.5; SD3 7, FLUX 3.5)"
    )
    sampling.add_argument("--negative_prompt", metavar="TEXT", help="what the images should not show (not for FLUX)")
    sampling.add_argument("--height", type=cli.positive_int, metavar="H", help="pixels (default: the model's)")
    sampling.add_argument("--width", type=cli.positive_int, metavar="W", help="pixels (default: the model's)")
    sampling.add_argument(
        "--strength", type=cli.number(float, 0, 1, low_open=True), metavar="X", help="how far --init_images change, up to 1"
    )
    sampling.add_argument(
        "--max_sequence_length", type=cli.positive_int, metavar="N", help="tokens of a T5 prompt (default: SD3 256, FLUX 512)"
    )
    sampling.add_argument(
        "--scheduler", choices=SCHEDULERS, help="default: ddim for SD 1.x, euler for SD 2.x, the model's own for others"
    )
    sampling.add_argument(
        "--use_refiner", action="store_true", help="SDXL: finish with the refiner, on the same text encoder 2"
    )
    sampling.add_argument("--refiner_path", metavar="R", help="default: stabilityai/stable-diffusion-xl-refiner-1.0")
    sampling.add_argument(
        "--high_noise_frac", type=cli.number(float, 0, 1, low_open=True), metavar="F", help="share of the steps before it (0.8)"
    )
    performance = parser.add_argument_group("performance")
    cli.add_device(performance)
    performance.add_argument("--batch_size", type=cli.positive_int, default=4, metavar="N", help="images at a time")
    performance.add_argument(
        "--dtype", choices=DTYPES, help="default: fp32 for SD 1.x and 2.x, fp16 for SDXL, bf16 for SD3 and FLUX"
    )
    performance.add_argument("--enable_model_cpu_offload", action="store_true", help="keep on the GPU only the model in use")
    performance.add_argument("--attention_slicing", action="store_true", help="less memory, slower; for models with a UNet")
    args = parser.parse_args(argv)
    check_method(parser, args)
    if (args.init_images is None) != (args.strength is None):
        parser.error("--init_images DIR and --strength X go together: one was given without the other")
    if args.mask_images and not args.init_images:
        parser.error("--mask_images needs --init_images")
    if args.use_refiner and args.init_images:
        parser.error("--use_refiner does not go with --init_images")
    if not args.use_refiner and (args.refiner_path or args.high_noise_frac):
        parser.error("--refiner_path and --high_noise_frac need --use_refiner")
    if args.enable_model_cpu_offload and args.device.type == "cpu":
        parser.error("--enable_model_cpu_offload needs a GPU")
    if args.end_idx is not None and args.end_idx <= args.start_idx:
        parser.error(f"--end_idx {args.end_idx} must be above --start_idx {args.start_idx}")
    if not args.output_path.strip() or Path(args.output_path).is_absolute() or ".." in Path(args.output_path).parts:
        parser.error("--output_path is a folder's name below the results, without ..")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    processes = Processes(args.device)
    args.device = processes.device
    cli.setup_logging(quiet=not processes.is_main)
    prompts = [args.prompt] if args.prompt is not None else read_prompts(args.prompts_csv)
    rows = rows_to_draw(args, prompts)
    dtype = settle(args)
    mode = "inpaint" if args.mask_images else "image" if args.init_images else "text"
    inputs = {name: image_of_row(getattr(args, f"{name}s"), rows) for name in INPUTS[mode]}
    pipe = open_pipeline(args.model_path, dtype, args.model_type, args.scheduler, mode)
    check_options(args, pipe)
    applied = METHODS[args.training_method].apply(pipe, args)
    refiner = open_refiner(args.refiner_path, pipe) if args.use_refiner else None
    for each in (pipe, refiner):
        if each is not None:
            place(each, args.device, args.enable_model_cpu_offload, args.attention_slicing)
    folder = args.results_dir / args.training_method / Path(args.model_path).name / args.output_path
    if processes.is_main:
        claim(folder, args, prompts, settings_of(args, prompts, pipe, inputs), applied)
    processes.wait()

    names = {
        (row, copy): folder / image_name(Path(args.output_path).name, args.training_method, row, copy)
        for row in rows
        for copy in range(args.num_images_per_prompt)
    }
    mine = processes.share(list(names))
    todo = [key for key in mine if not is_complete(names[key])]
    part = " (the first one's share)" if processes.count > 1 else ""
    logger.info("%d images to draw into %s, %d found done, by %s%s", len(todo), folder, len(mine) - len(todo), processes, part)
    size = min(args.batch_size, len(prompts) * args.num_images_per_prompt)
    with progress(todo, desc=args.output_path, unit="image") as bar:
        for start in range(0, len(todo), size):
            batch = todo[start : start + size]
            for key, image in zip(batch, draw(pipe, refiner, args, prompts, inputs, batch, size), strict=True):
                with replacing(names[key]) as temporary:
                    image.save(temporary, format="PNG")
            bar.update(len(batch))
    processes.wait()
    which = "the original model" if args.training_method == "none" else f"the model protected by {args.training_method}"
    logger.info("%d images of %s in %s", len(names), which, folder)


def settle(args: argparse.Namespace) -> torch.dtype:
    """Fill in what the model's family decides where the command line leaves it open; returns the dtype."""
    family = family_of(args.model_path)
    if args.negative_prompt is not None and not family.negative_prompt:
        raise UserError(f"{args.model_path} takes no --negative_prompt")
    if args.use_refiner:
        if "sdxl" not in family.model_types:
            raise UserError(f"--use_refiner is SDXL's, and {args.model_path} is a {family.model_types[0]}")
        args.refiner_path = args.refiner_path or "stabilityai/stable-diffusion-xl-refiner-1.0"
        args.high_noise_frac = args.high_noise_frac or 0.8
    args.num_inference_steps = args.num_inference_steps or family.num_inference_steps
    if args.strength and int(args.num_inference_steps * args.strength) < 1:
        raise UserError(f"--strength {args.strength} leaves no step of {args.num_inference_steps}; raise one of them")
    dtype = dtype_for(family, args.device, args.dtype)
    args.dtype = next(name for name, value in DTYPES.items() if value == dtype)
    return dtype


def check_options(args: argparse.Namespace, pipe: DiffusionPipeline) -> None:
    """Refuse what this pipeline would not use, and fill in its guidance."""
    has_t5 = "max_sequence_length" in inspect.signature(type(pipe).__call__).parameters
    if args.max_sequence_length and not has_t5:
        raise UserError(f"--max_sequence_length is T5's, and {args.model_path} has none")
    distilled = getattr(pipe, "transformer", None) is not None and not pipe.transformer.config.get("guidance_embeds", True)
    if distilled and args.guidance_scale is not None:
        raise UserError(f"{args.model_path} was distilled without guidance; leave --guidance_scale out")
    if args.guidance_scale is None:
        args.guidance_scale = 0.0 if distilled else family_of(args.model_path).guidance_scale


def settings_of(
    args: argparse.Namespace, prompts: list[str], pipe: DiffusionPipeline, inputs: dict[str, dict[int, Path]]
) -> dict[str, Any]:
    """All that decides what an image looks like: settings, and hashes of the prompts, text encoders and input images."""
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    for option in ("unet_path", "adapter_path"):
        path = getattr(args, option)
        settings[f"{option.removesuffix('_path')}_sha256"] = None if path is None else sha256_file(path)
    for name in inputs:
        found = sorted(path for path in getattr(args, f"{name}s").rglob("*") if path.is_file())
        settings[f"{name}s_sha256"] = sha256_texts(f"{path.name} {sha256_file(path)}" for path in found)
    scheduler = type(pipe.scheduler).__name__
    return settings | encoder_sha256s(pipe) | {"scheduler": scheduler, "prompts_sha256": sha256_texts(prompts)}


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


def claim(folder: Path, args: argparse.Namespace, prompts: list[str], settings: dict[str, Any], applied: dict) -> None:
    """Write run.json, or raise UserError when `folder` holds images that other settings made."""
    settings = json.loads(json.dumps(settings, default=str))
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
    facts = {"settings": settings, "protection": applied, "left_out": never_drawn(prompts), "made_by": provenance(args)}
    write_json(path, facts)


def draw(
    pipe: DiffusionPipeline,
    refiner: DiffusionPipeline | None,
    args: argparse.Namespace,
    prompts: list[str],
    inputs: dict[str, dict[int, Path]],
    keys: list[tuple[int, int]],
    size: int,
) -> list[Image.Image]:
    """Draw the images of some (row, copy), each from its own generator.

    A batch is filled up to `size` by repeating its last one: arithmetic rounds differently at another batch size, and so each
    image is the same to the last bit whatever is drawn beside it, or was drawn before.
    """
    filled = keys + keys[-1:] * (size - len(keys))

    def seeded() -> list[torch.Generator]:
        return [torch.Generator("cpu").manual_seed(args.seed + row + copy * COPY_SEED) for row, copy in filled]

    common = {"prompt": [prompts[row] for row, _ in filled], "guidance_scale": args.guidance_scale}
    common["num_inference_steps"] = args.num_inference_steps
    if args.negative_prompt is not None:
        common["negative_prompt"] = [args.negative_prompt] * size
    options: dict[str, Any] = {"generator": seeded()}
    if args.max_sequence_length:
        options["max_sequence_length"] = args.max_sequence_length
    width, height = args.width or default_size(pipe), args.height or default_size(pipe)
    if "height" in inspect.signature(type(pipe).__call__).parameters:
        options |= {"height": height, "width": width}
    if inputs:
        options["image"] = [fit(read_image(inputs["init_image"][row]), width, height) for row, _ in filled]
        options["strength"] = args.strength
    if "mask_image" in inputs:
        masks = [fit(read_image(inputs["mask_image"][row]), width, height) for row, _ in filled]
        options["mask_image"] = [mask.convert("L") for mask in masks]
    if refiner:
        options |= {"denoising_end": args.high_noise_frac, "output_type": "latent"}
    try:
        images = pipe(**common, **options).images
        if refiner:
            images = refiner(**common, image=images, denoising_start=args.high_noise_frac, generator=seeded()).images
    except ValueError as error:  # what diffusers says of a size or a setting that the model cannot draw
        raise UserError(f"the model cannot draw this: {str(error).splitlines()[0]}") from None
    return images[: len(keys)]


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Crop an image around its centre to width:height and scale it to that size (Lanczos)."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def default_size(pipe: DiffusionPipeline) -> int:
    """The side in pixels of the square images that a model draws unless told otherwise."""
    return (getattr(pipe, "default_sample_size", None) or pipe.unet.config.sample_size) * pipe.vae_scale_factor


if __name__ == "__main__":
    cli.run(main)
