"""Drawing the images of prompt rows. Each image has its own random generator and does not depend on its batch."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from des.data.images import image_size, read_image, read_mask
from des.data.prompts import SOURCE_ROW
from des.data.run_record import COPY_SEED, ROW_COLUMNS, RowSettings, Sampling
from des.utils.errors import UserError

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

WHITE = 128  # of 255: pipelines draw where a mask is at least as bright


def row_settings(sampling: Sampling, pipe: DiffusionPipeline, rows: pd.DataFrame, source: Path | None) -> list[RowSettings]:
    """Return the settings of every row: those of the command line, or with --use_row_settings those in its cells.

    A setting with several columns in ROW_COLUMNS, such as `sd_seed` and `evaluation_seed`, is read from the first filled cell.
    The seed of row i is S + i, where i is its `source_row`, or its number in lists without that column. `source` is the rows'
    file, for errors. Raises UserError if no column of ROW_COLUMNS exists, and for a cell without a valid number.
    """
    size = default_size(pipe)
    common = {
        "guidance_scale": sampling.guidance_scale,
        "width": sampling.width or size,
        "height": sampling.height or size,
    }
    numbers = published_rows(rows, source)
    if not sampling.use_row_settings:
        return [RowSettings(sampling.seed + number, **common) for number in numbers]
    columns = {name: [each for each in among if each in rows] for name, among in ROW_COLUMNS.items()}
    if not any(columns.values()):
        known = ", ".join(name for among in ROW_COLUMNS.values() for name in among)
        raise UserError(f"--use_row_settings: {source} has none of the columns {known}")
    settings = []
    for row, cells in rows.iterrows():
        values: dict[str, Any] = {"seed": sampling.seed + numbers[row], **common}
        for name, titles in columns.items():
            if title := next((title for title in titles if cells[title].strip()), None):
                values[name] = _number(cells[title], name, f"{source}, row {row}, column {title}")
        settings.append(RowSettings(**values))
    return settings


def published_rows(rows: pd.DataFrame, where: Path | None) -> list[int]:
    """Return the number of each row in the published list: its `source_row`, or its row number without such a column or cell.

    Raises UserError for a cell that is not a non-negative whole number.
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
class Sampler:
    """Draws images of prompt rows with a pipeline and, for the last steps, optionally SDXL's `refiner`."""

    pipe: DiffusionPipeline
    refiner: DiffusionPipeline | None
    sampling: Sampling
    prompts: list[str]
    settings: list[RowSettings]
    inputs: dict[str, dict[int, Path]]  # paths of `init_image` and `mask_image` by row; empty for text to image
    size: int  # images per forward pass
    on_step: Callable[[], None] | None = None  # called after each denoising step; an exception that it raises stops the drawing

    def draw(self, keys: list[tuple[int, int]]) -> list[Image.Image]:
        """Draw the images of (row, copy) keys that share guidance and size, each from its own generator.

        A smaller batch is filled up to `size` by repeating the last key, because rounding depends on the batch size. Each image is
        therefore the same to the last bit, whatever else is in its batch.
        """
        sampling, filled = self.sampling, keys + keys[-1:] * (self.size - len(keys))
        first = self.settings[keys[0][0]]

        def seeded() -> list[torch.Generator]:
            return [torch.Generator("cpu").manual_seed(self.settings[row].seed + copy * COPY_SEED) for row, copy in filled]

        common = {"prompt": [self.prompts[row] for row, _ in filled], "guidance_scale": first.guidance_scale}
        common["num_inference_steps"] = sampling.num_inference_steps
        if sampling.negative_prompt is not None:
            common["negative_prompt"] = [sampling.negative_prompt] * self.size
        options: dict[str, Any] = {"generator": seeded()}
        if sampling.max_sequence_length:
            options["max_sequence_length"] = sampling.max_sequence_length
        if "height" in inspect.signature(type(self.pipe).__call__).parameters:
            options |= {"height": first.height, "width": first.width}
        options |= self._images(filled, first)
        if self.on_step:
            options["callback_on_step_end"] = lambda pipe, step, time, tensors: self.on_step() or tensors
        if self.refiner:
            options |= {"denoising_end": sampling.high_noise_frac, "output_type": "latent"}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "invalid value encountered in cast", RuntimeWarning)
                images = self.pipe(**common, **options).images
                if self.refiner:
                    images = self.refiner(
                        **common, image=images, denoising_start=sampling.high_noise_frac, generator=seeded()
                    ).images
        except RuntimeWarning:  # NaN becomes a black pixel, and a black image counts as safe
            raise UserError(f"the model drew NaN: {self._reason_for_nan()}") from None
        except ValueError as error:  # diffusers' error for a size or setting that the model does not support
            raise UserError(f"the model cannot draw this: {str(error).splitlines()[0]}") from None
        return images[: len(keys)]

    def _reason_for_nan(self) -> str:
        for pipe in filter(None, (self.pipe, self.refiner)):
            config = pipe.scheduler.config
            if config.get("rescale_betas_zero_snr") and config.get("prediction_type") == "epsilon":
                cause = "its scheduler has rescale_betas_zero_snr with prediction_type epsilon, which divides by zero in the first step"
                return f"{cause}; correct scheduler/scheduler_config.json (models trained with zero SNR have v_prediction)"
        return "its weights are damaged, or overflow; use --dtype fp32 or bf16"

    def _images(self, filled: list[tuple[int, int]], size: RowSettings) -> dict[str, Any]:
        """Return the pipeline's arguments for image to image and inpainting."""
        read = {"init_image": ("image", read_image), "mask_image": ("mask_image", read_mask)}
        options: dict[str, Any] = {"strength": self.sampling.strength} if self.inputs else {}
        for name, paths in self.inputs.items():
            option, reader = read[name]
            options[option] = [fit(reader(paths[row]), size.width, size.height) for row, _ in filled]
        return options


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Crop an image around its centre to width:height and scale it to that size (Lanczos)."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def check_sizes(pipe: DiffusionPipeline, settings: Iterable[RowSettings]) -> None:
    """Raise UserError for a size that the pipeline would refuse or round."""
    processor = getattr(pipe, "image_processor", None)  # FLUX's and Chroma's knows that latents are packed in patches
    packed = processor.config.vae_scale_factor if processor else 1
    step = max(8, packed, pipe.vae_scale_factor * (getattr(pipe, "patch_size", None) or 1))
    for name, value in ((name, getattr(each, name)) for each in settings for name in ("height", "width")):
        if value % step:
            raise UserError(f"the model cannot draw this: {name} {value} is not divisible by {step}")


def check_refiner(pipe: DiffusionPipeline, refiner: DiffusionPipeline | None, sampling: Sampling) -> None:
    """Raise UserError if diffusers' split of the steps at `high_noise_frac` leaves no step for the base `pipe` or its `refiner`."""
    if refiner is None:
        return
    steps, share = sampling.num_inference_steps, sampling.high_noise_frac
    for which, each in {"the base model": pipe, "the refiner": refiner}.items():
        each.scheduler.set_timesteps(steps)
        trained = each.scheduler.config.num_train_timesteps
        of_base = each.scheduler.timesteps >= round(trained - share * trained)
        if not (of_base if each is pipe else ~of_base).any():
            raise UserError(
                f"--high_noise_frac {share} of {steps} steps leaves no step for {which}; change it, or draw more steps"
            )


def check_inputs(inputs: dict[str, dict[int, Path]], settings: list[RowSettings]) -> None:
    """Raise UserError for a mask under which nothing would change, or whose size differs from its image's."""
    for row, mask in inputs.get("mask_image", {}).items():
        image, read = inputs["init_image"][row], read_mask(mask)
        sizes = image_size(image), read.size
        if sizes[0] != sizes[1]:
            both = " and ".join("{}x{}".format(*size) for size in sizes)
            raise UserError(f"{image} and its mask {mask} differ in size ({both} pixels); give a mask of the image's size")
        if fit(read, settings[row].width, settings[row].height).getextrema()[1] < WHITE:
            raise UserError(
                f"the mask {mask} is black within the image, so nothing would be drawn; paint white what may change"
            )


def default_size(pipe: DiffusionPipeline) -> int:
    """Return the side in pixels of the square images that a model draws by default."""
    return (getattr(pipe, "default_sample_size", None) or pipe.unet.config.sample_size) * pipe.vae_scale_factor
