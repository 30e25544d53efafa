"""Train a text encoder with DES so that prompts for a concept no longer produce it (paper, section 4).

    python train_des.py --model_path stable-diffusion-v1-5/stable-diffusion-v1-5 --device cuda:0 \\
        --codebook_dir codebook_sexual --unsafe_csv_path datasets/unsafe_prompts_copro_sexual.csv \\
        --safe_csv_path datasets/safe_prompts_copro_sexual.csv --output_dir checkpoints/des_sexual

Writes OUTPUT_DIR/{lr}_{lambda}/checkpoint-{epoch}.pt with its metadata, metrics.jsonl and train.log beside it, and the rows of
the targets to --safe_embedding_path. For a pipeline with several text encoders the folder is encoder{i}_{lr}_{lambda}, and the
codebook is looked for in {codebook_dir}_encoder{i} first. The defaults are the paper's for Stable Diffusion v1.x; it trained FLUX
with --batch_size 16 and T5-XXL with 4. --dry_run tells what a run needs. Several GPUs: accelerate launch train_des.py ...
An interrupted run goes on when its command line is repeated with --resume, to the same weights bit for bit on a CPU.
"""

import argparse
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from des.utils import choices, cli

DEFAULT_CONCEPT = ["nudity"]  # the paper's


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    main_group = parser.add_argument_group("main")
    cli.add_model(main_group)
    main_group.add_argument(
        "--text_encoder_idx", type=cli.positive_int, default=1, metavar="I", help="which of its text encoders, from 1"
    )
    cli.add_embedding(main_group)
    main_group.add_argument(
        "--concept_prompt",
        nargs="+",
        default=DEFAULT_CONCEPT,
        metavar="TEXT",
        help="the concept to remove, in words; several, each in quotes, get a NEN term each and share the guidance",
    )
    files = parser.add_argument_group("files")
    files.add_argument("--codebook_dir", type=Path, required=True, metavar="DIR", help="made by save_codebook.py")
    files.add_argument("--unsafe_csv_path", type=Path, required=True, metavar="CSV", help="prompts for the concept")
    files.add_argument("--safe_csv_path", type=Path, required=True, metavar="CSV", help="prompts whose images must stay")
    files.add_argument("--output_dir", type=cli.output_folder, required=True, metavar="DIR", help="gets the checkpoints")
    files.add_argument(
        "--safe_embedding_path",
        type=cli.output_file,
        metavar="F",
        help="targets' rows, kept for later runs (default: OUTPUT_DIR/safe_embeddings.pth, or safe_embeddings_encoder{i}.pth)",
    )
    files.add_argument("--recompute_targets", action="store_true", help="search the targets again and replace that file")
    files.add_argument(
        "--save_every",
        type=cli.positive_int,
        default=1,
        metavar="N",
        help="epochs between checkpoints; the last epoch is always saved",
    )
    files.add_argument(
        "--save_format", choices=choices.CHECKPOINT_FORMATS, default="pt", help="hf is a folder for from_pretrained"
    )
    files.add_argument(
        "--resume",
        action="store_true",
        help="go on where an interrupted run of this command line stands, or start where there is none",
    )
    files.add_argument(
        "--save_every_steps",
        type=cli.positive_int,
        metavar="N",
        help="steps between states for --resume (default: with each checkpoint); a state is about three times a checkpoint",
    )
    files.add_argument("--dry_run", action="store_true", help="tell what the run needs and stop, before any weight loads")
    hyper = parser.add_argument_group("hyper-parameters")
    hyper.add_argument("--num_epochs", type=cli.positive_int, default=2, metavar="N", help="passes over the longer list")
    hyper.add_argument(
        "--learning_rate", type=cli.number(float, 0, 1, low_open=True), default=1e-5, metavar="LR", help="of AdamW, constant"
    )
    hyper.add_argument("--batch_size", type=cli.positive_int, default=128, metavar="N", help="pairs a step")
    hyper.add_argument(
        "--lambda_safe", type=cli.number(float, 0, 1), default=0.3, metavar="L", help="weight of SEP against UEN + NEN"
    )
    alpha = hyper.add_mutually_exclusive_group()
    alpha.add_argument("--concept_guidance_scale", type=cli.number(float, 0), default=200.0, metavar="ALPHA", help="alpha")
    alpha.add_argument(
        "--concept_guidance_ratio",
        type=cli.number(float, 0),
        metavar="R",
        help="alpha = R * |n|, instead; 200 is about 0.8 for CLIP-L",
    )
    hyper.add_argument(
        "--ablation", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3], help="losses that are ON: 1 SEP, 2 UEN, 3 NEN"
    )
    hyper.add_argument(
        "--no_concept_term",
        dest="concept_term",
        action="store_false",
        help="train without SEP's second term (an ablation: safe embeddings are then not kept under a shift by the concept)",
    )
    hyper.add_argument(
        "--target",
        choices=choices.TARGETS,
        default="lowest",
        help="the safe prompt that an unsafe one is sent to, by similarity; highest and random are ablations",
    )
    hyper.add_argument(
        "--sampling_ratio",
        type=cli.number(float, 0, 1, low_open=True),
        default=1.0,
        metavar="R",
        help="share of each CSV that is used",
    )
    hyper.add_argument(
        "--seed", type=cli.natural, default=42, metavar="S", help="of the order of pairs, dropout, random targets"
    )
    performance = parser.add_argument_group("performance")
    cli.add_device(performance)
    performance.add_argument(
        "--precision",
        choices=choices.PRECISIONS,
        help="fp32 (default for CLIP), tf32 (needs CUDA), bf16 (autocast over fp32 weights), bf16_weights (default for T5)",
    )
    performance.add_argument(
        "--optimizer",
        choices=choices.OPTIMIZERS,
        help="AdamW; with bf16 weights, those with stochastic rounding (default: adamw for fp32 weights, adamw_bf16_sr for bf16)",
    )
    cli.add_deterministic(performance)
    performance.add_argument("--gradient_checkpointing", action="store_true", help="less memory, about a third slower")
    performance.add_argument("--multi_gpu", action="store_true", help="spread the encoder's layers over all GPUs (device_map)")
    log = cli.add_log_file(parser)
    log.add_argument(
        "--report_to",
        nargs="+",
        choices=choices.TRACKERS,
        default=[],
        metavar="T",
        help=f"follow the losses in {' or '.join(choices.TRACKERS)} too",
    )
    args = parser.parse_args(argv)
    if not all(prompt.strip() for prompt in args.concept_prompt) or len(set(args.concept_prompt)) < len(args.concept_prompt):
        parser.error("--concept_prompt takes different concepts in words, none of them blank")
    if not args.concept_term and 1 not in args.ablation:
        parser.error("--no_concept_term is about the loss SEP, which --ablation leaves out")
    cli.check_device(parser, args)
    if args.precision == "tf32" and args.device.type != "cuda":
        parser.error("--precision tf32 needs a CUDA device")
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
from des.models.checkpoints import (
    base_sketch,
    check_replaceable,
    checkpoint_path,
    plain_names,
    read_metadata,
    save_checkpoint,
)
from des.models.encoders import TextEncoder, load_encoder, own_name
from des.models.shift import describe as describe_shift
from des.training import losses
from des.training.checks import (
    check_concept,
    check_guidance,
    check_lengths,
    name_concept,
    refuse_untrained,
    unprotected,
    warn_unprotected,
)
from des.training.codebook import DTYPES, Codebook, dtype_name, find_codebook, write_codebook
from des.training.loop import Settings, all_that_decides, make_trainable, train, trained_dtype
from des.training.memory import describe, make_plan
from des.training.pairs import Pairs
from des.training.run_state import States, open_metrics, refuse_other_runs
from des.training.summary import Summary
from des.training.targets import find_targets
from des.training.trackers import check_trackers, tracking
from des.utils import logs
from des.utils.errors import UserError
from des.utils.files import sha256_tensors
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
        print(dry_run(args, processes, safe, unsafe))
        return
    check_trackers(args.report_to)
    if args.multi_gpu and processes.count > 1:
        raise UserError("--multi_gpu spreads one process over all GPUs; start it without accelerate launch")
    if processes.sharded and (args.resume or args.save_every_steps):
        raise UserError("--resume and --save_every_steps need whole weights in each process, which FSDP shards; leave them out")
    codebook = find_codebook(args.codebook_dir, args.model_path, args.text_encoder_idx)
    encoder = load(args, "auto" if args.multi_gpu else None)
    settings = settings_for(args, encoder)
    codebook.check(encoder)
    concept = frozen_concept(encoder, args)
    pairs = make_pairs(args, processes, encoder, codebook, safe, unsafe)
    summary = Summary(encoder, pairs, args.batch_size, args.concept_prompt)
    truncated = check_lengths(encoder, {"unsafe": unsafe, "safe": safe, "concept": args.concept_prompt})

    run_name = f"{args.learning_rate}_{args.lambda_safe}"
    run_dir = args.output_dir / own_name(args.model_path, encoder.index, run_name, "encoder{i}_" + run_name)
    with locked(run_dir / ".lock", "a training run") if processes.is_main else nullcontext():
        if processes.is_main:
            logs.setup_logging(args.log_file, run_dir / "train.log")
            logger.debug(concept_line)
        norm = concept.n.norm().item()
        told = "%d unsafe and %d safe prompts; |n| = %.2f, alpha = %g, alpha / |n| = %.3f"
        logger.info(told, len(unsafe), len(safe), norm, concept.alpha, concept.alpha / norm)
        check_guidance(concept.alpha, norm)
        how = encoder.embedding, encoder.index, settings.precision, settings.optimizer, processes
        logger.info("%s of encoder %d, trained in %s with %s by %s", *how)
        fit(args, run_dir, encoder, pairs, concept, settings, processes, summary, truncated)


def fit(
    args: argparse.Namespace,
    run_dir: Path,
    encoder: TextEncoder,
    pairs: Pairs,
    concept: losses.Concept,
    settings: Settings,
    processes: Processes,
    summary: Summary,
    truncated: dict[str, int],
) -> None:
    """Train, from the beginning or from where an interrupted run stands, and write checkpoints, losses and states into `run_dir`."""
    made_from = all_that_decides(encoder, pairs, concept, args.concept_prompt, settings, processes)
    refuse_other_runs(run_dir, made_from)
    states = None if processes.sharded else States(run_dir / "state.pt", made_from, processes, args.save_every_steps)
    final = checkpoint_path(run_dir / f"checkpoint-{args.num_epochs}", args.save_format)
    done = states.start(args.resume, final) if states else 0
    if done is None:
        warn_unprotected(read_metadata(final).get("embeddings"))
        return
    for epoch in range(1, args.num_epochs + 1):
        check_replaceable(checkpoint_path(run_dir / f"checkpoint-{epoch}", args.save_format))
    facts = facts_of(args, encoder, pairs.codebook, concept, settings) | {"made_from": made_from}
    facts |= {"truncated_prompts": truncated, "base_sketch": base_sketch(encoder.model)}
    untrained = sha256_tensors(plain_names(encoder.model.state_dict()), trained_dtype(settings))
    concept_ids = encoder.tokenize(args.concept_prompt)
    followed = args.report_to if processes.is_main else []
    with (
        tracking(followed, run_dir, made_from, done) as track,
        open_metrics(run_dir / "metrics.jsonl", done) if processes.is_main else nullcontext(lambda step: None) as add_metrics,
    ):

        def log_step(step: dict) -> None:
            if states:
                states.begin()
            add_metrics(step)
            track(step)

        def save(epoch: int, trained: TextEncoder) -> Path | None:
            last = epoch == args.num_epochs
            if not last and epoch % args.save_every:
                return None
            after, state = summary.after(trained, concept), processes.state_dict(trained.model)
            path = run_dir / f"checkpoint-{epoch}"
            if processes.is_main:
                refuse_untrained(state, untrained, epoch)
                metadata = {"epoch": epoch, **facts, "protects": unprotected(after) is None, "embeddings": after}
                save_checkpoint(path, encoder.model, state, metadata, args.save_format)
                if last:
                    report(after, checkpoint_path(path, args.save_format))
            processes.wait()
            return checkpoint_path(path, args.save_format)

        train(encoder, pairs, concept, concept_ids, settings, processes, log_step, save, states)
    if states:
        states.remove()
    if processes.is_main:
        warn_unprotected(read_metadata(final).get("embeddings"))


def load(args: argparse.Namespace, device_map: str | None = None, device: torch.device | str | None = None) -> TextEncoder:
    """The text encoder that the command line names, frozen, with the memory saver that it asks for."""
    chosen = args.embedding, args.max_sequence_length, device_map
    encoder = load_encoder(args.model_path, args.text_encoder_idx, device or args.device, *chosen)
    if args.gradient_checkpointing:
        encoder.model.activation_checkpointing_enable()
    return encoder


def settings_for(args: argparse.Namespace, encoder: TextEncoder) -> Settings:
    """The hyper-parameters, with what the encoder's dtype decides where the command line leaves it open."""
    precision = args.precision or ("bf16_weights" if encoder.model.dtype == torch.bfloat16 else "fp32")
    optimizer = args.optimizer or ("adamw_bf16_sr" if precision == "bf16_weights" else "adamw")
    if optimizer == "adamw_bf16_sr" and precision != "bf16_weights":
        raise UserError("--optimizer adamw_bf16_sr rounds bf16 weights; it needs --precision bf16_weights")
    if optimizer == "adamw" and precision == "bf16_weights":
        logger.warning("plain AdamW loses small updates of bf16 weights to rounding; the default optimizer does not")
    given = {field.name: getattr(args, field.name) for field in fields(Settings)}
    return Settings(**given | {"precision": precision, "optimizer": optimizer})


def dry_run(args: argparse.Namespace, processes: Processes, safe: list[str], unsafe: list[str]) -> str:
    """What the run would need, from the encoder's configuration alone."""
    encoder = load(args, device="meta")
    settings = settings_for(args, encoder)
    itemsize = DTYPES[dtype_name(encoder)][0].itemsize
    make_trainable(encoder.model, settings)
    plan = make_plan(
        encoder.model, lambda model, ids: replace(encoder, model=model)(ids), encoder.length, args.batch_size,
        max(len(safe), len(unsafe)), args.num_epochs, len(safe), itemsize, settings.optimizer,
        torch.bfloat16 if settings.precision == "bf16" else None, args.gradient_checkpointing, processes.count, processes.sharded,
    )  # fmt: skip
    spread = f"\nwith --multi_gpu all of this is spread over {torch.cuda.device_count()} GPUs" if args.multi_gpu else ""
    return describe(plan) + spread


def facts_of(
    args: argparse.Namespace, encoder: TextEncoder, codebook: Codebook, concept: losses.Concept, settings: Settings
) -> dict[str, Any]:
    """What a checkpoint's metadata says about how it was made."""
    facts = asdict(settings) | {
        "concept_prompt": args.concept_prompt,
        "concept_guidance_scale": concept.alpha,
        "target": args.target,
    }
    facts |= {"concept_norm": concept.n.norm().item(), "encoder": encoder.index, "embedding": encoder.embedding}
    facts |= {"sequence_length": encoder.length, "base_encoder_sha256": encoder.base_sha256, "codebook": codebook.hashes}
    return facts | {"made_by": provenance(args)}


def frozen_concept(encoder: TextEncoder, args: argparse.Namespace) -> losses.Concept:
    """n = E(concept prompt) and e0 = E("") of the encoder before training, each [tokens, hidden], and alpha."""
    prompts = [*args.concept_prompt, ""]
    *concepts, e0 = next(encoder.encode(prompts, len(prompts))).float().clone()
    n = losses.joint(torch.stack(concepts))
    ratio = args.concept_guidance_ratio
    return losses.Concept(n, e0, args.concept_guidance_scale if ratio is None else ratio * n.norm().item())


def make_pairs(
    args: argparse.Namespace,
    processes: Processes,
    encoder: TextEncoder,
    codebook: Codebook,
    safe: list[str],
    unsafe: list[str],
) -> Pairs:
    """Find the targets, and E(s) of every safe prompt: in the codebook, or encoded now where it lacks some."""

    def own(single: str, many: str) -> Path:
        return args.output_dir / own_name(args.model_path, encoder.index, single, many)

    name = "safe_embeddings" if args.target == "lowest" else f"safe_embeddings_{args.target}"
    path = args.safe_embedding_path or own(f"{name}.pth", name + "_encoder{i}.pth")
    lacking, rows_dir = not set(safe) <= set(codebook.prompts), own("safe_rows", "safe_rows_encoder{i}")
    if processes.is_main:
        find_targets(path, codebook, encoder, unsafe, recompute=args.recompute_targets, choice=args.target, seed=args.seed)
        if lacking:
            logger.info("the codebook lacks some of the safe prompts; encoding them into %s", rows_dir)
            write_codebook(rows_dir, encoder, safe, batch_size=args.batch_size, made_by=provenance(args))
    processes.wait()
    target_rows = find_targets(path, codebook, encoder, unsafe, choice=args.target, seed=args.seed)
    originals = Codebook(rows_dir) if lacking else codebook
    row_of = {prompt: row for row, prompt in enumerate(originals.prompts)}
    safe_rows = torch.tensor([row_of[prompt] for prompt in safe])
    return Pairs(encoder.tokenize(unsafe), encoder.tokenize(safe), target_rows, safe_rows, codebook, originals)


def report(after: dict[str, Any], checkpoint: Path) -> None:
    """The final summary: where the embeddings went."""
    told = (
        "mean cosine: safe to original %(cos_safe_to_original).4f (%(safe_prompts)d prompts), unsafe to original "
        "%(cos_unsafe_to_original).4f, unsafe to target %(cos_unsafe_to_target).4f (%(unsafe_prompts)d prompts)"
    )
    logger.info(told, after)
    logger.info(describe_shift(after["shift"]))
    told = "all safe embeddings moved by %(safe_shift).3f of their norm, cosine to the concept %(safe_shift_along_concept).2f"
    logger.info(told + "; %(distinct_targets)d distinct targets", after)
    logger.info("%s encoder in %s", "trained" if unprotected(after) else "protected", checkpoint)


if __name__ == "__main__":
    cli.run(main)
