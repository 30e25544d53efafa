"""Measure how much of T5's training in bf16 each optimiser loses to rounding; write docs/t5.md.

    python scripts/benchmarks/rounding.py --out docs/t5.md         # about 2 minutes on two idle cores

A small random T5 encoder is trained by `des.training.loop.train` on the demo's prompts, with the paper's learning rate: once in fp32, and
in bf16 by each optimiser. Each run starts from the same weights (those in fp32 hold bf16 values), and sees the same batches.
"""

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from des.utils import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    # fmt: off
    parser.add_argument("--out", type=cli.output_file, required=True, metavar="F", help="Markdown page to write")
    parser.add_argument("--steps", type=cli.positive_int, nargs="+", default=[20, 40], metavar="N", help="steps after which the weights are compared")
    parser.add_argument("--learning_rate", type=cli.number(float, 0, 1, low_open=True), default=1e-5, metavar="LR", help="learning rate of AdamW")
    parser.add_argument("--batch_size", type=cli.positive_int, default=8, metavar="N", help="pairs a step")
    # fmt: on
    cli.add_device(parser)
    return cli.check_device(parser, parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.data.prompts import read_prompts
from des.models.activations import checkpoint_blocks
from des.models.encoders import load_encoder
from des.training import losses
from des.training.codebook import Codebook, write_codebook
from des.training.loop import Settings, train
from des.training.memory import make_plan
from des.training.pairs import Pairs
from des.training.targets import find_targets
from des.utils import logs
from des.utils.choices import OPTIMIZERS
from des.utils.files import write_text
from des.utils.logs import logger
from des.utils.processes import Processes

import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel

RUNS = {"adamw, fp32 weights": ("adamw", "fp32")} | {f"{name}, bf16 weights": (name, "bf16_weights") for name in OPTIMIZERS}
CONCEPT = "mushroom"
PAGE = """# T5 in bf16: updates lost to rounding

T5-XXL is trained with its weights in bf16, because weights, gradients and AdamW's moments in fp32 need 76 GB. A bf16 number has 8 bits
of mantissa: an update smaller than about |w| / 512 leaves the weight w unchanged. AdamW's updates are about as large as the learning
rate, {lr}, so plain AdamW leaves most weights where they were. Stochastic rounding rounds up or down at random, with probabilities that
keep the mean of every update. `train_des.py --optimizer` has three choices:

- `adamw`: torch's AdamW, the default for weights in fp32 (CLIP). With bf16 weights `train_des.py` warns.
- `adamw_bf16_sr`: torchao's `_AdamW` with `bf16_stochastic_round=True`, the default for weights in bf16 (T5).
- `adamw8bit`: torchao's `AdamW8bit`, the same with its two moments in 8 bits, which needs less memory.

Measured by `python scripts/benchmarks/rounding.py --out docs/t5.md` ({machine}): a random T5 encoder of {parameters} parameters ({layers} layers of
width {width}), learning rate {lr}, {batch} pairs a step, {steps} steps on the demo's prompts, the same batches in every run.

{table}

The first row is the reference: fp32 weights that start from the same bf16 values. "Change relative to fp32" is the norm of the change of
all weights, divided by the reference's. Stochastic rounding adds noise of mean zero to each weight, which makes the norm of the change
larger than the reference's and lowers its cosine to it.

## Memory of T5-XXL

GPU memory in GB that `train_des.py --dry_run` computes for T5-XXL (bf16 weights, batch 4, 512 tokens). No GPU has confirmed these figures.
"Activations" are what one step keeps for its backward pass; the total is an upper bound.

{memory}
"""
XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logs.setup_logging()
    with tempfile.TemporaryDirectory() as work:
        config = make_model(Path(work))
        rows = {}
        for name, (optimizer, precision) in RUNS.items():
            rows[name] = run(Path(work), args, optimizer, precision)
            logger.info("%s: %s", name, rows[name])
    write_text(args.out, page(args, config, rows))
    print(args.out.read_text(encoding="utf-8"))


def make_model(work: Path) -> T5Config:
    """Save a T5 encoder of 4 layers of width 256 with transformers' random weights, and case C's tokenizer."""
    shutil.copytree(ROOT / "tests/golden/C/model/tokenizer_3", work / "tokenizer_3")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=138, d_model=256, d_kv=32, d_ff=640, num_layers=4, num_heads=8, dropout_rate=0.1, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    T5EncoderModel(config).save_pretrained(work / "text_encoder_3")
    return config


def run(work: Path, args: argparse.Namespace, optimizer: str, precision: str) -> tuple[list[Tensor], float]:
    """Train once; the change of all weights after each of --steps, and the mean total loss of the last ten steps."""
    encoder = load_encoder(str(work), 3, args.device)
    pick = random.Random(0)
    safe, unsafe = (pick.sample(read_prompts(ROOT / f"datasets/demo_{name}_train.csv"), 400) for name in ("safe", "unsafe"))
    if not (work / "codebook").exists():
        write_codebook(work / "codebook", encoder, safe)
    codebook = Codebook(work / "codebook")
    targets = find_targets(work / "targets.pth", codebook, encoder, unsafe)
    n, e0 = next(encoder.encode([CONCEPT, ""], 2)).float().clone()
    concept = losses.Concept(n, e0, 0.8 * n.norm().item())
    pairs = Pairs(encoder.tokenize(unsafe), encoder.tokenize(safe), targets, torch.arange(len(safe)), codebook, codebook)
    before = weights(encoder.model)
    epochs = -(-max(args.steps) * args.batch_size // len(pairs))
    settings = Settings(
        num_epochs=epochs,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        precision=precision,
        optimizer=optimizer,
    )
    changes: list[Tensor] = []
    total: list[float] = []

    def record(step: dict) -> None:
        total.append(step["total"])
        if step["step"] in args.steps:
            changes.append(weights(encoder.model) - before)

    train(encoder, pairs, concept, encoder.tokenize([CONCEPT]), settings, Processes(args.device), record, lambda *_: None)
    return changes, sum(total[-10:]) / len(total[-10:])


def weights(model: torch.nn.Module) -> Tensor:
    """All parameters as one vector in fp32 on the CPU."""
    return torch.cat([parameter.detach().float().cpu().flatten() for parameter in model.parameters()])


def memory() -> str:
    """The plan of T5-XXL's training by optimiser, with and without gradient checkpointing, as a table."""
    lines = [
        "| optimiser | checkpointing | weights | gradients | optimiser states | activations | total |",
        "| --- | --- |" + " ---: |" * 5,
    ]

    def read(model: torch.nn.Module, ids: Tensor) -> Tensor:  # with an attention mask, as des.models.encoders does
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state

    for name in OPTIMIZERS:
        for checkpointing in (False, True):
            with torch.device("meta"):
                model = T5EncoderModel(T5Config(**XXL)).bfloat16()
            if checkpointing:
                checkpoint_blocks(model)
            plan = make_plan(model, read, 512, 4, 6911, 2, 6911, 2, name, None, checkpointing)
            sizes = (plan.weights, plan.gradients, plan.optimizer, plan.activations, plan.total)
            cells = " | ".join(f"{size / 1e9:.1f}" for size in sizes)
            lines.append(f"| {name} | {'yes' if checkpointing else 'no'} | {cells} |")
    return "\n".join([*lines, "", f"The codebook of 6,911 safe prompts takes {plan.codebook_on_disk / 1e9:.0f} GB of disk."])


def page(args: argparse.Namespace, config: T5Config, runs: dict[str, tuple[list[Tensor], float]]) -> str:
    """docs/t5.md: for each run, the share of weights that never moved, and its change compared with the run in fp32."""
    reference, _ = next(iter(runs.values()))
    head = [f"weights that never moved, {n} steps" for n in args.steps] + [
        f"change relative to fp32, {n} steps" for n in args.steps
    ]
    lines = [
        f"| run | {' | '.join(head)} | cosine to the change in fp32 | final total loss |",
        "| --- |" + " ---: |" * (len(head) + 2),
    ]
    for name, (changes, loss) in runs.items():
        still = [f"{100 * (change == 0).float().mean().item():.1f}%" for change in changes]
        kept = [f"{(change.norm() / whole.norm()).item():.2f}" for change, whole in zip(changes, reference, strict=True)]
        cosine = torch.cosine_similarity(changes[-1], reference[-1], dim=0).item()
        lines.append(f"| {name} | {' | '.join(still + kept)} | {cosine:.2f} | {loss:.4f} |")
    facts = {
        "table": "\n".join(lines), "lr": f"{args.learning_rate:g}", "batch": args.batch_size, "steps": max(args.steps),
        "memory": memory(),
        "parameters": f"{reference[-1].numel() / 1e6:.1f}M", "layers": config.num_layers, "width": config.d_model,
        "machine": f"torch {torch.__version__} on {'a CPU' if args.device.type == 'cpu' else torch.cuda.get_device_name(args.device)}",
    }  # fmt: skip
    return PAGE.format(**facts)


if __name__ == "__main__":
    cli.run(main)
