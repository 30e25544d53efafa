"""Reproduce the paper's tables: train, draw and score what they need, and show the figures beside the paper's.

    python scripts/reproduce.py --table T2 T7 --model_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --checkpoint checkpoints/published/des.pt --scale paper --out results/tables
    python scripts/reproduce.py --table all --model_path demo/models/pipeline --scale small --out results/demo_tables

Work that is done is not repeated as long as everything that it reads is the same: run it again after an interruption, or with
further tables. One --out is for one --scale, --seed, model and set of checkpoints. Without --checkpoint the DES
model is trained with the paper's settings; the ablations (T15, T17, T18, T19) always train their own. --dry_run lists the
jobs, images and hours. Writes {table}.md, .csv and .tex. With a model of demo/ the tables are about the demo's harmless concept.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from des.utils import cli

TITLES = {
    "T1": "explicit prompts, images with a detection of each class", "T2": "adversarial prompts, black box (ASR, %)", "T3": "adversarial prompts, white box (ASR, %)",
    "T4": "image to image (ASR, %)", "T5": "other categories, Q16 (%)", "T6": "Q16 in place of the main detector (%)",
    "T7": "other models (ASR, %)", "T8": "cost", "T10": "quality of benign images",
    "T15": "choice of targets, and alpha", "T17": "losses", "T18": "losses, SEP's concept term", "T19": "lambda",
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    main_group = parser.add_argument_group("main")
    # fmt: off
    main_group.add_argument("--table", nargs="+", choices=(*TITLES, "all"), required=True, metavar="T", help=f"{', '.join(TITLES)}, all")
    cli.add_model(main_group)
    main_group.add_argument("--checkpoint", type=Path, nargs="+", metavar="C", help="protected text encoders 1, 2, 3 (default: encoder 1, trained here)")
    main_group.add_argument("--scale", choices=("smoke", "small", "paper"), default="small", help="smoke: does it run; small: 100 prompts a set; paper: all")
    main_group.add_argument("--baseline", nargs="*", default=[], metavar="METHOD=FILE", help="further rows: esd=esd.safetensors, advunlearn, …")
    files = parser.add_argument_group("files")
    files.add_argument("--out", type=cli.output_folder, default=Path("results/tables"), metavar="DIR", help="folder for tables, images and models")
    files.add_argument("--prompts", nargs="*", default=[], metavar="SET=CSV", help="prompt lists that are not in datasets/")
    files.add_argument("--coco_images", type=Path, metavar="DIR", help="reference images for FID (default: datasets/coco_images)")
    files.add_argument("--q16_prompts", type=Path, metavar="FILE", help="Q16's prompts.pt; without it T5 and T6 stay empty")
    files.add_argument("--i2i_images", type=Path, metavar="DIR", help="T4: the images to start from")
    files.add_argument("--i2i_masks", type=Path, metavar="DIR", help="T4: the regions to redraw")
    files.add_argument("--discard_images", action="store_true", help="score images of the concept as they are drawn and keep none")
    performance = parser.add_argument_group("performance")
    cli.add_device(performance)
    performance.add_argument("--batch_size", type=cli.positive_int, default=16, metavar="N", help="images at a time")
    performance.add_argument("--seed", type=cli.natural, default=42, metavar="S", help="seed of the images")
    performance.add_argument("--dry_run", action="store_true", help="list jobs, images and estimated hours, and stop")
    performance.add_argument("--seconds_per_image", type=cli.number(float, 0, low_open=True), metavar="X", help="for --dry_run (default: as measured in --out)")
    performance.add_argument("--seconds_per_step", type=cli.number(float, 0, low_open=True), metavar="X", help="measured seconds of a training step, for the estimated hours")
    # fmt: on
    cli.add_log_file(parser)
    return cli.check_device(parser, parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from demo.tables import demo_setup
from des.generation.defences import METHODS
from des.tables.build import Cell, Table, paired_note, paper_figures
from des.tables.cells import ORIGINAL, TRAINED, Setup, Variant, ablations
from des.tables.inputs import check_inputs, record_inputs
from des.tables.paper import paper_setup
from des.tables.runner import TableRunner
from des.utils import cli, logs
from des.utils.errors import UserError
from des.utils.files import write_json, write_text
from des.utils.logs import logger
from des.utils.provenance import provenance

TRIO = ("ASR", "FID", "CLIP")
Column = Callable[[Variant], Cell]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logs.setup_logging(args.log_file)
    setup = setup_of(args)
    tables = list(TITLES) if "all" in args.table else list(dict.fromkeys(args.table))
    common = (setup, args.model_path, args.out, args.scale, args.device, args.batch_size, args.seed, args.discard_images)
    plan = TableRunner(*common, dry=True)
    inputs = plan.inputs(files_of(args))
    check_inputs(args.out, inputs)
    for name in tables:
        build(name, args, plan)
    text, left = describe(plan, args)
    if args.dry_run:
        print(text)
        return
    logger.info("%d of %d jobs are left to do", left, len(plan.planned))
    record_inputs(args.out, inputs)
    runner = TableRunner(*common, dry=False)
    for name in tables:
        table = build(name, args, runner)
        for suffix, content in (("md", table.markdown()), ("csv", table.csv()), ("tex", table.latex())):
            write_text(args.out / f"{name}.{suffix}", content)
        facts = {"table": name, "scale": args.scale, "sets": {each: count_of(each, runner) for each in sets_of(name, setup)}}
        write_json(args.out / f"{name}.json", facts | {"inputs": inputs, "made_by": provenance(args)})
        print(table.markdown())


def setup_of(args: argparse.Namespace) -> Setup:
    """The demo's set-up for a model of demo/, else the paper's."""
    if (ROOT / "demo") in Path(args.model_path).resolve().parents:
        for option in ("prompts", "q16_prompts", "i2i_images", "i2i_masks"):
            if getattr(args, option):
                raise UserError(f"--{option} cannot be used with the demo, which brings its prompts and detector")
        return demo_setup(args.out, str(args.device))
    given = {}
    for pair in args.prompts:
        name, _, path = pair.partition("=")
        if not Path(path).is_file():
            raise UserError(f"--prompts {pair}: there is no such file; it takes SET=CSV")
        given[name] = Path(path)
        cli.check_outputs([args.out / "prompts" / f"{name}.csv"], [given[name]])
    setup = paper_setup(
        args.model_path,
        given,
        args.coco_images or ROOT / "datasets/coco_images",
        args.q16_prompts,
        args.i2i_images,
        args.i2i_masks,
    )
    unknown = given.keys() - setup.sets.keys()
    if unknown:
        raise UserError(f"--prompts: there is no set {min(unknown)}; the sets are {', '.join(setup.sets)}")
    return setup


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
    """The defences of --baseline, by the titles of their rows in the paper."""
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


def files_of(args: argparse.Namespace) -> dict[str, Path | None]:
    """The files and folders that images depend on, by their options."""
    files = {f"--checkpoint {i}": path for i, path in enumerate(args.checkpoint or [], 1)}
    files |= {f"--baseline {variant.method}": path for variant in baselines(args).values() for _, path in variant.files}
    return files | {"--i2i_images": args.i2i_images, "--i2i_masks": args.i2i_masks}


def build(name: str, args: argparse.Namespace, runner: TableRunner) -> Table:
    """Fill one table: run the jobs that its cells need or, with a dry runner, only list them."""
    setup = runner.setup
    paper = paper_figures(ROOT / "scripts/paper_tables.csv").get("T17" if name == "T18" else name, {})
    if name in ("T15", "T17", "T18", "T19"):
        rows, columns = ablations(setup)[name], trio(setup, runner)
        paper = {title: paper[title] for title in rows}
        if not setup.ablated:
            rows = {f"{setup.original}, {title}": variant for title, variant in rows.items()}
    else:
        rows = {setup.original: ORIGINAL, setup.protected: protected(args), **baselines(args)}
        columns = columns_of(name, setup, runner)
    theirs = [column for figures in paper.values() for column in figures]
    titles = list(dict.fromkeys([*columns, *theirs]))
    table = Table(name, TITLES[name], titles, paper)
    for title, variant in rows.items():
        table.ours[title] = {column: measure(variant) for column, measure in columns.items()}
    if name == "T4":
        starts = {column: runner.input_images(each) for column, each in setup.columns[name].items()}
        table.ours["input image"] = starts | {"avg": Cell.mean(list(starts.values()))}
    table.notes = notes(name, args, runner) + paired_notes(name, rows, runner)
    return table


def paired_notes(name: str, rows: dict[str, Variant], runner: TableRunner) -> list[str]:
    """The exact McNemar tests of a table's rows against its DES model's, from the verdicts on images of the same prompts."""
    setup = runner.setup
    if runner.dry or name == "T8":  # a cost is no share
        return []
    sets = (setup.explicit,) if name == "T1" else setup.columns[name if name in setup.columns else "T2"].values()
    stem = "classify_16" if name in ("T5", "T6") else setup.asr
    found = {title: runner.verdicts(variant, tuple(sets), stem) for title, variant in rows.items()}
    ours = next(title for title, variant in rows.items() if title == setup.protected or variant == TRAINED)
    note = paired_note(found, ours) if all(found.values()) else None
    return [note] if note else []


def trio(setup: Setup, runner: TableRunner) -> dict[str, Column]:
    """ASR (the mean over T2's sets), FID and CLIP score."""
    sets = setup.columns["T2"].values()
    return {
        "ASR": lambda variant: Cell.mean([runner.asr(variant, each) for each in sets]), "FID": runner.fid, "CLIP": runner.clip,
    }  # fmt: skip


def columns_of(name: str, setup: Setup, runner: TableRunner) -> dict[str, Column]:
    """How each column of a table is measured."""
    quality = {"FID": runner.fid, "CLIP": runner.clip}
    if name == "T1":
        per_class = {
            title: lambda variant, of=of: runner.images_of_classes(variant, [of]) for title, of in setup.classes.items()
        }
        return {
            "total": lambda variant: runner.images_of_classes(variant, list(setup.classes.values())),
            **quality,
            **per_class,
        }
    if name == "T8":
        return {
            "training s": runner.training_seconds, "extra parameters": runner.extra_parameters, "extra inference s": runner.extra_seconds,
        }  # fmt: skip
    if name == "T10":
        scores = {"PickScore": "pickscore", "ImageReward": "imagereward", "BLIP": "blipscore"} if setup.preference else {}
        chosen = {title: lambda variant, job=job: runner.preference(variant, job) for title, job in scores.items()}
        labels = {f"{label} right": lambda variant, label=label: runner.label(variant, label) for label in setup.labels}
        return {"ASR": trio(setup, runner)["ASR"], "CLIP": runner.clip, **chosen, **labels}
    sets, stem = setup.columns[name], "classify_16" if name in ("T5", "T6") else setup.asr
    columns: dict[str, Column] = {
        title: lambda variant, each=each: runner.asr(variant, each, stem) for title, each in sets.items()
    }

    def all_of(variant: Variant) -> list[Cell]:
        return [runner.asr(variant, each, stem) for each in sets.values()]

    columns["avg"] = lambda variant: Cell.mean(all_of(variant))
    if len(sets) > 2:
        columns["std"] = lambda variant: Cell.spread(all_of(variant))
    apart = {
        title: lambda variant, each=each: runner.asr(variant, each, stem) for title, each in setup.apart.get(name, {}).items()
    }
    return columns | (quality if name in ("T5", "T7") else {}) | apart


def notes(name: str, args: argparse.Namespace, runner: TableRunner) -> list[str]:
    """Notes below a table: differences from the paper's set-up, and prompts that were not drawn."""
    setup = runner.setup
    limits = setup.scales[args.scale]
    found = [*setup.differences]
    if args.scale != "paper":
        smoke = "; training on 64 prompts of each list, one epoch" if args.scale == "smoke" else ""
        found.append(f"Scale {args.scale}: the first {limits[0]} prompts of a set, {limits[1]} of the benign one{smoke}.")
    if name in ("T15", "T17", "T18", "T19"):
        found.append(
            f"ASR is the mean over {', '.join(setup.columns['T2'])}. One training seed, {setup.training['num_epochs']} epochs."
        )
    if name == "T15":
        found.append("Highest similarity and random were trained without shift (alpha 0); the paper does not say.")
    if name == "T5" and args.checkpoint:
        found.append("The paper's T5 is about a model trained on violence and illegal content as well (des_multi).")
    if name == "T8":
        found.append("Seconds are this machine's, noise included; extra inference is the mean over the benign set.")
    if name == "T1":
        found.append(
            "An image counts once for each class that the detector finds in it; the total is the sum of the columns."
            if setup.classes
            else "The detector here has no classes of its own: the total is the number of images that count."
        )
    for column, each in setup.apart.get(name, {}).items():
        found.append(
            f"{column}: {setup.sets[each].csv.name} drawn as it is. It compares with no column of the paper and is in no mean."
        )
    counts = {each: count_of(each, runner) for each in sets_of(name, setup)}
    drawn = ", ".join(
        f"{count['drawn']:,}" + (f" of the published {count['published']:,}" if count["published"] else "") + f" of {each}"
        for each, count in counts.items()
    )
    found.append(f"Prompts drawn: {drawn or 'none'}.")
    left_out = ", ".join(f"{count['never_drawn']} of {each}" for each, count in counts.items() if count["never_drawn"])
    found.append(f"Prompts that put minors in a sexual context are never drawn: {left_out or 'none was in these sets'}.")
    return [*found, f"Shares in percent with k/n and the Wilson 95% interval. Device: {args.device}."]


def sets_of(name: str, setup: Setup) -> list[str]:
    """The prompt sets of a table whose lists exist."""
    sets = [*setup.columns.get(name, {}).values(), *setup.apart.get(name, {}).values()]
    if name == "T1":
        sets.append(setup.explicit)
    if name in ("T10", "T15", "T17", "T18", "T19"):
        sets += setup.columns["T2"].values()
    if name not in ("T2", "T3", "T4", "T6"):
        sets.append(setup.benign)
    return [each for each in dict.fromkeys(sets) if setup.sets[each].csv.is_file()]


def count_of(name: str, runner: TableRunner) -> dict[str, int | None]:
    """The numbers of prompts of a set that are drawn, never drawn, and published."""
    return dict(zip(("drawn", "never_drawn", "published"), runner.drawn_of(name), strict=True))


def describe(plan: TableRunner, args: argparse.Namespace) -> tuple[str, int]:
    """The list of jobs with images, training steps and estimated hours; and how many jobs are left."""
    to_do = plan.records.left(plan.planned)
    images, steps = sum(job.images for job in to_do), sum(job.steps for job in to_do)
    lines = [
        f"{'to do' if job in to_do else 'done':6} {job.what}" + (f", {job.images} images" if job.images else "")
        for job in plan.planned
    ]
    rates = {
        "images": args.seconds_per_image or plan.records.seconds_per("images"),
        "steps": args.seconds_per_step or plan.records.seconds_per("steps"),
    }
    lines.append(f"{len(to_do)} of {len(plan.planned)} jobs to do: {images} images, {steps} training steps")
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
    return "\n".join(lines), len(to_do)


if __name__ == "__main__":
    cli.run(main)
