"""FID or KID of generated images, LPIPS against the original model's images, or how well each image suits its prompt.

    python fid.py --gen_imgs_path results/des/pipeline/benign --coco_imgs_path coco_10k --variant paper clean-fid --device cuda:0
    python fid.py --gen_imgs_path results/des/pipeline/benign --coco_imgs_path coco_10k --save_stats coco_paper.npz
    python fid.py --gen_imgs_path results/none/pipeline/benign --ref_stats coco_paper.npz
    python fid.py --gen_imgs_path results/des/pipeline/benign --coco_imgs_path coco_10k --job kid
    python fid.py --gen_imgs_path results/des/pipeline/benign --original_imgs_path results/none/pipeline/benign --job lpips
    python fid.py --gen_imgs_path results/des/pipeline/benign --prompt_path datasets/coco_prompts.csv --job pickscore

lpips measures how much a protected model changes images: it compares the images of equal rows and seeds in two folders.
FID and KID have variants, whose values are not comparable: `paper` (text2image-benchmark: centre crop, PIL bicubic), `torch-fidelity` and
`clean-fid`, all on the Inception-v3 of 2015; or the pooled output of any image model (--feature_extractor DIR), for small images.
Every image file under a folder counts, subfolders included. Writes {gen_imgs_path}_{job}.txt and .json, and for lpips,
pickscore, blipscore and imagereward a .csv with one row per image.
"""

import argparse
from pathlib import Path
from typing import Any

from des.utils import choices, cli
from des.utils.files import result_paths, sha256_texts


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    main_group = parser.add_argument_group("what is computed")
    main_group.add_argument("--job", choices=("fid", "kid", "lpips", *choices.SCORER_MODELS), default="fid", help="the measure")
    main_group.add_argument("--gen_imgs_path", type=cli.folder, required=True, metavar="DIR", help="generated images")
    # fmt: off
    main_group.add_argument("--output_file", type=cli.output_file, metavar="F", help="text file for the result, with .json (and .csv) beside it (default: {gen_imgs_path}_{job}.txt)")
    cli.add_output_dir(main_group, "the folder that --gen_imgs_path is in")
    cli.add_expected(main_group)
    fid = parser.add_argument_group("fid and kid (the other jobs do not read --coco_imgs_path)")
    fid.add_argument("--coco_imgs_path", type=Path, metavar="DIR", help="reference images")
    fid.add_argument("--expected_ref", type=cli.positive_int, metavar="N", help="like --expected, for the reference images")
    fid.add_argument("--variant", nargs="+", choices=choices.FID_VARIANTS, metavar="V", help=f"{', '.join(choices.FID_VARIANTS)} (default: paper)")
    fid.add_argument(
        "--feature_extractor", metavar="M", help="Inception-v3 weights file (default: the published one is downloaded); or an "
        "image model, a folder or hub id, whose pooled output is the feature",
    )  # fmt: skip
    fid.add_argument("--save_stats", type=cli.output_file, metavar="NPZ", help="keep the reference images' mu and sigma in this file")
    fid.add_argument("--ref_stats", type=Path, metavar="NPZ", help="reference statistics in place of --coco_imgs_path: a file of --save_stats, or pytorch-fid's")
    kid = parser.add_argument_group("kid (it also takes the options of fid, except --save_stats and --ref_stats)")
    kid.add_argument("--kid_subsets", type=cli.positive_int, metavar="N", help="random subsets to average over (default: 100)")
    kid.add_argument(
        "--kid_subset_size", type=cli.positive_int, metavar="N",
        help="images per subset (default: 1000, or all of the smaller folder if it has fewer)",
    )  # fmt: skip
    kid.add_argument("--seed", type=cli.natural, metavar="S", help="seeds the choice of subsets (default: 0)")
    lpips = parser.add_argument_group("lpips")
    lpips.add_argument("--original_imgs_path", type=Path, metavar="DIR", help="the original model's images of the same rows")
    lpips.add_argument("--lpips_net", choices=choices.LPIPS_NETS, metavar="NET", help=f"backbone: {', '.join(choices.LPIPS_NETS)} (default: alex)")
    # fmt: on
    prompts = parser.add_argument_group("pickscore, blipscore, imagereward (fid does not read --prompt_path)")
    prompts.add_argument("--prompt_path", type=Path, metavar="CSV", help="the prompts of the generated images")
    cli.add_other_prompts(prompts)
    for option, what in (
        ("model", "the scorer's own model: PickScore's CLIP, BLIP's captioner, or ImageReward.pt"),
        ("processor", "processor or tokenizer of pickscore and imagereward"),
        ("clip_model", "CLIP that compares prompt and caption for blipscore"),
    ):
        prompts.add_argument(f"--{option}", metavar="M", help=f"{what} (default: as published)")
    performance = parser.add_argument_group("performance")
    cli.add_device(performance)
    cli.add_batches(performance, batch_size=64)
    cli.add_log_file(parser)
    args = parser.parse_args(argv)
    check(args, parser)
    if args.output_file and args.output_dir:
        parser.error("--output_file names the folder of the result itself; leave --output_dir out")
    output = args.output_file or (args.output_dir or args.gen_imgs_path.parent) / f"{args.gen_imgs_path.name}_{args.job}.txt"
    args.output_file = result_paths(output).text
    return cli.check_device(parser, args)


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse options that do not go together, and fill in the defaults that depend on the job."""
    of_images = ("expected_ref", "variant", "feature_extractor")
    known = {
        "fid": (*of_images, "save_stats", "ref_stats"),
        "kid": (*of_images, "kid_subsets", "kid_subset_size", "seed"),
        "lpips": ("original_imgs_path", "lpips_net"),
        **choices.SCORER_MODELS,
    }
    for option in dict.fromkeys(option for options in known.values() for option in options):
        if getattr(args, option) is not None and option not in known[args.job]:
            parser.error(f"--job {args.job} does not read --{option}")
    if args.other_prompts and args.job not in choices.SCORER_MODELS:
        parser.error(f"--job {args.job} does not read --other_prompts")
    if args.job == "lpips":
        if args.original_imgs_path is None:
            parser.error("--job lpips needs --original_imgs_path")
        args.lpips_net = args.lpips_net or "alex"
        return
    if args.job in choices.SCORER_MODELS:
        if args.prompt_path is None:
            parser.error(f"--job {args.job} needs --prompt_path")
        for option, default in choices.SCORER_MODELS[args.job].items():
            setattr(args, option, getattr(args, option) or default)
        return
    if args.job == "kid" and args.coco_imgs_path is None:
        parser.error("--job kid needs --coco_imgs_path")
    if (args.coco_imgs_path is None) == (args.ref_stats is None):
        parser.error("give the reference either as images (--coco_imgs_path) or as their statistics (--ref_stats)")
    for option in ("save_stats", "expected_ref"):
        if args.ref_stats and getattr(args, option):
            parser.error(f"--{option} needs reference images (--coco_imgs_path)")
    own = args.feature_extractor is not None and not Path(args.feature_extractor).is_file()
    if own and args.variant:
        parser.error(
            f"--variant is for Inception-v3 weights, and {args.feature_extractor} is an image model with its own preprocessing; leave --variant out"
        )
    args.variant = [choices.MODEL_VARIANT] if own else list(dict.fromkeys(args.variant or ["paper"]))
    if len(args.variant) > 1 and (args.save_stats or args.ref_stats):
        parser.error("--save_stats and --ref_stats hold the statistics of one variant; give one --variant")


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.data.image_folders import pair_with_prompts
from des.evaluation.batches import Reading
from des.evaluation.distances import Comparison, fid, kid
from des.evaluation.lpips import image_pairs, lpips
from des.evaluation.results import check_place
from des.evaluation.scored_images import Scoring, check_result_name, write_scores
from des.evaluation.text_image import JOBS, TITLES
from des.utils import cli, logs
from des.utils.locks import locked
from des.utils.provenance import provenance


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_files(args)
    logs.setup_logging(args.log_file)
    path = result_paths(args.output_file).json
    with locked(path.with_name(f".{path.stem}.lock"), path.stem):
        print((compare if args.job in ("fid", "kid") else score)(args, provenance(args)))


def check_files(args: argparse.Namespace) -> None:
    """Refuse output files that would overwrite an input, a folder, or another file of the image folder."""
    check_result_name(args.output_file)
    inputs = [args.prompt_path, args.ref_stats, args.log_file]
    inputs += [Path(source) for source in (args.feature_extractor, args.model, args.processor, args.clip_model) if source]
    cli.check_outputs([*result_paths(args.output_file), args.save_stats], inputs)
    check_place(args.output_dir, args.gen_imgs_path, [result_paths(args.output_file).json])


def compare(args: argparse.Namespace, made_by: dict[str, Any]) -> str:
    """Compute FID or KID, write the results and return their text."""
    how = Scoring(args.output_file, args.gen_imgs_path, Reading(args.batch_size, args.num_workers))
    images = Comparison(
        how, args.feature_extractor, args.variant, args.device, args.expected, args.coco_imgs_path, args.expected_ref
    )
    if args.job == "fid":
        return fid(images, args.ref_stats, args.save_stats, made_by)
    draws = {"subsets": args.kid_subsets, "subset_size": args.kid_subset_size, "seed": args.seed}
    return kid(images, draws, made_by)


def score(args: argparse.Namespace, made_by: dict[str, Any]) -> str:
    """Score each image by LPIPS or for its prompt, write the results and return their text."""
    title = TITLES.get(args.job, "LPIPS")
    how = Scoring(args.output_file, args.gen_imgs_path, Reading(args.batch_size, args.num_workers, title))
    if args.job == "lpips":
        images = image_pairs(args.gen_imgs_path, args.original_imgs_path, args.lpips_net, args.expected)
        values, facts = lpips(images, args.lpips_net, args.device, how)
        columns = {"lpips": values, "original_sha256": images["original_sha256"]}
        facts = facts | {"originals_sha256": sha256_texts(images["original_sha256"])}
        title = f"LPIPS ({args.lpips_net})"
    else:
        images = pair_with_prompts(args.gen_imgs_path, args.prompt_path, args.expected, other_prompts=args.other_prompts)
        sources = {name: getattr(args, name) for name in choices.SCORER_MODELS[args.job]}
        columns, facts = JOBS[args.job](images, sources, args.device, how)
    return write_scores(args.output_file, args.job, title, images, args.gen_imgs_path, columns, facts | {"made_by": made_by})


if __name__ == "__main__":
    cli.run(main)
