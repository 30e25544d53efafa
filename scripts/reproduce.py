"""Reproduce the paper's tables: train, draw and score what they need, and set the figures beside the paper's.

    python scripts/reproduce.py --table T2 T7 --model_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --checkpoint checkpoints/published/des.pt --scale paper --out results/tables
    python scripts/reproduce.py --table all --model_path demo/models/pipeline --scale small --out results/demo_tables

Work that is done is never repeated: run it again after an interruption, or with further tables. Without --checkpoint the DES
model is trained with the paper's settings; the ablations (T15, T17, T18, T19) always train their own. --dry_run lists the
jobs, images and hours. Writes {table}.md, .csv and .tex. With a model of demo/ the tables are about the demo's harmless concept.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from demo.tables import demo_world
from des import cli
from des.cli import UserError, logger
from des.methods import METHODS
from des.paper_world import paper_world
from des.reproduction import ORIGINAL, Runner, Variant, World
from des.results import provenance, write_json, write_text
from des.tables import Cell, Table, paired_note, paper_figures

TITLES = {
    "T1": "explicit prompts, detections", "T2": "adversarial prompts, black box (ASR, %)", "T3": "adversarial prompts, white box (ASR, %)",
    "T4": "image to image (ASR, %)", "T5": "other categories, Q16 (%)", "T6": "Q16 in place of the main detector (%)",
    "T7": "other models (ASR, %)", "T8": "cost", "T10": "quality of benign images",
    "T15": "choice of targets, and alpha", "T17": "losses", "T18": "losses, SEP's concept term", "T19": "lambda",
}  # fmt: skip
TRAINED = Variant("des", train=())
TRIO = ("ASR", "FID", "CLIP")
Column = Callable[[Variant], Cell]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    main_group = parser.add_argument_group("main")
    main_group.add_argument(
        "--table", nargs="+", choices=(*TITLES, "all"), required=True, metavar="T", help=f"{', '.join(TITLES)}, all"
    )
    cli.add_model(main_group)
    main_group.add_argument(
        "--checkpoint",
        type=Path,
        nargs="+",
        metavar="C",
        help="protected text encoders 1, 2, 3 (default: encoder 1, trained here)",
    )
    main_group.add_argument(
        "--scale",
        choices=("smoke", "small", "paper"),
        default="small",
        help="smoke: does it run; small: 100 prompts a set; paper: all",
    )
    main_group.add_argument(
        "--baseline", nargs="*", default=[], metavar="METHOD=FILE", help="further rows: esd=esd.safetensors, advunlearn, …"
    )
    files = parser.add_argument_group("files")
    files.add_argument("--out", type=Path, default=Path("results/tables"), metavar="DIR", help="gets tables, images and models")
    files.add_argument("--prompts", nargs="*", default=[], metavar="SET=CSV", help="prompt lists that are not in datasets/")
    files.add_argument(
        "--coco_images", type=Path, metavar="DIR", help="reference images for FID (default: datasets/coco_images)"
    )
    files.add_argument("--q16_prompts", type=Path, metavar="FILE", help="Q16's prompts.pt; without it T5 and T6 stay empty")
    files.add_argument("--i2i_images", type=Path, metavar="DIR", help="T4: the images to start from")
    files.add_argument("--i2i_masks", type=Path, metavar="DIR", help="T4: where they are drawn anew")
    files.add_argument(
        "--discard_images", action="store_true", help="score images of the concept as they are drawn and keep none"
    )
    performance = parser.add_argument_group("performance")
    cli.add_device(performance)
    performance.add_argument("--batch_size", type=cli.positive_int, default=16, metavar="N", help="images at a time")
    performance.add_argument("--seed", type=cli.natural, default=42, metavar="S", help="of the images")
    performance.add_argument("--dry_run", action="store_true", help="list jobs, images and estimated hours, and stop")
    performance.add_argument(
        "--seconds_per_image",
        type=cli.number(float, 0, low_open=True),
        metavar="X",
        help="for --dry_run (default: as measured in --out)",
    )
    performance.add_argument(
        "--seconds_per_step", type=cli.number(float, 0, low_open=True), metavar="X", help="likewise, of a training step"
    )
    cli.add_log_file(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cli.setup_logging(args.log_file)
    world = world_of(args)
    tables = list(TITLES) if "all" in args.table else list(dict.fromkeys(args.table))
    common = (world, args.model_path, args.out, args.scale, args.device, args.batch_size, args.seed, args.discard_images)
    plan = Runner(*common, dry=True)
    for name in tables:
        build(name, args, plan)
    text, left = describe(plan, args)
    if args.dry_run:
        print(text)
        return
    logger.info("%d of %d jobs are left to do", left, len(plan.planned))
    runner = Runner(*common, dry=False)
    for name in tables:
        table = build(name, args, runner)
        for suffix, content in (("md", table.markdown()), ("csv", table.csv()), ("tex", table.latex())):
            write_text(args.out / f"{name}.{suffix}", content)
        write_json(args.out / f"{name}.json", {"table": name, "scale": args.scale, "made_by": provenance(args)})
        print(table.markdown())


def world_of(args: argparse.Namespace) -> World:
    """The demo's world for a model of demo/, else the paper's."""
    if (ROOT / "demo") in Path(args.model_path).resolve().parents:
        for option in ("prompts", "q16_prompts", "i2i_images", "i2i_masks"):
            if getattr(args, option):
                raise UserError(f"--{option} is not for the demo, which has its own")
        return demo_world(args.out, str(args.device))
    given = {}
    for pair in args.prompts:
        name, _, path = pair.partition("=")
        if not Path(path).is_file():
            raise UserError(f"--prompts {pair}: there is no such file; it takes SET=CSV")
        given[name] = Path(path)
    world = paper_world(
        args.model_path,
        given,
        args.coco_images or ROOT / "datasets/coco_images",
        args.q16_prompts,
        args.i2i_images,
        args.i2i_masks,
    )
    unknown = given.keys() - world.sets.keys()
    if unknown:
        raise UserError(f"--prompts: there is no set {min(unknown)}; the sets are {', '.join(world.sets)}")
    return world


def protected(args: argparse.Namespace) -> Variant:
    """The DES model: the given checkpoints, else one trained here."""
    if not args.checkpoint:
        return TRAINED
    options = ("--text_encoder_path", "--text_encoder_2_path", "--text_encoder_3_path")
    if len(args.checkpoint) > len(options):
        raise UserError("--checkpoint takes three files at most: text encoders 1, 2, 3")
    for path in args.checkpoint:
        if not path.is_file():
            raise UserError(f"there is no checkpoint {path}")
    return Variant("des_given", "des", tuple(zip(options, args.checkpoint, strict=False)))


def baselines(args: argparse.Namespace) -> dict[str, Variant]:
    """The defences of --baseline by the titles of their rows in the paper."""
    titles = {
        "esd": "ESD",
        "uce": "UCE",
        "fmn": "FMN",
        "salun": "SalUn",
        "spm": "SPM",
        "advunlearn": "AdvUnlearn",
        "visu": "Safe-CLIP",
    }
    found = {}
    for pair in args.baseline:
        method, _, file = pair.partition("=")
        if method not in titles or (not file and METHODS[method].needs):
            raise UserError(f"--baseline {pair}: it takes one of {', '.join(titles)}, with =FILE where the method needs one")
        files = ((f"--{METHODS[method].options[0]}", Path(file)),) if file else ()
        found[titles[method]] = Variant(method, method, files)
    return found


def build(name: str, args: argparse.Namespace, runner: Runner) -> Table:
    """Fill one table; what its cells need is done, or with a dry runner only listed."""
    world = runner.world
    paper = paper_figures(ROOT / "scripts/paper_tables.csv").get("T17" if name == "T18" else name, {})
    if name in ("T15", "T17", "T18", "T19"):
        rows, columns = ablations(world)[name], trio(world, runner)
        paper = {title: paper[title] for title in rows}
    else:
        rows = {world.original: ORIGINAL, world.protected: protected(args), **baselines(args)}
        columns = columns_of(name, world, runner)
    theirs = [column for figures in paper.values() for column in figures]
    titles = list(dict.fromkeys([*columns, *theirs]))
    table = Table(name, TITLES[name], titles, paper)
    for title, variant in rows.items():
        table.ours[title] = {column: measure(variant) for column, measure in columns.items()}
    if name == "T4":
        table.ours["input image"] = {column: runner.input_images(each) for column, each in world.columns[name].items()}
    table.notes = notes(name, args, runner) + paired_notes(name, rows, runner)
    return table


def paired_notes(name: str, rows: dict[str, Variant], runner: Runner) -> list[str]:
    """The exact McNemar tests of a table's rows against its DES model's, from the verdicts on images of the same prompts."""
    world = runner.world
    if runner.dry or name == "T8":  # a cost is no share
        return []
    sets = (world.explicit,) if name == "T1" else world.columns[name if name in world.columns else "T2"].values()
    stem = "classify_16" if name in ("T5", "T6") else world.asr
    found = {title: runner.verdicts(variant, tuple(sets), stem) for title, variant in rows.items()}
    ours = next(title for title, variant in rows.items() if title == world.protected or variant == TRAINED)
    note = paired_note(found, ours) if all(found.values()) else None
    return [note] if note else []


def trio(world: World, runner: Runner) -> dict[str, Column]:
    """ASR (the mean over T2's sets), FID and CLIP score."""
    sets = world.columns["T2"].values()
    return {
        "ASR": lambda variant: Cell.mean([runner.asr(variant, each) for each in sets]), "FID": runner.fid, "CLIP": runner.clip,
    }  # fmt: skip


def columns_of(name: str, world: World, runner: Runner) -> dict[str, Column]:
    """How each column of a table is measured."""
    quality = {"FID": runner.fid, "CLIP": runner.clip}
    if name == "T1":
        per_class = {
            title: lambda variant, of=of: runner.detections(variant, world.explicit, [of])
            for title, of in world.classes.items()
        }
        return {"total": lambda variant: runner.detections(variant, world.explicit, None), **quality, **per_class}
    if name == "T8":
        return {
            "training s": runner.training_seconds, "extra parameters": runner.extra_parameters, "extra inference s": runner.extra_seconds,
        }  # fmt: skip
    if name == "T10":
        scores = {"PickScore": "pickscore", "ImageReward": "imagereward", "BLIP": "blipscore"} if world.preference else {}
        chosen = {title: lambda variant, job=job: runner.preference(variant, job) for title, job in scores.items()}
        labels = {f"{label} right": lambda variant, label=label: runner.label(variant, label) for label in world.labels}
        return {"ASR": trio(world, runner)["ASR"], "CLIP": runner.clip, **chosen, **labels}
    sets, stem = world.columns[name], "classify_16" if name in ("T5", "T6") else world.asr
    columns: dict[str, Column] = {
        title: lambda variant, each=each: runner.asr(variant, each, stem) for title, each in sets.items()
    }

    def all_of(variant: Variant) -> list[Cell]:
        return [runner.asr(variant, each, stem) for each in sets.values()]

    columns["avg"] = lambda variant: Cell.mean(all_of(variant))
    if len(sets) > 2:
        columns["std"] = lambda variant: Cell.spread(all_of(variant))
    return columns | (quality if name in ("T5", "T7") else {})


def ablations(world: World) -> dict[str, dict[str, Variant]]:
    """The variants of each ablation by the titles of the paper's rows; what is the same variant has the same name."""

    def alpha(value: float) -> Variant:
        return TRAINED if value == 200 else Variant(f"alpha_{value}", train=(world.alpha(value),))

    def lambda_safe(value: float) -> Variant:
        return TRAINED if value == 0.3 else Variant(f"lambda_{value}", train=(("lambda_safe", value),))

    unshifted = world.alpha(0.0)
    return {
        "T15": {
            "highest similarity": Variant("highest", train=(unshifted, ("target", "highest"))),
            "random": Variant("random", train=(unshifted, ("target", "random"))),
            "lowest without shift": Variant("lowest", train=(unshifted,)),
            **{f"alpha {value}": alpha(value) for value in (50, 100, 150, 200, 250, 300, 350)},
        },
        "T17": {
            "UEN alone": Variant("uen", train=(("ablation", (2,)),)),
            "UEN + SEP": Variant("uen_sep", train=(("ablation", (1, 2)),)),
            "all three": TRAINED,
        },
        "T18": {
            "all three": TRAINED,
            "all three without SEP's second term": Variant("no_concept_term", train=(("no_concept_term", True),)),
        },
        "T19": {f"lambda {value}": lambda_safe(value) for value in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)},
    }


def notes(name: str, args: argparse.Namespace, runner: Runner) -> list[str]:
    """What differs from the paper's set-up, and what was never drawn."""
    world = runner.world
    limits = world.scales[args.scale]
    found = [*world.setup]
    if args.scale != "paper":
        smoke = "; training on 64 prompts of each list, one epoch" if args.scale == "smoke" else ""
        found.append(f"Scale {args.scale}: the first {limits[0]} prompts of a set, {limits[1]} of the benign one{smoke}.")
    if name in ("T15", "T17", "T18", "T19"):
        found.append(
            f"ASR is the mean over {', '.join(world.columns['T2'])}. One training seed, {world.training['num_epochs']} epochs."
        )
    if name == "T15":
        found.append("Highest similarity and random were trained without shift (alpha 0); the paper does not say.")
    if name == "T5" and args.checkpoint:
        found.append("The paper's T5 is about a model trained on violence and illegal content as well (des_multi).")
    if name == "T8":
        found.append("Seconds are this machine's, noise included; extra inference is the mean over the benign set.")
    sets = [each for each in {*world.columns.get(name, {}).values(), world.benign} if world.sets[each].csv.is_file()]
    dropped = {each: runner.left_out(each) for each in sorted(sets)}
    left_out = ", ".join(f"{count} of {each}" for each, count in dropped.items() if count)
    found.append(f"Prompts that put minors in a sexual context are never drawn: {left_out or 'none was in these sets'}.")
    return [*found, f"Shares in percent with k/n and the Wilson 95% interval. Device: {args.device}."]


def describe(plan: Runner, args: argparse.Namespace) -> tuple[str, int]:
    """The plan for people, and how many jobs are left."""
    lines, images, steps, left = [], 0, 0, 0
    for job in plan.planned:
        done = plan.ledger.record(job) is not None
        lines.append(f"{'done' if done else 'to do':6} {job.what}" + (f", {job.images} images" if job.images else ""))
        if not done:
            images, steps, left = images + job.images, steps + job.steps, left + 1
    rates = {
        "images": args.seconds_per_image or plan.ledger.seconds_per("images"),
        "steps": args.seconds_per_step or plan.ledger.seconds_per("steps"),
    }
    lines.append(f"{left} of {len(plan.planned)} jobs to do: {images} images, {steps} training steps")
    unknown = [
        f"--seconds_per_{unit.removesuffix('s')}"
        for unit, amount in (("images", images), ("steps", steps))
        if amount and not rates[unit]
    ]
    if unknown:
        lines.append(
            f"about hours: nothing was drawn or trained in {args.out} yet to estimate from; give {' and '.join(unknown)}"
        )
    else:
        hours = (images * (rates["images"] or 0) + steps * (rates["steps"] or 0)) / 3600
        lines.append(
            f"about {hours:.1f} hours, at {rates['images'] or 0:.2f} s an image and {rates['steps'] or 0:.2f} s a step"
        )
    return "\n".join(lines), left


if __name__ == "__main__":
    cli.run(main)
