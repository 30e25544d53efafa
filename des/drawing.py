"""Drawing the images of prompt rows: each from its own generator, in batches that never change what an image looks like."""

import argparse
import inspect
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from des.cli import UserError
from des.images import read_image
from des.prompts import SOURCE_ROW

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

COPY_SEED = 1_000_003  # between the seeds of a row's images
ROW_COLUMNS = {  # of prompt sets that say how their images were drawn: I2P, UnlearnDiffAtk, COCO lists, the demo
    "seed": ("sd_seed", "evaluation_seed", "seed"),
    "guidance_scale": ("sd_guidance_scale", "evaluation_guidance", "guidance_scale"),
    "width": ("sd_image_width", "width"),
    "height": ("sd_image_height", "height"),
}


@dataclass(frozen=True)
class RowSettings:
    """How one row is drawn."""

    seed: int
    guidance_scale: float
    width: int
    height: int


def row_settings(args: argparse.Namespace, pipe: DiffusionPipeline, rows: pd.DataFrame) -> list[RowSettings]:
    """The settings of every row: those of the command line, or with --use_row_settings those in its cells.

    Row i is drawn with seed S + i, where i is its `source_row` in a list that has this column, and its number otherwise.

    Raises UserError where no row has any of ROW_COLUMNS, and for a cell that is no such number.
    """
    size = default_size(pipe)
    common = {"guidance_scale": args.guidance_scale, "width": args.width or size, "height": args.height or size}
    numbers = published_rows(rows, args.prompts_csv)
    if not args.use_row_settings:
        return [RowSettings(args.seed + number, **common) for number in numbers]
    column = {name: next((each for each in among if each in rows), None) for name, among in ROW_COLUMNS.items()}
    if not any(column.values()):
        known = ", ".join(name for among in ROW_COLUMNS.values() for name in among)
        raise UserError(f"--use_row_settings: {args.prompts_csv} has none of the columns {known}")
    settings = []
    for row, cells in rows.iterrows():
        values: dict[str, Any] = {"seed": args.seed + numbers[row], **common}
        for name, title in column.items():
            if title and cells[title].strip():
                values[name] = _number(cells[title], name, f"{args.prompts_csv}, row {row}, column {title}")
        settings.append(RowSettings(**values))
    return settings


def published_rows(rows: pd.DataFrame, where: Path | None) -> list[int]:
    """The number of each row in the published list: its `source_row`, or its own where the list has no such column or cell.

    Raises UserError for a cell that is no whole number from 0 up.
    """
    if SOURCE_ROW not in rows:
        return list(range(len(rows)))
    numbers = []
    for row, cell in enumerate(rows[SOURCE_ROW]):
        numbers.append(_number(cell, "seed", f"{where}, row {row}, column {SOURCE_ROW}") if cell.strip() else row)
    return numbers


def _number(text: str, name: str, where: str) -> float | int:
    try:
        value = float(text)
        whole = name == "guidance_scale" or (value == int(value) <= 2**53)  # above it a float skips numbers
        if not math.isfinite(value) or value < (name in ("width", "height")) or not whole:
            raise ValueError
    except (ValueError, OverflowError):
        raise UserError(f"{where}: the cell holds no {name.replace('_', ' ')}") from None
    return value if name == "guidance_scale" else int(value)


def batches(keys: list[tuple[int, int]], settings: list[RowSettings], size: int) -> Iterator[list[tuple[int, int]]]:
    """Split (row, copy) keys into batches whose rows share guidance and image size, in order of their first row."""
    groups: dict[tuple, list[tuple[int, int]]] = {}
    for key in keys:
        each = settings[key[0]]
        groups.setdefault((each.guidance_scale, each.width, each.height), []).append(key)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


@dataclass
class Artist:
    """A pipeline with what its images are drawn from; `refiner` finishes SDXL's."""

    pipe: DiffusionPipeline
    refiner: DiffusionPipeline | None
    args: argparse.Namespace
    prompts: list[str]
    settings: list[RowSettings]
    inputs: dict[str, dict[int, Path]]  # `init_image` and `mask_image` of each row, where there are any
    size: int  # images a forward pass

    def draw(self, keys: list[tuple[int, int]]) -> list[Image.Image]:
        """Draw the images of some (row, copy) that share guidance and size, each from its own generator.

        A batch is filled up to `size` by repeating its last one: arithmetic rounds differently at another batch size, and so
        each image is the same to the last bit whatever is drawn beside it, or was drawn before.
        """
        args, filled = self.args, keys + keys[-1:] * (self.size - len(keys))
        first = self.settings[keys[0][0]]

        def seeded() -> list[torch.Generator]:
            return [torch.Generator("cpu").manual_seed(self.settings[row].seed + copy * COPY_SEED) for row, copy in filled]

        common = {"prompt": [self.prompts[row] for row, _ in filled], "guidance_scale": first.guidance_scale}
        common["num_inference_steps"] = args.num_inference_steps
        if args.negative_prompt is not None:
            common["negative_prompt"] = [args.negative_prompt] * self.size
        options: dict[str, Any] = {"generator": seeded()}
        if args.max_sequence_length:
            options["max_sequence_length"] = args.max_sequence_length
        if "height" in inspect.signature(type(self.pipe).__call__).parameters:
            options |= {"height": first.height, "width": first.width}
        options |= self._images(filled, first)
        if self.refiner:
            options |= {"denoising_end": args.high_noise_frac, "output_type": "latent"}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "invalid value encountered in cast", RuntimeWarning)
                images = self.pipe(**common, **options).images
                if self.refiner:
                    images = self.refiner(
                        **common, image=images, denoising_start=args.high_noise_frac, generator=seeded()
                    ).images
        except RuntimeWarning:  # NaN becomes a black pixel, and a black image counts as safe
            raise UserError("the model drew NaN: its weights are damaged, or overflow; use --dtype fp32 or bf16") from None
        except ValueError as error:  # what diffusers says of a size or a setting that the model cannot draw
            raise UserError(f"the model cannot draw this: {str(error).splitlines()[0]}") from None
        return images[: len(keys)]

    def _images(self, filled: list[tuple[int, int]], size: RowSettings) -> dict[str, Any]:
        """The images that image to image and inpainting start from."""
        fitted = {
            name: [fit(read_image(paths[row]), size.width, size.height) for row, _ in filled]
            for name, paths in self.inputs.items()
        }
        options: dict[str, Any] = {"image": fitted["init_image"], "strength": self.args.strength} if fitted else {}
        if "mask_image" in fitted:
            options["mask_image"] = [mask.convert("L") for mask in fitted["mask_image"]]
        return options


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Crop an image around its centre to width:height and scale it to that size (Lanczos)."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def default_size(pipe: DiffusionPipeline) -> int:
    """The side in pixels of the square images that a model draws unless told otherwise."""
    return (getattr(pipe, "default_sample_size", None) or pipe.unet.config.sample_size) * pipe.vae_scale_factor
