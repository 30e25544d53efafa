"""Train a text encoder with DES so that prompts for a concept no longer produce it (paper, section 4).

    python train_des.py --model_path stable-diffusion-v1-5/stable-diffusion-v1-5 --device cuda:0 \\
        --codebook_dir codebook_sexual --unsafe_csv_path datasets/unsafe_prompts_copro_sexual.csv \\
        --safe_csv_path datasets/safe_prompts_copro_sexual.csv --output_dir checkpoints/des_sexual

Writes OUTPUT_DIR/{lr}_{lambda}/checkpoint-{epoch}.pt with its metadata, metrics.jsonl and train.log beside it, and the rows of
the targets to --safe_embedding_path. For a pipeline with several text encoders the folder is encoder{i}_{lr}_{lambda}, and the
codebook is looked for in {codebook_dir}_encoder{i} first. The defaults are the paper's for Stable Diffusion v1.x; it trained FLUX
with --batch_size 16 and T5-XXL with 4. --dry_run prints what a run needs. Several GPUs: accelerate launch train_des.py ...
To resume an interrupted run, repeat its command line with --resume; on a CPU the weights are the same bit for bit.
"""

import argparse
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

from des.utils import choices, cli

DEFAULT_CONCEPT = ["nudity"]  # the paper's


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    main_group = parser.add_argument_group("main")
    cli.add_model(main_group)
    cli.add_encoder_index(main_group)
    cli.add_embedding(main_group)
    # fmt: off
    main_group.add_argument("--concept_prompt", nargs="+", default=DEFAULT_CONCEPT, metavar="TEXT", help="the concept to remove, in words; several concepts, each in quotes, get one NEN term each and share the guidance")
    files = parser.add_argument_group("files")
    files.add_argument("--codebook_dir", type=cli.folder, required=True, metavar="DIR", help="folder made by save_codebook.py")
    files.add_argument("--unsafe_csv_path", type=Path, required=True, metavar="CSV", help="prompts for the concept")
    files.add_argument("--safe_csv_path", type=Path, required=True, metavar="CSV", help="prompts whose images must stay")
    files.add_argument("--output_dir", type=cli.output_folder, required=True, metavar="DIR", help="folder for the checkpoints")
    files.add_argument("--safe_embedding_path", type=cli.output_file, metavar="F", help="file of the targets' codebook rows, reused by later runs (default: OUTPUT_DIR/safe_embeddings.pth, or safe_embeddings_encoder{i}.pth)")
    files.add_argument("--recompute_targets", action="store_true", help="search the targets again and replace --safe_embedding_path")
    files.add_argument("--save_every", type=cli.positive_int, default=1, metavar="N", help="epochs between checkpoints; the last epoch is always saved")
    files.add_argument("--save_format", choices=choices.CHECKPOINT_FORMATS, default="pt", help="hf is a folder for from_pretrained")
    files.add_argument("--resume", action="store_true", help="resume an interrupted run of this command; start from scratch if there is none")
    files.add_argument("--save_every_steps", type=cli.positive_int, metavar="N", help="steps between states for --resume (default: with each checkpoint); a state is about three times a checkpoint")
    files.add_argument("--dry_run", action="store_true", help="print the memory and disk space that the run needs, and exit before any weights are loaded")
    hyper = parser.add_argument_group("hyper-parameters")
    hyper.add_argument("--num_epochs", type=cli.positive_int, default=2, metavar="N", help="passes over the longer list")
    hyper.add_argument("--learning_rate", type=cli.number(float, 0, 1, low_open=True), default=1e-5, metavar="LR", help="learning rate of AdamW, constant")
    hyper.add_argument("--batch_size", type=cli.positive_int, default=128, metavar="N", help="pairs per step")
    hyper.add_argument("--lambda_safe", type=cli.number(float, 0, 1), default=0.3, metavar="L", help="weight of SEP against UEN + NEN")
    alpha = hyper.add_mutually_exclusive_group()
    alpha.add_argument("--concept_guidance_scale", type=cli.number(float, 0), default=200.0, metavar="ALPHA", help="alpha")
    alpha.add_argument("--concept_guidance_ratio", type=cli.number(float, 0), metavar="R", help="sets alpha to R * |n|; the paper's alpha of 200 is about R = 0.8 for CLIP-L")
    hyper.add_argument("--ablation", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3], help="losses that are used: 1 SEP, 2 UEN, 3 NEN")
    hyper.add_argument("--no_concept_term", dest="concept_term", action="store_false", help="train without SEP's second term (an ablation: safe embeddings are then not kept under a shift by the concept)")
    hyper.add_argument("--target", choices=choices.TARGETS, default="lowest", help="target of each unsafe prompt: the safe prompt of lowest (paper) or highest cosine similarity, or a random one; highest and random are ablations")
    hyper.add_argument("--sampling_ratio", type=cli.number(float, 0, 1, low_open=True), default=1.0, metavar="R", help="share of each CSV that is used")
    hyper.add_argument("--seed", type=cli.natural, default=42, metavar="S", help="seeds pair order, dropout and random targets")
    performance = parser.add_argument_group("performance")
    cli.add_device(performance)
    performance.add_argument("--precision", choices=choices.PRECISIONS, help="fp32 (default for CLIP), tf32 (needs CUDA), bf16 (autocast over fp32 weights), bf16_weights (default for T5)")
    performance.add_argument("--optimizer", choices=choices.OPTIMIZERS, help="AdamW; with bf16 weights, those with stochastic rounding (default: adamw for fp32 weights, adamw_bf16_sr for bf16)")
    cli.add_deterministic(performance)
    performance.add_argument("--gradient_checkpointing", action="store_true", help="use less memory; about a third slower")
    performance.add_argument("--multi_gpu", action="store_true", help="spread the encoder's layers over all GPUs (device_map)")
    log = cli.add_log_file(parser)
    log.add_argument("--report_to", nargs="+", choices=choices.TRACKERS, default=[], metavar="T", help=f"follow the losses in {' or '.join(choices.TRACKERS)} too")
    # fmt: on
    args = parser.parse_args(argv)
    if not all(prompt.strip() for prompt in args.concept_prompt) or len(set(args.concept_prompt)) < len(args.concept_prompt):
        parser.error("--concept_prompt takes different concepts in words, none of them blank")
    if not args.concept_term and 1 not in args.ablation:
        parser.error("--no_concept_term is about the loss SEP, which --ablation leaves out")
    cli.check_device(parser, args)
    if args.precision == "tf32" and args.device.type != "cuda":
        parser.error("--precision tf32 needs a CUDA device")
    if args.precision == "bf16" and args.device.type == "mps":
        parser.error(
            "--precision bf16 needs autocast, which older versions of PyTorch turn off on mps; use fp32 or bf16_weights"
        )
    if args.multi_gpu:
        check_gpus(parser)
    return args


def check_gpus(parser: argparse.ArgumentParser) -> None:
    """End with a usage error unless this machine has the GPUs that --multi_gpu needs."""
    import torch

    if (count := torch.cuda.device_count()) < 2:
        parser.error(f"--multi_gpu needs at least two CUDA devices; this machine has {count}")


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.data.prompts import read_prompts
from des.models.activations import checkpoint_blocks
from des.models.encoders import TextEncoder, load_encoder, per_encoder_name
from des.training import run
from des.training.checks import (
    check_concept,
    check_guidance,
    check_lengths,
    name_concept,
    refuse_equal_concepts,
)
from des.training.codebook import Codebook, find_codebook
from des.training.loop import Settings
from des.training.memory import describe
from des.training.pairs import Pairs
from des.training.trackers import check_trackers
from des.utils import cli, logs
from des.utils.errors import UserError
from des.utils.locks import locked
from des.utils.logs import logger
from des.utils.processes import Processes
from des.utils.provenance import provenance

import torch


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.deterministic:
        cli.make_deterministic()
    processes = Processes(args.device, all_trained=args.embedding == "last_hidden_state")
    args.device = processes.device
    logs.setup_logging(args.log_file, quiet=not processes.is_main)
    inputs = [args.safe_csv_path, args.unsafe_csv_path, *args.codebook_dir.glob("codebook*"), args.log_file]
    cli.check_outputs([args.safe_embedding_path], inputs)
    concept_line = name_concept(args.concept_prompt, is_default=args.concept_prompt is DEFAULT_CONCEPT)
    logger.info(concept_line)
    safe = read_prompts(args.safe_csv_path, args.sampling_ratio)
    unsafe = read_prompts(args.unsafe_csv_path, args.sampling_ratio)
    check_concept(args.concept_prompt, unsafe)
    if args.dry_run:
        print(dry_run(args, processes, len(safe), len(unsafe)))
        return
    check_run(args, processes)
    codebook = find_codebook(args.codebook_dir, args.model_path, args.text_encoder_idx, processes.hashes_files)
    encoder = load(args, "auto" if args.multi_gpu else None)
    refuse_equal_concepts(encoder, args.concept_prompt)
    settings = settings_of(args, encoder)
    codebook.check(encoder)
    concept = run.frozen_concept(encoder, args.concept_prompt, args.concept_guidance_scale, args.concept_guidance_ratio)
    pairs = make_pairs(args, processes, encoder, codebook, safe, unsafe)
    truncated = check_lengths(encoder, {"unsafe": unsafe, "safe": safe, "concept": args.concept_prompt})
    facts = run.facts_of(encoder, codebook, concept, args.concept_prompt, args.target, settings)
    facts |= {"truncated_prompts": truncated, "made_by": provenance(args)}
    name = f"{args.learning_rate}_{args.lambda_safe}"
    folder = output_path(args, name)
    output = run.Output(folder, args.save_format, args.save_every, args.save_every_steps, args.resume, args.report_to)
    with ExitStack() as stack:
        if processes.is_main:
            stack.enter_context(locked(folder / ".lock", "a training run"))
            stack.enter_context(logs.log_to(folder / "train.log"))
            logger.debug(concept_line)  # the first line of train.log
        norm = concept.n.norm().item()
        message = "%d unsafe and %d safe prompts; |n| = %.2f, alpha = %g, alpha / |n| = %.3f"
        logger.info(message, len(unsafe), len(safe), norm, concept.alpha, concept.alpha / norm)
        check_guidance(concept.alpha, norm)
        how = encoder.embedding, encoder.index, settings.precision, settings.optimizer, processes
        logger.info("%s of encoder %d, trained in %s with %s by %s", *how)
        run.fit(output, encoder, pairs, concept, args.concept_prompt, settings, processes, facts)


def check_run(args: argparse.Namespace, processes: Processes) -> None:
    """Raise UserError for options that do not work with the processes or the installed packages."""
    check_trackers(args.report_to)
    if args.multi_gpu and processes.count > 1:
        raise UserError("--multi_gpu spreads one process over all GPUs; start it without accelerate launch")
    if processes.sharded and (args.resume or args.save_every_steps):
        raise UserError("--resume and --save_every_steps need whole weights in each process, which FSDP shards; leave them out")


def output_path(args: argparse.Namespace, stem: str, pattern: str = "encoder{i}_{stem}", suffix: str = "") -> Path:
    """A path in --output_dir: `stem`, or `pattern` for a pipeline with several text encoders, with `suffix` at its end."""
    return args.output_dir / (per_encoder_name(args.model_path, args.text_encoder_idx, stem, pattern) + suffix)


def load(args: argparse.Namespace, device_map: str | None = None, device: torch.device | str | None = None) -> TextEncoder:
    """The frozen text encoder, with gradient checkpointing where that is chosen."""
    chosen = args.embedding, args.max_sequence_length, device_map, args.variant
    encoder = load_encoder(args.model_path, args.text_encoder_idx, device or args.device, *chosen)
    if args.gradient_checkpointing:
        checkpoint_blocks(encoder.model)
    return encoder


def settings_of(args: argparse.Namespace, encoder: TextEncoder) -> Settings:
    """The hyper-parameters of the command line."""
    return run.settings_for(encoder.model.dtype, **{field.name: getattr(args, field.name) for field in fields(Settings)})


def dry_run(args: argparse.Namespace, processes: Processes, safe: int, unsafe: int) -> str:
    """What the run would need, from the encoder's configuration alone."""
    encoder = load(args, device="meta")
    plan = run.memory_plan(encoder, settings_of(args, encoder), safe, unsafe, args.gradient_checkpointing, processes)
    spread = f"\nwith --multi_gpu all of this is spread over {torch.cuda.device_count()} GPUs" if args.multi_gpu else ""
    return describe(plan) + spread


def make_pairs(
    args: argparse.Namespace,
    processes: Processes,
    encoder: TextEncoder,
    codebook: Codebook,
    safe: list[str],
    unsafe: list[str],
) -> Pairs:
    """The pairs of prompts with their targets and original embeddings, whose files are in --output_dir."""
    stem = "safe_embeddings" if args.target == "lowest" else f"safe_embeddings_{args.target}"
    path = args.safe_embedding_path or output_path(args, stem, "{stem}_encoder{i}", ".pth")
    choice = {"choice": args.target, "seed": args.seed}
    target_rows = run.shared_targets(processes, path, codebook, encoder, unsafe, args.recompute_targets, **choice)
    folder = output_path(args, "safe_rows", "{stem}_encoder{i}")
    originals = run.safe_originals(processes, folder, codebook, encoder, safe, args.batch_size, provenance(args))
    return Pairs.of(encoder.tokenize(unsafe), encoder.tokenize(safe), target_rows, safe, codebook, originals)


if __name__ == "__main__":
    cli.run(main)
