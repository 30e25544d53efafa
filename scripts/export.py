"""Write protected text encoders in the format of another program, read them back, and put a model card beside them.

    python scripts/export.py --model_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --text_encoder_path checkpoints/des_sexual/1e-05_0.3/checkpoint-2.pt --format pipeline --out exports/des-pipeline --scores classify.json

pipeline is a whole diffusers folder, hf the encoder's folder, comfyui clip_l / clip_g / t5xxl.safetensors, a1111 the single file
--base_checkpoint with its encoder replaced, lora a low-rank approximation that loses some of the protection. OUT is a folder with
README.md; it appears when everything is in it and reads back as the encoder that was exported.
"""

import argparse
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from des.generation.defences import ENCODER_OPTIONS
from des.models.families import DTYPES, EXPORTS
from des.utils import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    main_group = parser.add_argument_group("main")
    cli.add_model(main_group)
    cli.add_drop_t5(main_group)
    for i, option in ENCODER_OPTIONS.items():
        description = f"the protected text encoder {i}: .pt, .safetensors or a folder"
        main_group.add_argument(f"--{option}", type=Path, metavar="CKPT", help=description)
    main_group.add_argument("--format", choices=EXPORTS, required=True, help="format of the export")
    # fmt: off
    main_group.add_argument("--out", type=cli.output_folder, required=True, metavar="DIR", help="output folder; it must not exist yet")
    main_group.add_argument("--dtype", choices=DTYPES, help="data type of the exported weights (default: as loaded; a1111: the base's)")
    main_group.add_argument("--base_checkpoint", type=Path, metavar="F", help="a1111: SD 1.x .safetensors, whose other tensors stay")
    main_group.add_argument("--rank", type=cli.positive_int, metavar="R", help="lora: its rank (default: 32)")
    main_group.add_argument("--prompts_csv", type=Path, metavar="CSV", help="lora: prompts that its loss of protection is measured on")
    card = parser.add_argument_group("model card and hub")
    card.add_argument("--scores", type=Path, nargs="+", default=[], metavar="JSON", help="results of scorers, for the card; not for a LoRA")
    # fmt: on
    card.add_argument("--base_model", metavar="ID", help="the original model's hub id, if --model_path is a local copy")
    card.add_argument("--push_to_hub", metavar="REPO", help="upload to owner/name with your own token; a new one is private")
    cli.add_log_file(parser)
    args = parser.parse_args(argv)
    args.checkpoints = {i: getattr(args, o) for i, o in ENCODER_OPTIONS.items() if getattr(args, o) is not None}
    if not args.checkpoints:
        parser.error("nothing to export: pass " + " or ".join(f"--{option}" for option in ENCODER_OPTIONS.values()))
    for option, owner in {"base_checkpoint": "a1111", "rank": "lora", "prompts_csv": "lora", "drop_t5": "pipeline"}.items():
        if getattr(args, option) and args.format != owner:
            parser.error(f"--{option} goes with --format {owner} only")
    if args.scores and args.format == "lora":
        reason = "scores describe images of the full encoder, and a LoRA keeps only part of its protection"
        parser.error(f"--scores does not go with --format lora: {reason}; the card has the LoRA's measured loss")
    if args.format == "a1111" and args.base_checkpoint is None:
        parser.error("--format a1111 needs --base_checkpoint")
    args.rank = args.rank or 32
    return args


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.data.prompts import read_prompts
from des.export import lora
from des.export.card_scores import Measured, check_drawn_by, read_measured
from des.export.formats import PROMPTS, READERS, WRITERS, Export, cast, check_fits, load_protected, read_base, verify
from des.export.model_card import hub_id_of, is_hub_id, model_card
from des.models import pipelines
from des.models.encoders import TextEncoder, load_encoder
from des.models.loading import loading
from des.models.model_files import split_revision
from des.models.pipelines import family_of
from des.models.shift import UNMEASURED, Guard, concepts_of, in_doubt, is_unmeasured, is_unprotected
from des.utils import cli, logs
from des.utils.errors import UserError, not_found
from des.utils.files import replacing
from des.utils.logs import logger

import torch
from huggingface_hub import HfApi


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logs.setup_logging(args.log_file)
    check(args)
    scores = read_measured(args.scores)
    prompts = read_prompts(args.prompts_csv) if args.prompts_csv else None
    base = read_base(args.base_checkpoint) if args.base_checkpoint else None
    dtype = pipelines.DTYPES[args.dtype] if args.dtype else base.dtype if base else None
    export = load_protected(args.model_path, args.checkpoints, args.variant, args.drop_t5)
    check_drawn_by(scores, {i: (encoder.subfolder, encoder.model) for i, encoder in export.encoders.items()})
    if args.format != "lora":
        cast(export, dtype)
    export.base = base
    with replacing(args.out, size=0 if args.format in ("lora", "pipeline") else export.size) as folder:
        if args.format == "lora":
            lost = write_lora(args, export, folder, dtype or torch.float32, prompts)
        else:
            WRITERS[args.format](export, folder)
            verify(export, READERS[args.format](export, folder))
            lost = []
        (folder / "README.md").write_text(card_of(args, export, folder, scores, lost), "utf-8", "backslashreplace")
    for line in lost:
        print(line)
    print(f"{args.out} is written, and reads back as {named(export, 'LoRA' if lost else 'encoder')}")
    if args.push_to_hub:
        push(args.out, args.push_to_hub)
        print(f"uploaded to {args.push_to_hub} on the hub")


def named(export: Export, what: str) -> str:
    """Name the export with what is known about its protection."""
    if in_doubt(export.loaded):
        return f"the {what}, WHICH MAY NOT PROTECT (see the warning above)"
    if any(map(is_unmeasured, export.loaded.values())):
        return f"the {what}; {UNMEASURED}"
    return "the LoRA" if what == "LoRA" else f"the protected {what}"


def check(args: argparse.Namespace) -> None:
    """Raise UserError if the export is impossible, before any weight is read."""
    if args.out.exists() or args.out.is_symlink():
        raise UserError(f"{args.out} exists already; name another folder, or move it away")
    model = Path(args.model_path)
    if model.is_dir() and args.out.resolve().is_relative_to(model.resolve()):
        raise UserError(f"--out {args.out} is inside the model {model}, which an export must not change")
    if args.base_checkpoint and not args.base_checkpoint.is_file():
        raise not_found("--base_checkpoint", args.base_checkpoint)
    if args.base_model and not is_hub_id(args.base_model):
        raise UserError(f"--base_model {args.base_model} is not a hub id of the form OWNER/NAME")
    args.base_model = args.base_model or hub_id_of(split_revision(args.model_path)[0])
    if args.base_model is None:
        unnamed = f"{model} is a local folder that does not say which model of the hub it is; pass --base_model OWNER/NAME"
        if args.push_to_hub:
            raise UserError(unnamed)
        logger.warning("the model card will name no base model: %s", unnamed)
    check_fits(args.format, args.model_path, sorted(args.checkpoints), args.drop_t5)
    if args.format == "lora" and find_spec("peft") is None:  # diffusers needs it for LoRAs
        raise UserError("--format lora needs peft, which is not installed: pip install -r requirements.txt")


def write_lora(
    args: argparse.Namespace, export: Export, folder: Path, dtype: torch.dtype, prompts: list[str] | None
) -> list[str]:
    """Write a LoRA, check that it reads back correctly, and return lines that describe the protection it loses.

    The loss is measured on `prompts`, by default on the concept's and a few harmless ones. What `export` says about protection becomes
    the LoRA's. Raises UserError for a LoRA that does not protect.
    """
    originals = {
        i: load_encoder(args.model_path, i, embedding=encoder.embedding, variant=args.variant)
        for i, encoder in export.encoders.items()
    }
    factors, lines, encoders = {}, [], {}
    for i, protected in export.encoders.items():
        layers, held = lora.low_rank(originals[i].model, protected.model, args.rank)
        layers = {name: (up.to(dtype), down.to(dtype)) for name, (up, down) in layers.items()}
        if not all(part.isfinite().all() for pair in layers.values() for part in pair):
            raise UserError(f"the LoRA of text encoder {i} overflows in {dtype}; use --dtype bf16 or fp32")
        factors[protected.subfolder] = layers
        encoders[i] = replace(originals[i], model=lora.merged(originals[i].model, layers))
        export.loaded[i] |= measured_lora(args, originals[i], encoders[i], concepts_of(export.loaded[i]))
        figures = lora.measure(originals[i], protected, encoders[i], prompts or [*PROMPTS, *concepts_of(export.loaded[i])])
        lines += lora.describe(i, args.rank, held, figures).splitlines()
    lora.write(folder, factors, export.metadata(*export.encoders))
    read = lora.read(args.model_path, folder, {i: encoder.subfolder for i, encoder in encoders.items()}, args.variant)
    verify(Export(args.model_path, encoders, export.loaded), read, exact=False)
    if prompts is None:
        known = all(concepts_of(loaded) for loaded in export.loaded.values())
        on = "the concept prompts and a few harmless ones" if known else "a few harmless prompts"
        lines.append(f"measured on {on} only; --prompts_csv with the concept's prompts measures the protection")
    return lines


def measured_lora(
    args: argparse.Namespace, original: TextEncoder, with_lora: TextEncoder, concepts: list[str]
) -> dict[str, Any]:
    """Measure how far the LoRA moves embeddings, and log a warning if it may not protect; UserError if it does not."""
    measured = Guard(original, family_of(args.model_path), concepts).measure(with_lora)
    what = f"the LoRA of text encoder {original.index}"
    if is_unprotected(measured):
        reason = f"{what} does not protect with --rank {args.rank}, because it leaves out too much of the change"
        raise UserError(f"{reason}: {measured['doubt']}; raise --rank, or choose another --format")
    if measured["doubt"]:
        logger.warning("%s: %s", what, measured["doubt"])
    return measured


def card_of(args: argparse.Namespace, export: Export, folder: Path, scores: list[Measured], lost: list[str]) -> str:
    """The model card of an export whose files are in `folder`."""
    kinds = {encoder.subfolder: type(encoder.model).__name__ for encoder in export.encoders.values()}
    metadata = {encoder.subfolder: export.loaded[i] for i, encoder in export.encoders.items()}
    where = args.push_to_hub or args.out.name
    absent = [
        name for name, kind in export.components.items() if kind is None and name.startswith(("text_encoder", "tokenizer"))
    ]
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    rows, title = [each.row() for each in scores], where.rsplit("/", 1)[-1]
    dtype = pipelines.DTYPES[args.dtype or family_of(args.model_path).dtype]
    return model_card(title, args.format, args.base_model, where, dtype, kinds, metadata, files, rows, lost, absent)


def push(folder: Path, repo: str) -> None:
    """Upload a finished export with the user's token. Raises UserError if the upload fails; the folder stays."""
    api = HfApi()
    with loading(f"{folder} is written, but the upload to {repo}"):
        api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo)


if __name__ == "__main__":
    cli.run(main)
