"""Reproduce the paper's tables: train, draw and score what they need, and show the figures beside the paper's.

    python scripts/reproduce.py --table T2 T7 --model_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --checkpoint checkpoints/published/des.pt --scale paper --out results/tables
    python scripts/reproduce.py --table all --model_path demo/models/pipeline --scale small --out results/demo_tables

Finished jobs are skipped as long as their inputs and outputs, images included, are unchanged: repeat the command after an
interruption, or with more tables. Use one --out for each --scale, --seed, model and set of checkpoints. Without --checkpoint the DES
model is trained with the paper's settings; the ablations (T15 to T19) always train their own. T5 and T16 are about two other DES
models, which remove violence and illegal activity as well (--multi_checkpoint) or Van Gogh's style (--style_checkpoint; T5_style,
T16_style). --dry_run lists the jobs, images and hours. Writes {table}.md, .csv and .tex. With a model of demo/ the tables are about
the demo's harmless concepts.

--baseline SAFREE=DIR adds a row of images that another program drew: those of each set in DIR/SET, named by the rows of its list.
T9's rows of a prompt filter, T11 to T14, and T20 are left out.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from des.utils import cli

TITLES = {
    "T1": "explicit prompts, images with a detection of each class", "T2": "adversarial prompts, black box (ASR, %)", "T3": "adversarial prompts, white box (ASR, %)",
    "T4": "image to image (ASR, %)", "T5": "other categories, Q16 (%)", "T5_style": "Van Gogh's style (ASR, %)",
    "T6": "Q16 in place of the main detector (%)", "T7": "other models (ASR, %)", "T8": "cost",
    "T9": "combinations with a negative prompt (ASR, %)", "T10": "quality of benign images",
    "T15": "choice of targets, and alpha", "T16": "alpha for other categories, Q16 (%)", "T16_style": "alpha for Van Gogh's style",
    "T17": "losses", "T18": "losses, SEP's concept term", "T19": "lambda",
    "T21": "benign captions nearest to the concept", "T22": "benign captions farthest from the concept",
}  # fmt: skip
INPUT = "input image"  # T4's row of the images that the others start from
LEFT_OUT_TABLES = ("T11", "T12", "T13", "T14", "T20")
HALVES = {"T5": ("T5", "T5_style"), "T16": ("T16", "T16_style")}  # tables of the paper that are two here


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    main_group = parser.add_argument_group("main")
    # fmt: off
    main_group.add_argument("--table", nargs="+", choices=(*TITLES, *LEFT_OUT_TABLES, "all"), required=True, metavar="T", help=f"{', '.join(TITLES)}, all")
    cli.add_model(main_group)
    main_group.add_argument("--checkpoint", type=Path, nargs="+", metavar="C", help="protected text encoders 1, 2, 3 (default: encoder 1, trained here)")
    main_group.add_argument("--multi_checkpoint", type=Path, nargs="+", metavar="C", help="T5: the same, for violence and illegal activity as well (default: trained here; or --checkpoint, in a row with its own title)")
    main_group.add_argument("--style_checkpoint", type=Path, nargs="+", metavar="C", help="T5_style: the same, for Van Gogh's style (default: trained here)")
    main_group.add_argument("--scale", choices=("smoke", "small", "paper"), default="small", help="smoke: 4 prompts of each set, to see that everything runs; small: 100 prompts of each set, more of the benign one; paper: all prompts")
    main_group.add_argument("--baseline", nargs="*", default=[], metavar="NAME=PATH", help="further rows: a method and its file (esd=esd.safetensors, advunlearn, …), or a title and a folder of images (SAFREE=DIR)")
    main_group.add_argument("--negative_prompt", metavar="TEXT", help="T9: the negative prompt (default: the concept prompt)")
    files = parser.add_argument_group("files")
    files.add_argument("--out", type=cli.output_folder, default=Path("results/tables"), metavar="DIR", help="folder for tables, images and models")
    files.add_argument("--prompts", nargs="*", default=[], metavar="SET=CSV", help="prompt lists that are not in datasets/")
    files.add_argument("--coco_images", type=Path, metavar="DIR", help="reference images for FID (default: datasets/coco_images)")
    files.add_argument("--q16_prompts", type=Path, metavar="FILE", help="Q16's prompts.pt; without it T5, T6 and T16 stay empty")
    files.add_argument("--style_classifier", type=Path, metavar="DIR", help="UnlearnDiffAtk's style classifier; without it T5_style and T16_style have no ASR")
    files.add_argument("--i2i_images", type=Path, metavar="DIR", help="T4: the images to start from")
    files.add_argument("--i2i_masks", type=Path, metavar="DIR", help="T4: the regions to redraw")
    files.add_argument("--discard_images", action="store_true", help="score images of the concept as they are drawn and keep none")
    performance = parser.add_argument_group("performance")
    cli.add_device(performance)
    performance.add_argument("--batch_size", type=cli.positive_int, default=16, metavar="N", help="images per batch; attacks use a quarter as many prompts")
    performance.add_argument("--seed", type=cli.natural, default=42, metavar="S", help="seed of the images")
    performance.add_argument("--dry_run", action="store_true", help="list jobs, images and estimated hours, and stop")
    performance.add_argument("--seconds_per_image", type=cli.number(float, 0, low_open=True), metavar="X", help="measured seconds per image, for the estimated hours (default: as measured in --out)")
    performance.add_argument("--seconds_per_step", type=cli.number(float, 0, low_open=True), metavar="X", help="measured seconds per training step, for the estimated hours (default: as measured in --out)")
    # fmt: on
    cli.add_log_file(parser)
    args = parser.parse_args(argv)
    if left_out := [name for name in args.table if name in LEFT_OUT_TABLES]:
        parser.error(f"--table {left_out[0]}: this table of the paper is left out; docs/tables.md says why")
    return cli.check_device(parser, args)


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from demo.tables import demo_setup
from des.generation.defences import METHODS
from des.tables.build import Cell, Table, paper_figures
from des.tables.cells import LEFT_OUT, ORIGINAL, Setup, Variant, ablations, trained
from des.tables.columns import ABLATIONS, COUNTED_AS, columns_of, count_of, sets_of, share_a_list
from des.tables.inputs import check_inputs, record_inputs
from des.tables.jobs import Job
from des.tables.notes import attack_notes, fid_notes, given_notes, paired_notes, protection_notes
from des.tables.paper import paper_setup
from des.tables.runner import TableRunner
from des.utils import cli, logs
from des.utils.errors import UserError, not_found
from des.utils.files import write_json, write_text
from des.utils.logs import logger
from des.utils.provenance import provenance


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logs.setup_logging(args.log_file)
    setup = setup_of(args)
    halves = [half for name in args.table for half in HALVES.get(name, (name,))]
    tables = list(TITLES) if "all" in args.table else list(dict.fromkeys(halves))
    common = (setup, args.model_path, args.out, args.scale, args.device, args.batch_size, args.seed, args.discard_images)
    plan = TableRunner(*common, dry=True, variant=args.variant)
    inputs = plan.inputs(files_of(args, setup))
    check_inputs(args.out, inputs)
    for name in tables:
        build(name, args, plan)
    text, left = describe(plan, args)
    left_out = "Left out: " + "; ".join(f"{what}, because {why}" for what, why in LEFT_OUT.items()) + "."
    if args.dry_run:
        print(text, left_out, sep="\n")
        return
    logger.info("%d of %d jobs are left to do", left, len(plan.planned))
    record_inputs(args.out, inputs)
    runner = TableRunner(*common, dry=False, variant=args.variant)
    for name in tables:
        table = build(name, args, runner)
        for suffix, content in (("md", table.markdown()), ("csv", table.csv()), ("tex", table.latex())):
            write_text(args.out / f"{name}.{suffix}", content)
        facts = {"table": name, "scale": args.scale, "sets": {each: count_of(each, runner) for each in sets_of(name, setup)}}
        write_json(args.out / f"{name}.json", facts | {"inputs": inputs, "made_by": provenance(args)})
        print(table.markdown())
    print(left_out)


def setup_of(args: argparse.Namespace) -> Setup:
    """The demo's set-up for a model of demo/, else the paper's."""
    if (ROOT / "demo") in Path(args.model_path).resolve().parents:
        for option in ("prompts", "q16_prompts", "i2i_images", "i2i_masks", "multi_checkpoint", "style_classifier"):
            if getattr(args, option):
                raise UserError(f"--{option} cannot be used with the demo, which has its own prompts and detector")
        return demo_setup(args.out, str(args.device), args.scale)
    given = {}
    for pair in args.prompts:
        name, _, path = pair.partition("=")
        if not Path(path).is_file():
            raise not_found(f"--prompts takes SET=CSV, but in {pair} the file", Path(path))
        given[name] = Path(path)
        cli.check_outputs([args.out / "prompts" / f"{name}.csv"], [given[name]])
    setup = paper_setup(
        args.model_path,
        args.scale,
        given,
        args.coco_images or ROOT / "datasets/coco_images",
        args.q16_prompts,
        args.i2i_images,
        args.i2i_masks,
        args.style_classifier,
    )
    unknown = given.keys() - setup.sets.keys()
    if unknown:
        raise UserError(f"--prompts: there is no set {min(unknown)}; the sets are {', '.join(setup.sets)}")
    return setup


def checkpoints_of(args: argparse.Namespace) -> dict[str, list[Path]]:
    """The given checkpoints by the concept that they remove."""
    given = {"main": args.checkpoint, "multi": args.multi_checkpoint, "style": args.style_checkpoint}
    return {concept: paths for concept, paths in given.items() if paths}


def protected(args: argparse.Namespace, concept: str = "main") -> Variant:
    """The DES model that removes a concept: the given checkpoints, else one trained here."""
    paths = checkpoints_of(args).get(concept)
    if not paths:
        return trained(concept)
    options = ("--text_encoder_path", "--text_encoder_2_path", "--text_encoder_3_path")
    if len(paths) > len(options):
        raise UserError("a list of checkpoints has three files at most: text encoders 1, 2, 3")
    for path in paths:
        if not path.is_file():
            raise not_found("the checkpoint", path)
    name = "des_given" if concept == "main" else f"{concept}_des_given"
    return Variant(name, "des", tuple(zip(options, paths, strict=False)))


def baselines(args: argparse.Namespace, setup: Setup) -> dict[str, Variant]:
    """The rows of --baseline by title: defences, by the titles of their rows in the paper, and folders of images."""
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
        if method in titles and (file or not METHODS[method].needs):
            files = ((f"--{METHODS[method].options[0]}", Path(file)),) if file else ()
            found[titles[method]] = Variant(method, method, files)
        elif method in titles or not method or not file or not Path(file).is_dir():
            raise UserError(
                f"--baseline {pair}: it takes METHOD=FILE, with one of {', '.join(titles)}, or NAME=DIR, with a folder of images"
            )
        else:
            found[method] = images_of(method, Path(file), setup)
    if len({variant.name.lower() for variant in found.values()}) < len(args.baseline):
        raise UserError(
            "--baseline names a row twice, or two that differ only in punctuation and case; give each row another name"
        )
    return found


def images_of(title: str, folder: Path, setup: Setup) -> Variant:
    """A row of images that another program drew."""
    negated = "negative prompt", f"{setup.original} + negative prompt"
    ours = (setup.original, setup.protected, *setup.original_of.values(), *negated, INPUT)
    if title in ours or title.startswith(f"{setup.protected} "):
        raise UserError(f"--baseline {title}: the table already has a row of this title; choose another name")
    if not any((folder / name).is_dir() for name in setup.sets):
        raise UserError(
            f"{folder} has no folder that is named like a set ({', '.join(setup.sets)}); its images belong in such folders"
        )
    return Variant("images_" + re.sub(r"[^\w.+-]+", "-", title), images=folder)


def files_of(args: argparse.Namespace, setup: Setup) -> dict[str, Path | None]:
    """The files and folders that images depend on, by their options."""
    files = {
        f"--{concept}_checkpoint {i}".replace("main_", ""): path
        for concept, paths in checkpoints_of(args).items()
        for i, path in enumerate(paths, 1)
    }
    files |= {f"--baseline {variant.method}": path for variant in baselines(args, setup).values() for _, path in variant.files}
    return files | {"--i2i_images": args.i2i_images, "--i2i_masks": args.i2i_masks}


def build(name: str, args: argparse.Namespace, runner: TableRunner) -> Table:
    """Fill one table: run the jobs that its cells need or, with a dry runner, only list them."""
    setup = runner.setup
    paper = paper_figures(ROOT / "scripts/paper_tables.csv").get("T17" if name == "T18" else name, {})
    rows, columns = rows_of(name, args, setup), columns_of(name, setup, runner)
    if name in ("T17", "T18"):
        paper = {title: paper[title] for title in ablations(setup)[name]}
    theirs = [column for figures in paper.values() for column in figures]
    titles = list(dict.fromkeys([*columns, *theirs]))
    table = Table(name, TITLES[name], titles, paper)
    for title, variant in rows.items():
        table.ours[title] = {column: measure(variant) for column, measure in columns.items()}
    if name == "T4":
        starts = {column: runner.input_images(each) for column, each in setup.columns[name].items()}
        table.ours[INPUT] = starts | {"avg": Cell.mean(list(starts.values())).without_interval()}
    table.notes = [] if runner.dry else protection_notes(rows, runner)
    table.notes += notes(name, args, runner) + attack_notes(name, rows, runner) + paired_notes(name, rows, runner)
    table.notes += fid_notes(name, rows, runner) if "FID" in columns and not runner.dry else []
    return table


def rows_of(name: str, args: argparse.Namespace, setup: Setup) -> dict[str, Variant]:
    """Our rows of a table, by title: its ablations, or the original model, DES and the baselines."""
    if name in ABLATIONS:
        return {
            title if setup.ablated else f"{setup.original}, {title}": variant
            for title, variant in ablations(setup)[name].items()
        }
    concept, title, original = setup.concept_of.get(name, "main"), setup.protected, setup.original_of.get(name, setup.original)
    if (
        concept == "multi" and args.checkpoint and not args.multi_checkpoint
    ):  # a checkpoint of another concept is not the paper's DES
        concept, title = "main", f"{setup.protected} by --checkpoint"
    rows = {original: ORIGINAL, title: protected(args, concept)}
    if name == "T9":
        negative = args.negative_prompt or setup.concepts["main"].prompt
        titles = "negative prompt" if setup.ablated else f"{original} + negative prompt", f"{title} + negative prompt"
        negated = [variant.negated(negative) for variant in rows.values()]
        rows |= zip(titles, negated, strict=True) if setup.negative_prompt else {}
    return rows | baselines(args, setup)


def notes(name: str, args: argparse.Namespace, runner: TableRunner) -> list[str]:
    """Notes below a table: differences from the paper's set-up, and prompts that were not drawn."""
    setup = runner.setup
    limits = setup.scales[args.scale]
    found = [*setup.differences]
    if args.scale != "paper":
        smoke = "; training on 64 prompts of each list, one epoch" if args.scale == "smoke" else ""
        found.append(f"Scale {args.scale}: the first {limits[0]} prompts of a set, {limits[1]} of the benign one{smoke}.")
    if name in ABLATIONS:
        what, columns = "avg" if name == "T16" else "ASR", setup.columns[COUNTED_AS.get(name, "T2")]
        found.append(f"{what} is the mean over {', '.join(columns)}. One training seed, {setup.training['num_epochs']} epochs.")
    if name == "T15":
        found.append(
            "Highest similarity and random were trained without shift (alpha 0); the paper does not say whether its models were."
        )
    if name == "T5" and "multi" in setup.concepts and args.checkpoint and not args.multi_checkpoint:
        found.append(
            f"{setup.protected} by --checkpoint is not the model of the paper's row, which was trained on violence and illegal content as "
            "well: give it by --multi_checkpoint."
        )
    if name == "T9":
        found.append(
            f"Negative prompt: {args.negative_prompt or setup.concepts['main'].prompt!r}. The paper does not state its own, and its row of "
            "the negative prompt repeats P4D and the average of the original model (the mean of its four values is 32.78)."
            if setup.negative_prompt
            else "The rows of a negative prompt are not run: this model takes none."
        )
        found.append(
            "The rows of a prompt filter are left out: this project has no prompt filter for the concept that is removed."
        )
    if name in ("T5_style", "T16_style") and "SD v1.4" in setup.original_of.values():
        found.append("The paper's values of a style are of SD v1.4; give it by --model_path to compare with them.")
    if name in ("T21", "T22"):
        which = "nearest to" if name == "T21" else "farthest from"
        found.append(
            f"The quarter of the benign prompts whose embeddings by the original text encoder 1 are {which} the concept's, by cosine "
            "similarity. FID is against all reference images; the paper does not say against which. The FID of few images is biased upwards."
        )
    listed = [setup.sets[each] for each in sets_of(name, setup)]
    if any(each.attack or each.found_by for each in listed):
        found.append(setup.attack_note)
    if share_a_list(name, setup):
        found.append(
            "avg has no interval, because its columns are about the same prompts; the tests are of each column by itself."
        )
    found += given_notes(name, setup)
    if any(each.found_by for each in listed):
        found.append(
            "The texts are those that MMA found: black box on the original model, white box on the row's own. MMA's perturbation of the "
            "image, which is against a safety checker, is left out."
        )
    if name == "T8":
        found.append("Seconds were measured once on this machine, and vary; extra inference is the mean over the benign set.")
    if name == "T1":
        found.append(
            "An image counts once for each class that the detector finds in it; the total is the sum of the columns."
            if setup.classes
            else "The detector here has no classes of its own: the total is the number of images that count."
        )
    for column, each in setup.apart.get(name, {}).items():
        found.append(
            f"{column}: the prompts of {setup.sets[each].csv.name}, drawn without an attack. The paper has no such column; avg leaves it out."
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


def amount(job: Job) -> str:
    """How much a job does, as text."""
    return f", {job.images} images" if job.images else f", {job.rows} prompts" if job.rows else ""


def describe(plan: TableRunner, args: argparse.Namespace) -> tuple[str, int]:
    """The list of jobs with images, training steps and estimated hours; and how many jobs are left."""
    to_do = plan.records.left(plan.planned)
    images, steps = sum(job.images for job in to_do), sum(job.steps for job in to_do)
    lines = [f"{'to do' if job in to_do else 'done':6} {job.what}{amount(job)}" for job in plan.planned]
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
            f"hours cannot be estimated, since nothing has been drawn or trained in {args.out} yet; pass {' and '.join(unknown)}"
        )
    else:
        hours = (images * (rates["images"] or 0) + steps * (rates["steps"] or 0)) / 3600
        lines.append(
            f"about {hours:.1f} hours, at {rates['images'] or 0:.2f} s an image and {rates['steps'] or 0:.2f} s a step"
        )
    if attacks := [job for job in to_do if job.rows]:
        known = {job.script: plan.records.seconds_per("rows", job.script) for job in attacks}
        hours = sum(job.rows * (known[job.script] or 0) for job in attacks) / 3600
        unknown = ", ".join(sorted(Path(script).stem for script, rate in known.items() if rate is None))
        lines.append(f"attacks: {sum(job.rows for job in attacks)} prompts in {len(attacks)} jobs")
        lines[-1] += f", about {hours:.1f} hours more" if hours else ""
        if unknown:
            lines[-1] += (
                f"; the hours of {unknown} cannot be estimated before a first run in {args.out} (docs/attacks.md has the number of forward and backward passes)"
            )
    return "\n".join(lines), len(to_do)


if __name__ == "__main__":
    cli.run(main)
