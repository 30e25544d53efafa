"""FID and KID: distances between generated images and reference images, by the features of one network."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from des.data.claims import check_complete
from des.data.image_folders import image_hashes, pairing_notes, without_never_drawn
from des.evaluation.fid_features import extract, extractor_hashes, load_extractor
from des.evaluation.frechet import Gaussian, load_statistics, save_statistics
from des.evaluation.kid import kernel_distance
from des.evaluation.scored_images import Scoring
from des.utils.choices import MODEL_VARIANT
from des.utils.errors import UserError
from des.utils.files import result_paths, sha256_file, sha256_texts, write_json, write_text
from des.utils.resume import Findings

import torch
from torch import Tensor


class Comparison:
    """Generated images, reference images, and the network whose features of both are compared.

    `variants` are preprocessing variants of Inception-v3 (the file `network`, or None for the published weights), or
    `[MODEL_VARIANT]` for an image model (the folder or hub id `network`). The `reference` images may be missing for `fid` with
    stored statistics. Raises UserError for a number of images that is not the expected one or the run's, or is below two.
    """

    def __init__(
        self,
        how: Scoring,
        network: str | None,
        variants: list[str],
        device: torch.device,
        expected: int | None = None,
        reference: Path | None = None,
        expected_reference: int | None = None,
    ):
        self.how, self.network, self.variants = how, network, variants
        self.generated, never = _at_least_two(how.folder, expected, "generated", "--expected")
        self.reference = _at_least_two(reference, expected_reference, "reference", "--expected_ref")[0] if reference else {}
        self.extractor = load_extractor(network, variants, device)
        self.hashes = extractor_hashes(self.extractor, network)
        self.findings = Findings(result_paths(how.output).json, sha256_texts([*self.hashes.values(), *variants]))
        self.facts: dict[str, Any] = {
            "generated": len(self.generated),
            "reference": len(self.reference),
            "generated_sha256": _sha256_of(self.generated),
            "reference_sha256": _sha256_of(self.reference),
            **self.hashes,
        }
        if never:
            self.facts["never_drawn"] = [str(path.relative_to(how.folder)) for path in never]

    def features(self, digests: dict[Path, str], name: str) -> list[Tensor]:
        """The features [images, d] of one set of images for every variant."""
        return extract(self.extractor, digests, replace(self.how.reading, desc=name), self.findings)

    def write(self, job: str, values: dict[str, float], shown: list[str], about: str, facts: dict[str, Any]) -> str:
        """Write the result of a job: a value per variant, the same value as `shown` in the text, and `facts`. Returns the text."""
        about = ", ".join([about, *pairing_notes(self.facts)])
        lines = [f"{job.upper()} ({name}): {value} ({about})" for name, value in zip(self.variants, shown, strict=True)]
        lines += [facts["caution"]] if "caution" in facts else []
        paths = result_paths(self.how.output)
        write_json(paths.json, {job: values[self.variants[0]], "variants": values} | self.facts | facts)
        write_text(paths.text, "\n".join(lines) + "\n")
        self.findings.finish()
        return "\n".join(lines)


def fid(images: Comparison, ref_stats: Path | None, save_stats: Path | None, made_by: dict[str, Any]) -> str:
    """Compute every variant's FID, write the results and return their text.

    `ref_stats` holds the statistics of the reference images in place of the images; `save_stats` is a file to write them to.
    Raises UserError for statistics of another variant, network, preprocessing or width, or of fewer than two images.
    """
    facts: dict[str, Any] = {}
    if ref_stats:
        stored, recorded = load_statistics(ref_stats)
        _check_statistics(ref_stats, recorded, images)
        references, described = [stored], _described(ref_stats, recorded, images.variants)
        facts = {"reference": recorded.get("n"), "reference_sha256": recorded.get("images_sha256")}
        facts["ref_stats"] = {"sha256": sha256_file(ref_stats), "recorded": recorded}
    else:
        references = [Gaussian.of_features(each) for each in images.features(images.reference, "reference")]
        described = f"{len(images.reference)} reference images"
    found = [Gaussian.of_features(each) for each in images.features(images.generated, "generated")]
    width, stored_width = len(found[0].mean), len(references[0].mean)
    if width != stored_width:
        raise UserError(f"{ref_stats} holds {stored_width} features, and the feature extractor makes {width}")
    values = {name: x.distance(y) for name, x, y in zip(images.variants, found, references, strict=True)}
    if save_stats:
        kept = {"n": len(images.reference), "variant": images.variants[0], "images_sha256": images.facts["reference_sha256"]}
        save_statistics(save_stats, references[0], kept | images.hashes)
    about = f"{len(images.generated)} generated, {described}, {width} features"
    about += f" of {images.network}" if images.variants == [MODEL_VARIANT] else ""
    shown = [f"{value:.4f}" for value in values.values()]
    smaller = min(len(images.generated), facts.get("reference", len(images.reference)) or len(images.generated))
    if smaller < width:
        facts["caution"] = (
            f"{smaller} images are fewer than the {width} features, so most of this value is bias. Compare it only with FIDs of "
            "the same number of images and the same reference, or use --job kid, which is unbiased"
        )
    return images.write("fid", values, shown, about, {"features": width, **facts, "made_by": made_by})


def kid(images: Comparison, draws: dict[str, int | None], made_by: dict[str, Any]) -> str:
    """Compute every variant's KID, write the results and return their text; `draws` are `kernel_distance`'s, None for a default."""
    generated, reference = (images.features(getattr(images, name), name) for name in ("generated", "reference"))
    defaults = {"subsets": 100, "subset_size": min(1000, len(images.generated), len(images.reference)), "seed": 0}
    draws = {name: default if draws[name] is None else draws[name] for name, default in defaults.items()}
    pairs = [kernel_distance(x, y, **draws) for x, y in zip(generated, reference, strict=True)]
    values, stds = (dict(zip(images.variants, each, strict=True)) for each in zip(*pairs, strict=True))
    about = f"{len(images.generated)} generated, {len(images.reference)} reference images, {draws['subsets']} subsets of {draws['subset_size']}"
    shown = [f"{mean:.6f}, std over subsets {std:.6f}" for mean, std in pairs]
    return images.write("kid", values, shown, about, {"std": stds, **draws, "made_by": made_by})


def _at_least_two(folder: Path, expected: int | None, name: str, option: str) -> tuple[dict[Path, str], list[Path]]:
    """The images of a folder with their sha256, and the images left out because their prompts are never drawn."""
    digests = image_hashes(folder, expected)
    if expected is None:
        check_complete(folder, option)
    digests, never = without_never_drawn(digests)
    if len(digests) < 2:
        raise UserError(f"FID and KID need at least two {name} images; {folder} holds one")
    return digests, never


def _sha256_of(digests: dict[Path, str]) -> str:
    return sha256_texts(sorted(digests.values()))


def _described(ref_stats: Path, recorded: dict[str, Any], variants: list[str]) -> str:
    """Describe stored statistics, and which of their variant, network and preprocessing could not be checked."""
    checked = {"variant": "variant", "network": "extractor_sha256"}
    checked |= (
        {"preprocessing": "configuration_sha256"} if variants == [MODEL_VARIANT] and "extractor_sha256" in recorded else {}
    )
    unknown = " and ".join(what for what, key in checked.items() if key not in recorded)
    count = recorded.get("n", "an unrecorded number of")
    return f"statistics of {count} reference images from {ref_stats.name}" + (
        f" (its {unknown} not recorded)" if unknown else ""
    )


def _check_statistics(ref_stats: Path, recorded: dict[str, Any], images: Comparison) -> None:
    variant = images.variants[0]
    if recorded.get("variant", variant) != variant:
        raise UserError(
            f"{ref_stats} holds statistics of variant {recorded['variant']}, not of {variant}; make it again with --save_stats"
        )
    for name, digest in images.hashes.items():
        if recorded.get(name, digest) != digest:
            what = "feature extractor" if name == "extractor_sha256" else "configuration of the feature extractor or image size"
            raise UserError(
                f"{ref_stats} was made with another {what} (sha256 {recorded[name]}); make it again with --save_stats"
            )
    if recorded.get("n", 2) < 2:
        raise UserError(f"{ref_stats} holds statistics of {recorded['n']} images, and a covariance needs two")
