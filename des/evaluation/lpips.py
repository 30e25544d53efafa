"""LPIPS: the perceptual distance between each image of a protected model and the original model's image from the same seed."""

from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from des.data import manifest
from des.data.claims import check_complete, read_record
from des.data.image_folders import image_hashes, without_never_drawn
from des.data.images import image_size, read_image, row_and_copy
from des.data.run_record import differing_conditions
from des.evaluation.batches import Item, measure_images
from des.evaluation.scored_images import Scoring
from des.models.checkpoints import fingerprint
from des.models.loading import loading
from des.utils.choices import LPIPS_NETS
from des.utils.errors import UserError
from des.utils.files import result_paths, sha256_texts
from des.utils.resume import Findings

import pandas as pd
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

_EQUAL = ("prompt_sha256", "seed", "guidance_scale")  # manifest entries that must be equal in both images


def load_lpips(net: str, device: torch.device) -> Any:
    """Load torchmetrics' LPIPS with a torchvision backbone, which is downloaded once into torch.hub's folder; UserError on failure."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    where = Path(torch.hub.get_dir()) / "checkpoints"
    with loading(f"the {net} backbone of LPIPS, which is downloaded from torchvision into {where},"):
        return LearnedPerceptualImagePatchSimilarity(net, reduction="none", normalize=True).to(device)


def image_pairs(folder: Path, originals: Path, net: str, expected: int | None = None) -> pd.DataFrame:
    """Pair the images of `folder` with the original model's, by row: columns `image`, `sha256`, `original`, `original_sha256`.

    Raises UserError if the folders hold different rows, if `originals` are another model's, if the records name different settings
    or original models, or the manifests different prompts, seeds or guidance scales, and for images of different sizes or too small
    for the backbone `net`.
    """
    if folder.resolve() == originals.resolve():
        raise UserError(f"{folder} is given twice; --original_imgs_path is the folder with the original model's images")
    mine, theirs = _by_key(folder, expected), _by_key(originals, expected)
    other = sorted(mine.keys() ^ theirs.keys())
    if other:
        raise UserError(f"{folder} and {originals} do not hold the same rows: row {other[0][0]} is in one of them only")
    _check_records(*({path.parent for path, _ in images.values()} for images in (mine, theirs)))
    lines = {place: manifest.read(place) for place in {path.parent for path, _ in [*mine.values(), *theirs.values()]}}
    for key, (path, _) in mine.items():
        original = theirs[key][0]
        first, second = (lines[each.parent].get(each.name, {}) for each in (path, original))
        differ = [name for name in _EQUAL if name in first and name in second and first[name] != second[name]]
        sizes = image_size(path), image_size(original)
        differ += ["size"] * (sizes[0] != sizes[1])
        if differ:
            raise UserError(
                f"{path} and {original} cannot be compared: they differ in {', '.join(differ)}; generate both with the same settings"
            )
        if min(sizes[0]) < LPIPS_NETS[net]:
            raise UserError(
                f"{path} is smaller than the {LPIPS_NETS[net]} pixels a side that --lpips_net {net} needs; choose another one"
            )
    pairs = [(row, *mine[row, copy], *theirs[row, copy]) for row, copy in sorted(mine)]
    columns = ["row", "image", "sha256", "original", "original_sha256"]
    return pd.DataFrame(pairs, columns=columns).set_index("row")


def _check_records(mine: Iterable[Path], theirs: Iterable[Path]) -> None:
    """Raise UserError if two folders' run.json show that their images cannot be compared; folders without one are not checked."""
    protected, originals = ({place: read_record(place) for place in sorted(places)} for places in (mine, theirs))
    for place, original in originals.items():
        method = (original.get("settings") or {}).get("training_method") or "none"
        if method != "none":
            raise UserError(
                f"{place} has images of {method} instead of the original model's; name these with --original_imgs_path"
            )
    for (first, record), (second, original) in product(protected.items(), originals.items()):
        differ = differing_conditions(record, original) if record.get("settings") and original.get("settings") else []
        if differ:
            raise UserError(
                f"{first} and {second} cannot be compared: they differ in {', '.join(differ)}; generate both with the same settings"
            )


def _by_key(folder: Path, expected: int | None) -> dict[tuple[int, int], tuple[Path, str]]:
    digests = image_hashes(folder, expected)
    if expected is None:
        check_complete(folder)
    found: dict[tuple[int, int], tuple[Path, str]] = {}
    for path, digest in without_never_drawn(digests)[0].items():
        key = row_and_copy(path)
        if key is None or key in found:
            raise UserError(f"{path} has no row in its name, or the same row as another image; names must end in `_<row>p`")
        found[key] = path, digest
    return found


def lpips(pairs: pd.DataFrame, net: str, device: torch.device, how: Scoring) -> tuple[list[float], dict[str, str]]:
    """Compute the LPIPS of each of the `image_pairs`, 0 for equal images; returns the values and the network's hash.

    Source: Zhang et al., CVPR 2018.
    """
    metric = load_lpips(net, device)
    hashes = {"net": net, "net_sha256": fingerprint(metric.net)}

    def score(images: list[Image.Image], originals: Sequence[Path]) -> list[float]:
        both = [
            [pil_to_tensor(each)[None].to(device) / 255 for each in (a, read_image(b))]
            for a, b in zip(images, originals, strict=True)
        ]
        return [metric(*pair).item() for pair in both]  # pair by pair, since images of one batch may differ in size

    keys = pairs["sha256"] + " " + pairs["original_sha256"]
    items = [Item(*each) for each in zip(keys, pairs["image"], pairs["original"], strict=True)]
    findings = Findings(result_paths(how.output).json, sha256_texts(hashes.values()))
    return measure_images(items, score, findings, how.reading), hashes
