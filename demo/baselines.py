"""Other defences on the demo: trains ESD-x, UCE and an AdvUnlearn-like text encoder, and compares them with DES in a table.

    python demo/baselines.py --method esd --out checkpoints/baselines
    python generate.py --model_path demo/models/pipeline --training_method esd --unet_path checkpoints/baselines/esd.safetensors \\
        --prompt "a red mushroom" --output_path esd
    python demo/baselines.py --table --out results/baselines

--method writes OUT/esd.safetensors, OUT/uce.safetensors or OUT/advunlearn.safetensors, for the method of that name of generate.py, and
{method}-metadata.json beside it. --table trains what is missing, draws and scores the test lists with every method, runs the attacks of
scripts/attacks/ on each, and writes table.md, table.json and pareto.png. This takes about two and a half hours on two idle cores, most
of it for the attacks. The same command resumes after an interruption.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from demo.evaluation import ATTACKS
from des.utils import cli

# Chosen on the validation lists; docs/baselines.md says how.
DEFAULTS = {
    "esd": {"steps": 100, "learning_rate": 3e-4, "batch_size": 8, "negative_guidance": 1.0},
    "uce": {"erase_scale": 1.0, "preserve_scale": 1.0, "ridge": 0.1},
    "advunlearn": {
        "steps": 600, "learning_rate": 5e-4, "batch_size": 16, "negative_guidance": 1.0,
        "images": 192, "retain_weight": 10.0, "warm_up": 0.2, "attack_steps": 1, "attack_rate": 0.02,
    },
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    main_group = parser.add_argument_group("main")
    what = main_group.add_mutually_exclusive_group(required=True)
    # fmt: off
    what.add_argument("--method", choices=DEFAULTS, help="train this defence")
    what.add_argument("--table", action="store_true", help="compare the original model, DES and all of these defences, trained with their defaults")
    main_group.add_argument("--out", type=cli.output_folder, required=True, metavar="DIR", help="output folder")
    main_group.add_argument("--seed", type=cli.natural, default=42, metavar="S", help="seeds prompts, noise, timesteps and starts of attacks; UCE draws nothing (default: 42)")
    cli.add_device(main_group)
    training = parser.add_argument_group("training, with --method")
    training.add_argument("--unsafe_csv_path", type=Path, metavar="CSV", help="column `prompt`: prompts for the concept (default: datasets/demo_unsafe_train.csv)")
    training.add_argument("--safe_csv_path", type=Path, metavar="CSV", help="column `prompt`: prompts to preserve; ESD-x uses none (default: datasets/demo_safe_train.csv)")
    training.add_argument("--steps", type=cli.positive_int, metavar="N", help=f"steps of AdamW ({described('steps')})")
    training.add_argument("--learning_rate", type=cli.number(float, 0, 1, low_open=True), metavar="LR", help=f"learning rate of AdamW, constant with esd and falling linearly to 0 with advunlearn ({described('learning_rate')})")
    training.add_argument("--batch_size", type=cli.positive_int, metavar="N", help=f"unsafe prompts a step, and with advunlearn as many safe ones ({described('batch_size')})")
    training.add_argument("--negative_guidance", type=cli.number(float, 0), metavar="ETA", help=f"how far the target lies beyond the unconditional prediction ({described('negative_guidance')})")
    training.add_argument("--images", type=cli.positive_int, metavar="N", help=f"images for unsafe prompts, and twice as many for safe ones, whose noisy states are trained on ({described('images')})")
    training.add_argument("--retain_weight", type=cli.number(float, 0), metavar="W", help=f"weight of the loss that keeps predictions for safe prompts ({described('retain_weight')})")
    training.add_argument("--warm_up", type=cli.number(float, 0, 1), metavar="F", help=f"share of the steps before the inner attack begins, which then changes half of the unsafe prompts ({described('warm_up')})")
    training.add_argument("--attack_steps", type=cli.natural, metavar="N", help=f"gradient steps of the inner attack ({described('attack_steps')})")
    training.add_argument("--attack_rate", type=cli.number(float, 0, low_open=True), metavar="X", help=f"size of a step of the inner attack in each component ({described('attack_rate')})")
    training.add_argument("--erase_scale", type=cli.number(float, 0, low_open=True), metavar="X", help=f"weight of the edited tokens ({described('erase_scale')})")
    training.add_argument("--preserve_scale", type=cli.number(float, 0), metavar="X", help=f"weight of the preserved tokens ({described('preserve_scale')})")
    training.add_argument("--ridge", type=cli.number(float, 0, low_open=True), metavar="X", help=f"weight of |W - W0|^2 ({described('ridge')})")
    table = parser.add_argument_group("table, with --table")
    table.add_argument("--limit", type=cli.positive_int, metavar="N", help="prompts of each list for the concept; 2.2 times as many benign ones (default: 100)")
    table.add_argument("--des_seeds", type=cli.natural, nargs="*", metavar="S", help="train DES with these seeds, too, besides the checkpoint of the demo (default: 1 2)")
    table.add_argument("--attacks", nargs="*", choices=ATTACKS, metavar="A", help=f"attacks to run (default: all, which are {', '.join(ATTACKS)})")
    table.add_argument("--processes", type=cli.positive_int, metavar="N", help="attacks at the same time (default: one for each core, or one on a GPU)")
    # fmt: on
    args = parser.parse_args(argv)
    offered = (
        {"limit", "des_seeds", "attacks", "processes"}
        if args.table
        else {*DEFAULTS[args.method], "unsafe_csv_path", "safe_csv_path"}
    )
    offered -= {"safe_csv_path"} if args.method == "esd" else set()
    for group in (training, table):
        for action in group._group_actions:
            if getattr(args, action.dest) is not None and action.dest not in offered:
                parser.error(
                    f"{action.option_strings[0]} does not go with {'--table' if args.table else f'--method {args.method}'}"
                )
    if args.method:
        for name, value in DEFAULTS[args.method].items():
            setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    return cli.check_device(parser, args)


def described(option: str) -> str:
    """The default of an option for each method that has it, for --help."""
    return "default: " + ", ".join(f"{name} {values[option]}" for name, values in DEFAULTS.items() if option in values)


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

import time

from demo.defence_table import build
from demo.evaluation import PIPELINE, SAFE_LIST, UNSAFE_LIST
from demo.unlearning import Training, train_advunlearn, train_esd, train_uce
from des.data.prompts import read_prompts
from des.models.checkpoints import base_sketch, save_checkpoint
from des.models.pipelines import open_pipeline
from des.utils import logs
from des.utils.files import replacing, write_json
from des.utils.provenance import provenance

import torch
from safetensors.torch import save_file


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logs.setup_logging()
    if args.table:
        seeds = [1, 2] if args.des_seeds is None else args.des_seeds
        attacks = list(ATTACKS) if args.attacks is None else args.attacks
        processes = args.processes or (1 if args.device.type != "cpu" else os.cpu_count() or 1)
        print(build(args.out, args.device, args.seed, args.limit or 100, seeds, attacks, DEFAULTS, processes))
    else:
        print(train(args))


def train(args: argparse.Namespace) -> Path:
    """Train a defence and write its file with metadata beside it; returns the file's path."""
    unsafe = read_prompts(args.unsafe_csv_path or UNSAFE_LIST)
    safe = [] if args.method == "esd" else read_prompts(args.safe_csv_path or SAFE_LIST)
    start = time.monotonic()
    pipe = open_pipeline(str(PIPELINE), torch.float32).to(args.device)
    path, metadata = args.out / f"{args.method}.safetensors", {"method": args.method, "made_by": provenance(args)}
    if args.method == "advunlearn":
        base = {"base_sketch": base_sketch(pipe.text_encoder)}
        own = args.images, args.retain_weight, args.warm_up, args.attack_steps, args.attack_rate
        state = train_advunlearn(pipe, unsafe, safe, training_of(args), *own)
        metadata |= base | {"seconds": time.monotonic() - start}
        return save_checkpoint(path.with_suffix(""), pipe.text_encoder, state, metadata, "safetensors")
    if args.method == "esd":
        tensors = train_esd(pipe, unsafe, training_of(args))
    else:
        tensors = train_uce(pipe, unsafe, safe, args.erase_scale, args.preserve_scale, args.ridge)
    with replacing(path) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, {"format": "pt"})
    write_json(path.with_name(f"{path.stem}-metadata.json"), metadata | {"seconds": time.monotonic() - start})
    return path


def training_of(args: argparse.Namespace) -> Training:
    """The options of training by gradient descent."""
    return Training(args.steps, args.learning_rate, args.batch_size, args.negative_guidance, args.seed)


if __name__ == "__main__":
    cli.run(main)
