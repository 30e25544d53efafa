"""The command-line options that say how a pipeline samples an image, which generate.py and the attacks share."""

import argparse
from typing import TYPE_CHECKING

from des.models.families import FAMILIES, SCHEDULERS, described, described_lengths
from des.utils import cli
from des.utils.errors import UserError
from des.utils.logs import logger

if TYPE_CHECKING:
    import torch

NO_NEGATIVE = ", ".join(name for name, family in FAMILIES.items() if not family.negative_prompt)


def add_sampling(group: argparse._ActionsContainer) -> None:
    """Add the options that determine an image besides its model and prompt."""
    # fmt: off
    group.add_argument("--seed", type=cli.natural, default=42, metavar="S", help="row i is drawn with seed S + i")
    group.add_argument("--use_row_settings", action="store_true", help="take seed, guidance and size of each row from its cells where it has them, as I2P's do")
    group.add_argument("--num_inference_steps", type=cli.positive_int, metavar="N", help=f"denoising steps (default: {described('num_inference_steps')})")
    group.add_argument("--guidance_scale", type=cli.number(float, 0), metavar="G", help=f"guidance (default: {described('guidance_scale')})")
    group.add_argument("--negative_prompt", metavar="TEXT", help=f"what the images should not show (not for {NO_NEGATIVE})")
    group.add_argument("--height", type=cli.positive_int, metavar="H", help="pixels (default: the model's)")
    group.add_argument("--width", type=cli.positive_int, metavar="W", help="pixels (default: the model's)")
    group.add_argument("--max_sequence_length", type=cli.positive_int, metavar="N", help=f"tokens of a T5 prompt (default: {described_lengths()})")
    group.add_argument("--scheduler", choices=SCHEDULERS, help="default: ddim for SD 1.x, euler for SD 2.x, the model's own for others")
    # fmt: on


def open_dtype(args: argparse.Namespace) -> "torch.dtype":
    """Fill in the sampling options that were left out with the defaults of the model's family; returns the dtype.

    Raises UserError for an option that the family does not use.
    """
    from des.models import pipelines

    family = pipelines.family_of(args.model_path)
    if args.negative_prompt is not None and not family.negative_prompt:
        raise UserError(f"{args.model_path} takes no --negative_prompt")
    if args.max_sequence_length and not family.t5_length:
        raise UserError(f"--max_sequence_length is for T5 only, and {args.model_path} has none")
    if args.guidance_scale and not family.guidance_scale:
        raise UserError(f"{args.model_path} was distilled without guidance; leave --guidance_scale out")
    args.num_inference_steps = args.num_inference_steps or family.num_inference_steps
    args.max_sequence_length = args.max_sequence_length or family.max_sequence_length
    args.guidance_scale = family.guidance_scale if args.guidance_scale is None else args.guidance_scale
    if family.name == "flux_schnell":
        message = "%s is distilled like FLUX.1-schnell (no guidance_embeds), and is drawn with %d steps and %d T5 tokens"
        logger.info(message, args.model_path, args.num_inference_steps, args.max_sequence_length)
    dtype = pipelines.dtype_for(family, args.device, args.dtype)
    args.dtype = next(name for name, value in pipelines.DTYPES.items() if value == dtype)
    return dtype
