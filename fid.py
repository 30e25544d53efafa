"""FID or KID of generated images, LPIPS against the original model's images, or how well each image suits its prompt.

    python fid.py --gen_imgs_path results/des/pipeline/benign --coco_imgs_path coco_10k --variant paper clean-fid --device cuda:0
    python fid.py --gen_imgs_path results/des/pipeline/benign --coco_imgs_path coco_10k --save_stats coco_paper.npz
    python fid.py --gen_imgs_path results/none/pipeline/benign --ref_stats coco_paper.npz
    python fid.py --gen_imgs_path results/des/pipeline/benign --coco_imgs_path coco_10k --job kid
    python fid.py --gen_imgs_path results/des/pipeline/benign --original_imgs_path results/none/pipeline/benign --job lpips
    python fid.py --gen_imgs_path results/des/pipeline/benign --prompt_path datasets/coco_prompts.csv --job pickscore

lpips measures how much a protected model changes images: it compares the images of equal rows and seeds in two folders.
FID and KID have variants, whose numbers do not compare: `paper` (text2image-benchmark: centre crop, PIL bicubic), `torch-fidelity` and
`clean-fid`, all on the Inception-v3 of 2015; or the pooled output of any image model (--feature_extractor DIR), for small images.
Every image file under a folder counts, subfolders included. Writes {gen_imgs_path}_{job}.txt and .json, and for lpips,
pickscore, blipscore and imagereward a .csv with one row an image.
"""

import argparse
from pathlib import Path
from typing import Any

from des.utils import choices, cli
from des.utils.files import result_paths, sha256_file, sha256_texts, write_json, write_text

KID = ("kid_subsets", "kid_subset_size", "seed")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
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
    kid = parser.add_argument_group("kid (with the options of fid but for statistics)")
    kid.add_argument("--kid_subsets", type=cli.positive_int, metavar="N", help="random subsets to average over (default: 100)")
    kid.add_argument(
        "--kid_subset_size", type=cli.positive_int, metavar="N",
        help="images a subset (default: 1000, or all of the smaller folder where it has fewer)",
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
        ("processor", "what reads the prompts for pickscore and imagereward"),
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
    """Refuse options that do not go together, and fill in the defaults that hang on the job."""
    of_images = ("expected_ref", "variant", "feature_extractor")
    known = {
        "fid": (*of_images, "save_stats", "ref_stats"),
        "kid": (*of_images, *KID),
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
            f"--variant is for Inception-v3 weights, and {args.feature_extractor} is no file: a model reads images its own way"
        )
    args.variant = [choices.MODEL_VARIANT] if own else list(dict.fromkeys(args.variant or ["paper"]))
    if len(args.variant) > 1 and (args.save_stats or args.ref_stats):
        parser.error("statistics are those of one --variant")


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.data.claims import check_complete
from des.data.image_folders import image_hashes, pair_with_prompts, pairing_notes, without_never_drawn
from des.evaluation.batches import Reading
from des.evaluation.fid_features import Extractor, extract, extractor_hashes, load_extractor
from des.evaluation.frechet import Gaussian, load_statistics, save_statistics
from des.evaluation.kid import kernel_distance
from des.evaluation.lpips import image_pairs, lpips
from des.evaluation.results import check_place
from des.evaluation.scored_images import Scoring, check_result_name, write_scores
from des.evaluation.text_image import JOBS, TITLES
from des.utils import cli, logs
from des.utils.errors import UserError
from des.utils.locks import locked
from des.utils.provenance import provenance
from des.utils.resume import Findings


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_files(args)
    logs.setup_logging(args.log_file)
    path = result_paths(args.output_file).json
    with locked(path.with_name(f".{path.stem}.lock"), path.stem):
        print({"fid": score_fid, "kid": score_kid, "lpips": score_lpips}.get(args.job, score_prompts)(args))


def check_files(args: argparse.Namespace) -> None:
    """Refuse output files that would overwrite an input, a folder, or another file of the image folder."""
    check_result_name(args.output_file)
    inputs = [args.prompt_path, args.ref_stats, args.log_file]
    inputs += [Path(source) for source in (args.feature_extractor, args.model, args.processor, args.clip_model) if source]
    cli.check_outputs([*result_paths(args.output_file), args.save_stats], inputs)
    check_place(args.output_dir, args.gen_imgs_path, [result_paths(args.output_file).json])


def score_prompts(args: argparse.Namespace) -> str:
    """Score how well each image matches its prompt, write the results and return their text."""
    images = pair_with_prompts(args.gen_imgs_path, args.prompt_path, args.expected, other_prompts=args.other_prompts)
    sources = {name: getattr(args, name) for name in choices.SCORER_MODELS[args.job]}
    columns, hashes = JOBS[args.job](images, sources, args.device, scoring(args, TITLES[args.job]))
    facts = hashes | {"made_by": provenance(args)}
    return write_scores(args.output_file, args.job, TITLES[args.job], images, args.gen_imgs_path, columns, facts)


def score_lpips(args: argparse.Namespace) -> str:
    """Compare each image with the original model's, write the results and return their text."""
    pairs = image_pairs(args.gen_imgs_path, args.original_imgs_path, args.lpips_net, args.expected)
    values, hashes = lpips(pairs, args.lpips_net, args.device, scoring(args, "LPIPS"))
    columns = {"lpips": values, "original_sha256": pairs["original_sha256"]}
    facts = hashes | {"originals_sha256": sha256_texts(pairs["original_sha256"]), "made_by": provenance(args)}
    return write_scores(args.output_file, "lpips", f"LPIPS ({args.lpips_net})", pairs, args.gen_imgs_path, columns, facts)


def scoring(args: argparse.Namespace, title: str) -> Scoring:
    """The paths of a score's images and results, and how the images are read."""
    return Scoring(args.output_file, args.gen_imgs_path, Reading(args.batch_size, args.num_workers, title))


def score_kid(args: argparse.Namespace) -> str:
    """Compute every variant's KID, write the results and return their text."""
    generated, never = at_least_two(args.gen_imgs_path, args.expected, "generated")
    reference, _ = at_least_two(args.coco_imgs_path, args.expected_ref, "reference")
    extractor = load_extractor(args.feature_extractor, args.variant, args.device)
    hashes = extractor_hashes(extractor, args.feature_extractor)
    paths = result_paths(args.output_file)
    findings = Findings(paths.json, sha256_texts([*hashes.values(), *args.variant]))
    features = [
        extract(extractor, digests, Reading(args.batch_size, args.num_workers, name), findings)
        for name, digests in (("generated", generated), ("reference", reference))
    ]
    smaller = min(len(generated), len(reference))
    draws = {
        "subsets": args.kid_subsets or 100,
        "subset_size": args.kid_subset_size or min(1000, smaller),
        "seed": args.seed or 0,
    }
    kids = {name: kernel_distance(x, y, **draws) for name, x, y in zip(args.variant, *features, strict=True)}
    facts = {"kid": kids[args.variant[0]][0], "variants": {name: mean for name, (mean, _) in kids.items()}}
    facts |= {
        "std": {name: std for name, (_, std) in kids.items()},
        **draws,
        **facts_of(args, generated, reference, never),
        **hashes,
    }
    facts["reference_sha256"] = sha256_texts(sorted(reference.values()))
    about = (
        f"{len(generated)} generated, {len(reference)} reference images, {draws['subsets']} subsets of {draws['subset_size']}"
    )
    about = ", ".join([about, *pairing_notes(facts)])
    text = "\n".join(f"KID ({name}): {mean:.6f}, std over subsets {std:.6f} ({about})" for name, (mean, std) in kids.items())
    write_json(paths.json, facts | {"made_by": provenance(args)})
    write_text(paths.text, text + "\n")
    findings.finish()
    return text


def facts_of(
    args: argparse.Namespace, generated: dict[Path, str], reference: dict[Path, str], never: list[Path]
) -> dict[str, Any]:
    """The facts that the results of FID and KID share: how many images were compared, and the hash of the generated ones."""
    facts = {
        "generated": len(generated),
        "reference": len(reference),
        "generated_sha256": sha256_texts(sorted(generated.values())),
    }
    return facts | ({"never_drawn": [str(path.relative_to(args.gen_imgs_path)) for path in never]} if never else {})


def score_fid(args: argparse.Namespace) -> str:
    """Compute every variant's FID, write the results and return their text."""
    generated, never = at_least_two(args.gen_imgs_path, args.expected, "generated")
    reference = at_least_two(args.coco_imgs_path, args.expected_ref, "reference")[0] if args.coco_imgs_path else {}
    stored, recorded = load_statistics(args.ref_stats) if args.ref_stats else (None, {})
    extractor = load_extractor(args.feature_extractor, args.variant, args.device)
    hashes = extractor_hashes(extractor, args.feature_extractor)
    check_statistics(args, recorded, hashes)
    paths = result_paths(args.output_file)
    findings = Findings(paths.json, sha256_texts([*hashes.values(), *args.variant]))
    references = [stored] if stored else gaussians(extractor, reference, args, "reference", findings)
    found = gaussians(extractor, generated, args, "generated", findings)
    width, stored_width = len(found[0].mean), len(references[0].mean)
    if width != stored_width:
        raise UserError(f"{args.ref_stats} holds {stored_width} features, and the feature extractor makes {width}")

    fids = {name: x.distance(y) for name, x, y in zip(args.variant, found, references, strict=True)}
    shared = facts_of(args, generated, reference, never) | ({"reference": recorded.get("n")} if stored else {})
    facts = {"fid": fids[args.variant[0]], "variants": fids, "features": width, **shared, **hashes}
    facts["reference_sha256"] = recorded.get("images_sha256") if stored else sha256_texts(sorted(reference.values()))
    if stored:
        facts["ref_stats"] = {"sha256": sha256_file(args.ref_stats), "recorded": recorded}
    about = f"{len(generated)} generated, {describe_reference(args, facts['reference'], recorded)}, {width} features"
    if args.variant == [choices.MODEL_VARIANT]:
        about += f" of {args.feature_extractor}"
    about = ", ".join([about, *pairing_notes(facts)])
    text = "\n".join(f"FID ({name}): {fid:.4f} ({about})" for name, fid in fids.items())
    smaller = min(len(generated), facts["reference"] or len(generated))
    if smaller < width:
        facts["caution"] = (
            f"{smaller} images are fewer than the {width} features: the value is mostly the bias of so few images, so compare it "
            "only with values for as many images and the same reference, or use --job kid, which has no such bias"
        )
        text += f"\n{facts['caution']}"
    if args.save_stats:
        kept = {"n": len(reference), "variant": args.variant[0], **hashes}
        kept["images_sha256"] = sha256_texts(sorted(reference.values()))
        save_statistics(args.save_stats, references[0], kept)
    write_json(paths.json, facts | {"made_by": provenance(args)})
    write_text(paths.text, text + "\n")
    findings.finish()
    return text


def gaussians(
    extractor: Extractor, digests: dict[Path, str], args: argparse.Namespace, name: str, findings: Findings
) -> list[Gaussian]:
    """The Gaussian of the images' features for every variant."""
    features = extract(extractor, digests, Reading(args.batch_size, args.num_workers, name), findings)
    return [Gaussian.of_features(each) for each in features]


def describe_reference(args: argparse.Namespace, count: int | None, recorded: dict[str, Any]) -> str:
    """The reference in words, and which of its variant and network could not be checked."""
    if not args.ref_stats:
        return f"{count} reference images"
    images = "an unrecorded number of" if count is None else str(count)
    checked = {"variant": "variant", "network": "extractor_sha256"}
    if args.variant == [choices.MODEL_VARIANT] and "extractor_sha256" in recorded:
        checked["preprocessing"] = "configuration_sha256"
    unknown = [what for what, key in checked.items() if key not in recorded]
    unchecked = f" (its {' and '.join(unknown)} not recorded)" if unknown else ""
    return f"statistics of {images} reference images from {args.ref_stats.name}{unchecked}"


def at_least_two(folder: Path, expected: int | None, name: str) -> tuple[dict[Path, str], list[Path]]:
    """The images of a folder with their sha256, and the images left out because their prompts are never drawn.

    Raises UserError if their number is not the expected one or that of the folder's run, or if there is only one image, which has no
    covariance.
    """
    digests = image_hashes(folder, expected)
    if expected is None:
        check_complete(folder, "--expected" if name == "generated" else "--expected_ref")
    digests, never = without_never_drawn(digests)
    if len(digests) < 2:
        raise UserError(f"FID and KID need at least two {name} images; {folder} holds one")
    return digests, never


def check_statistics(args: argparse.Namespace, recorded: dict[str, Any], hashes: dict[str, str]) -> None:
    """Raise UserError for statistics of another variant, network or preprocessing, or of fewer than two images."""
    if recorded.get("variant", args.variant[0]) != args.variant[0]:
        raise UserError(
            f"{args.ref_stats} holds statistics of variant {recorded['variant']}, not of {args.variant[0]}; make it again with --save_stats"
        )
    for name, digest in hashes.items():
        if recorded.get(name, digest) != digest:
            what = "feature extractor" if name == "extractor_sha256" else "configuration of the feature extractor or image size"
            raise UserError(
                f"{args.ref_stats} was made with another {what} (sha256 {recorded[name]}); make it again with --save_stats"
            )
    if recorded.get("n", 2) < 2:
        raise UserError(f"{args.ref_stats} holds statistics of {recorded['n']} images, and a covariance needs two")


if __name__ == "__main__":
    cli.run(main)
