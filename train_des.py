"""Train a text encoder with DES so that prompts for a concept no longer produce it (paper, section 4).

    python train_des.py --model_path stable-diffusion-v1-5/stable-diffusion-v1-5 --device cuda:0 \\
        --codebook_dir codebook_sexual --unsafe_csv_path datasets/unsafe_prompts_copro_sexual.csv \\
        --safe_csv_path datasets/safe_prompts_copro_sexual.csv --output_dir checkpoints/des_sexual

Writes OUTPUT_DIR/{lr}_{lambda}/checkpoint-{epoch}.pt with its metadata, metrics.jsonl and train.log beside it, and the rows of
the targets to --safe_embedding_path. The defaults are the paper's for Stable Diffusion v1.x.
"""

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path

import torch

from des import cli, losses
from des.checkpoints import fingerprint, save_checkpoint
from des.cli import logger
from des.codebook import Codebook, find_targets, write_codebook
from des.encoders import TextEncoder, load_encoder
from des.prompts import read_prompts
from des.results import provenance
from des.training import Pairs, Settings, Summary, train


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    main_group = parser.add_argument_group("main")
    cli.add_model(main_group)
    main_group.add_argument(
        "--text_encoder_idx", type=cli.positive_int, default=1, metavar="I", help="which of its text encoders, from 1"
    )
    main_group.add_argument("--concept_prompt", default="nudity", metavar="TEXT", help="the concept to remove, in words")
    files = parser.add_argument_group("files")
    files.add_argument("--codebook_dir", type=Path, required=True, metavar="DIR", help="made by save_codebook.py")
    files.add_argument("--unsafe_csv_path", type=Path, required=True, metavar="CSV", help="prompts for the concept")
    files.add_argument("--safe_csv_path", type=Path, required=True, metavar="CSV", help="prompts whose images must stay")
    files.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="gets the checkpoints")
    files.add_argument(
        "--safe_embedding_path",
        type=Path,
        metavar="F",
        help="targets' rows, kept for later runs (default: OUTPUT_DIR/safe_embeddings.pth)",
    )
    files.add_argument("--recompute_targets", action="store_true", help="search the targets again and replace that file")
    files.add_argument(
        "--save_every",
        type=cli.positive_int,
        default=1,
        metavar="N",
        help="epochs between checkpoints; the last epoch is always saved",
    )
    hyper = parser.add_argument_group("hyper-parameters")
    hyper.add_argument("--num_epochs", type=cli.positive_int, default=2, metavar="N", help="passes over the longer list")
    hyper.add_argument(
        "--learning_rate", type=cli.number(float, 0, 1, low_open=True), default=1e-5, metavar="LR", help="of AdamW, constant"
    )
    hyper.add_argument("--batch_size", type=cli.positive_int, default=128, metavar="N", help="pairs a step")
    hyper.add_argument(
        "--lambda_safe", type=cli.number(float, 0, 1), default=0.3, metavar="L", help="weight of SEP against UEN + NEN, 0 to 1"
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
        "--sampling_ratio",
        type=cli.number(float, 0, 1, low_open=True),
        default=1.0,
        metavar="R",
        help="share of each CSV that is used",
    )
    hyper.add_argument("--seed", type=cli.natural, default=42, metavar="S", help="of the order of pairs and of dropout")
    performance = parser.add_argument_group("performance")
    cli.add_device(performance)
    performance.add_argument(
        "--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="tf32 needs CUDA; bf16 is autocast"
    )
    performance.add_argument("--gradient_checkpointing", action="store_true", help="less memory, about a third slower")
    args = parser.parse_args(argv)
    if args.precision == "tf32" and args.device.type != "cuda":
        parser.error("--precision tf32 needs a CUDA device")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cli.setup_logging()
    safe = read_prompts(args.safe_csv_path, args.sampling_ratio)
    unsafe = read_prompts(args.unsafe_csv_path, args.sampling_ratio)
    codebook = Codebook(args.codebook_dir)
    encoder = load_encoder(args.model_path, args.text_encoder_idx, args.device)
    codebook.check(encoder)
    base = fingerprint(encoder.model)
    concept = frozen_concept(encoder, args)
    pairs = make_pairs(args, encoder, codebook, safe, unsafe)
    summary = Summary(encoder, pairs, args.batch_size)

    run_dir = args.output_dir / f"{args.learning_rate}_{args.lambda_safe}"
    run_dir.mkdir(parents=True, exist_ok=True)
    cli.setup_logging(run_dir / "train.log")
    norm = concept.n.norm().item()
    told = "%d unsafe and %d safe prompts; |n| = %.2f, alpha = %g, alpha / |n| = %.3f"
    logger.info(told, len(unsafe), len(safe), norm, concept.alpha, concept.alpha / norm)
    if args.gradient_checkpointing:
        encoder.model.activation_checkpointing_enable()
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    facts = asdict(settings) | {
        "concept_prompt": args.concept_prompt,
        "concept_guidance_scale": concept.alpha,
        "concept_norm": norm,
    }
    facts |= {"base_encoder_sha256": base, "codebook": codebook.hashes, "made_by": provenance(args)}
    concept_ids = encoder.tokenize([args.concept_prompt])

    def save(epoch: int) -> None:
        if epoch % args.save_every == 0 or epoch == args.num_epochs:
            metadata = {"epoch": epoch, **facts, "embeddings": summary.after(encoder, concept)}
            save_checkpoint(run_dir / f"checkpoint-{epoch}.pt", encoder.model, metadata)

    with (run_dir / "metrics.jsonl").open("w") as metrics:

        def log_step(step: dict) -> None:
            metrics.write(json.dumps(step) + "\n")
            metrics.flush()

        train(encoder, pairs, concept, concept_ids, settings, log_step, save)
    report(summary.after(encoder, concept), run_dir / f"checkpoint-{args.num_epochs}.pt")


def frozen_concept(encoder: TextEncoder, args: argparse.Namespace) -> losses.Concept:
    """n = E(concept prompt) and e0 = E("") of the encoder before training, each [tokens, hidden], and alpha."""
    n, e0 = next(encoder.encode([args.concept_prompt, ""], 2)).float().clone()
    ratio = args.concept_guidance_ratio
    return losses.Concept(n, e0, args.concept_guidance_scale if ratio is None else ratio * n.norm().item())


def make_pairs(args: argparse.Namespace, encoder: TextEncoder, codebook: Codebook, safe: list[str], unsafe: list[str]) -> Pairs:
    """Find the targets, and E(s) of every safe prompt: in the codebook, or encoded now where it lacks some."""
    path = args.safe_embedding_path or args.output_dir / "safe_embeddings.pth"
    target_rows = find_targets(path, codebook, encoder, unsafe, recompute=args.recompute_targets)
    originals = codebook
    if not set(safe) <= set(codebook.prompts):
        logger.info("the codebook lacks some of the safe prompts; encoding them into %s", args.output_dir / "safe_rows")
        write_codebook(args.output_dir / "safe_rows", encoder, safe, batch_size=args.batch_size, made_by=provenance(args))
        originals = Codebook(args.output_dir / "safe_rows")
    row_of = {prompt: row for row, prompt in enumerate(originals.prompts)}
    safe_rows = torch.tensor([row_of[prompt] for prompt in safe])
    return Pairs(encoder.tokenize(unsafe), encoder.tokenize(safe), target_rows, safe_rows, codebook, originals)


def report(after: dict[str, float], checkpoint: Path) -> None:
    """The final summary: where the embeddings went."""
    told = (
        "mean cosine: safe to original %(cos_safe_to_original).4f (%(safe_prompts)d prompts), unsafe to original "
        "%(cos_unsafe_to_original).4f, unsafe to target %(cos_unsafe_to_target).4f (%(unsafe_prompts)d prompts)"
    )
    logger.info(told, after)
    told = "all safe embeddings moved by %(safe_shift).3f of their norm, cosine to the concept %(safe_shift_along_concept).2f"
    logger.info(told + "; %(distinct_targets)d distinct targets", after)
    logger.info("protected encoder in %s", checkpoint)


if __name__ == "__main__":
    cli.run(main)
