"""The whole experiment on the demo: codebook, DES training, images and scores before and after, a table and a picture.

    python demo/experiment.py --out results/quickstart --limit 66        # as scripts/quickstart.sh does
    python demo/experiment.py --out results/full --seeds 1 2 3           # the README's table
    python demo/experiment.py --out results/both --concept both          # a second concept, the house, together with the first

Every step is one of the project's scripts, run as a job: its record in jobs/ says with which options, on what and how long it ran.
"""

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from demo.evaluation import (
    CLASSIFIERS,
    EXPERIMENTS,
    OTHERS,
    PIPELINE,
    SETS,
    TRAINING,
    Sampling,
    concept_of,
    evaluate,
    shortened,
)
from demo.world import CONCEPT
from des.utils import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    files = parser.add_argument_group("what is done")
    # fmt: off
    files.add_argument("--out", type=cli.output_folder, required=True, metavar="DIR", help="output folder; an earlier experiment in it is replaced")
    files.add_argument("--concept", choices=EXPERIMENTS, default=CONCEPT, help="what DES is to remove")
    files.add_argument("--split", choices=("test", "val"), default="test", help="val is for choosing settings")
    files.add_argument("--sets", nargs="+", choices=SETS, metavar="SET", help="test sets (default: all of the concept's)")
    files.add_argument("--limit", type=cli.positive_int, metavar="N", help="images per set, evenly over the objects (default: all)")
    files.add_argument("--seeds", type=cli.natural, nargs="+", default=[42], metavar="S", help="training seeds")
    training = parser.add_argument_group("DES training")
    training.add_argument("--learning_rate", type=cli.number(float, 0, 1, low_open=True), metavar="LR", help="learning rate of AdamW")
    training.add_argument("--num_epochs", type=cli.positive_int, metavar="N", help="passes over the pairs")
    training.add_argument("--batch_size", type=cli.positive_int, metavar="N", help="pairs per step")
    training.add_argument("--concept_guidance_ratio", type=cli.number(float, 0), metavar="R", help="alpha / |n|")
    training.add_argument("--lambda_safe", type=cli.number(float, 0, 1), metavar="L", help="weight of SEP")
    training.add_argument("--ablation", nargs="+", default=["1", "2", "3"], help="losses that are used: 1 SEP, 2 UEN, 3 NEN")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--num_inference_steps", type=cli.positive_int, default=Sampling.num_inference_steps, metavar="N", help="denoising steps")
    sampling.add_argument("--guidance_scale", type=cli.number(float, 0), default=Sampling.guidance_scale, metavar="G", help="guidance")
    sampling.add_argument("--image_batch_size", type=cli.positive_int, default=Sampling.batch_size, metavar="N", help="images per batch")
    # fmt: on
    parser.set_defaults(**TRAINING)
    cli.add_device(sampling)
    args = parser.parse_args(argv)
    offered = EXPERIMENTS[args.concept].sets
    args.sets = list(dict.fromkeys(args.sets or offered))
    if foreign := set(args.sets) - set(offered):
        parser.error(f"--concept {args.concept} is tested on {', '.join(offered)}, not on {', '.join(sorted(foreign))}")
    if args.split == "val" and args.concept != CONCEPT:
        parser.error(f"--split val has lists for --concept {CONCEPT} only")
    return cli.check_device(parser, args)


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from demo.figure import draw_comparison
from des.data.prompts import read_rows
from des.tables.jobs import Job, JobRecords
from des.tables.pipeline_jobs import PipelineJobs
from des.utils import logs
from des.utils.errors import UserError
from des.utils.files import write_json, write_text
from des.utils.stats import show

import pandas as pd

MARKER = "experiment.json"
WRITES = (
    MARKER, "prompts", "codebook", "original", "protected-*", "reference", "checkpoints-*", "safe_embeddings.pth*", "jobs",
    "report.json", "report.html", "table.md", "comparison.png", ".*",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logs.setup_logging()
    start = time.monotonic()
    begin(args)
    prompts = {name: shortened(name, args.limit, args.out / "prompts", args.split) for name in args.sets}
    records, jobs = JobRecords(args.out / "jobs"), PipelineJobs(str(PIPELINE), args.device)
    sampling = Sampling(args.num_inference_steps, args.guidance_scale, args.image_batch_size)
    removed = EXPERIMENTS[args.concept].concepts
    lists = unsafe_list(args), ROOT / f"datasets/{EXPERIMENTS[args.concept].safe}.csv"
    records.run(jobs.codebook(lists[1], args.out / "codebook", "--batch_size", 256))
    before = evaluate(records, jobs, sampling, prompts, args.out / "original", removed=removed)
    after = {}
    for seed in args.seeds:
        training = training_job(args, jobs, lists, seed)
        records.run(training)
        method = ("--training_method", "des", "--text_encoder_path", training.outputs[0])
        after[seed] = evaluate(records, jobs, sampling, prompts, args.out / f"protected-{seed}", method, removed)
    table = summary_table(args, before, after)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    minutes = (time.monotonic() - start) / 60
    write_json(args.out / "report.json", {"minutes": minutes, "settings": settings, "before": before, "after": after})
    write_text(args.out / "table.md", table + "\n")
    seed = args.seeds[0]
    draw_comparison(args.out, seed, {name: args.out / f"prompts/demo_{name}.csv" for name in args.sets}, SETS)
    checkpoint = training_job(args, jobs, lists, seed).outputs[0]
    python = ".venv/bin/python" if Path(sys.prefix) == ROOT / ".venv" else "python"
    print(
        f"\n{in_words(args, before, after)}\n\n{table}\n\n{minutes:.1f} minutes. Numbers: {args.out}/report.json. Pictures: "
        f"{args.out}/comparison.png.\n\nNext, make a page of all images and scores, or draw prompts of your own in the browser:\n\n"
        f"    {python} scripts/report.py {args.out} --out {args.out}/report.html\n"
        f"    {python} -m pip install -r requirements-app.txt && {python} app.py --text_encoder_path {checkpoint}"
    )


def begin(args: argparse.Namespace) -> None:
    """Clear what an earlier experiment left in the folder; refuse a folder that holds anything else."""
    if args.out.exists() and any(args.out.iterdir()):
        if not (args.out / MARKER).is_file():
            raise UserError(f"{args.out} holds other files than an experiment's; choose another --out")
        others = [path.name for path in args.out.iterdir() if not any(map(path.match, WRITES))]
        if others:
            raise UserError(
                f"{args.out} holds {min(others)}, which is not an experiment's; move it away, or choose another --out"
            )
        shutil.rmtree(args.out)
    write_json(args.out / MARKER, vars(args))


def unsafe_list(args: argparse.Namespace) -> Path:
    """The prompts for the concept; those for several are put together into a list of their own."""
    first, *further = [ROOT / f"datasets/{name}.csv" for name in EXPERIMENTS[args.concept].unsafe]
    if not further:
        return first
    path = args.out / "prompts/demo_unsafe_train.csv"
    pd.concat([read_rows(each) for each in (first, *further)]).to_csv(path, index=False)
    return path


def training_job(args: argparse.Namespace, jobs: PipelineJobs, lists: tuple[Path, Path], seed: int) -> Job:
    """The training with one seed on the unsafe and the safe list; its output is the last checkpoint."""
    options = {
        "safe_embedding_path": args.out / "safe_embeddings.pth",
        "concept_prompt": EXPERIMENTS[args.concept].concepts,
        "save_every": args.num_epochs,
        "seed": seed,
    }
    options |= {name: getattr(args, name) for name in (*TRAINING, "ablation")}
    rows = max(len(read_rows(path)) for path in lists)
    return jobs.training(f"seed {seed}", lists, args.out / "codebook", args.out / f"checkpoints-{seed}", options, rows)


def in_words(args: argparse.Namespace, before: dict, after: dict[int, dict]) -> str:
    """The result in sentences: images of each concept and of other objects, k of n before and after, and what ASR means."""

    def counted(run: dict, names: list[str], key: str) -> str:
        return f"{sum(run[name][key]['k'] for name in names)} of {sum(run[name][key]['n'] for name in names)}"

    def sentence(title: str, names: list[str], key: str) -> list[str]:
        if not names:
            return []
        old = counted(before, names, key)
        new = " / ".join(dict.fromkeys(counted(run, names, key) for run in after.values()))
        return [f"{title}: {old} before and after." if old == new else f"{title}: {old} before, {new} after."]

    lines = []
    for concept in EXPERIMENTS[args.concept].concepts:
        lines += sentence(
            f"{concept.capitalize()}s drawn", [name for name in args.sets if concept_of(name) == concept], "concept"
        )
    lines += sentence("Other objects", [name for name in args.sets if not concept_of(name)], "object")
    return " ".join([*lines, "ASR, the attack success rate, is the share of prompts for the concept whose image shows it."])


def summary_table(args: argparse.Namespace, before: dict, after: dict[int, dict]) -> str:
    """A Markdown table, before against after: k/n with interval for one seed, mean and range over several."""
    lines = ["| measure | original | DES |", "| --- | --- | --- |"]

    def share(title: str, name: str, key: str) -> str:
        shares = [run[name][key] for run in after.values()]
        percents = [100 * each["fraction"] for each in shares]
        many = f"{statistics.fmean(percents):.1f}% ({min(percents):.1f} to {max(percents):.1f})"
        return f"| {title} | {show(before[name][key])} | {show(shares[0]) if len(shares) == 1 else many} |"

    def mean(title: str, values: list[float], old: float) -> str:
        spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
        return f"| {title} | {old:.2f} | {statistics.fmean(values):.2f}{spread} |"

    for name in filter(concept_of, args.sets):
        lines.append(share(f"ASR, {SETS[name]}", name, "concept"))
        old = before[name]["concept"]["mean_probability"]
        lines.append(
            mean("its mean detector probability", [run[name]["concept"]["mean_probability"] for run in after.values()], old)
        )
    for name in [name for name in args.sets if not concept_of(name)]:
        lines += [share(f"{label} right, {SETS[name]}", name, label) for label in CLASSIFIERS]
    for name in [name for name in args.sets if SETS[name] == OTHERS]:
        for key, title in (("clip_score", "CLIP score"), ("fid", "FID")):
            values = [run[name][key] for run in after.values()]
            lines.append(mean(f"{title}, {OTHERS}", values, before[name][key]))
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
