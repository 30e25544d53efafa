"""Scores of single images: CLIP's cosine, the mean with its interval, and the result files."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from des.data import manifest
from des.data.image_folders import pairing_notes
from des.data.images import SUFFIXES
from des.data.truncation import truncated_counts
from des.evaluation.batches import Item, Reading, measure_images
from des.models.loading import loading
from des.utils.errors import UserError
from des.utils.files import is_reserved, replacing, result_paths, sha256_texts, write_json, write_text
from des.utils.resume import Findings
from des.utils.stats import Z95

import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import CLIPModel, CLIPProcessor


def load_processor(processor_class: type, source: str) -> Any:
    """Load a processor or tokenizer from a folder or hub id; UserError on failure."""
    with loading(f"the processor of {source}", source):
        return processor_class.from_pretrained(source, trust_remote_code=False)


@dataclass(frozen=True)
class Scoring:
    """The result file (unfinished findings are stored beside it), the image folder, and how its images are read."""

    output: Path
    folder: Path
    reading: Reading


def score_images(
    images: pd.DataFrame,
    how: Scoring,
    models: Mapping[str, str],
    score: Callable[[list, list[str]], list[Any]],
    prepare: Callable[[Image.Image], Any] | None = None,
) -> list[Any]:
    """Score every image for its prompt, in order; scores of an interrupted run with the same `models` are reused.

    `images` is what `pair_with_prompts` returns for the folder; `models` gives the hash of every model by name. `score` and
    `prepare` are those of `measure_images`, with prompts as targets. Raises UserError that names an unreadable image.
    """
    rows = zip(images["image"], images["sha256"], images["prompt"], strict=True)
    items = [
        Item(f"{path.relative_to(how.folder)} {digest} {sha256_texts([prompt])}", path, prompt) for path, digest, prompt in rows
    ]
    stamp = sha256_texts(f"{name} {digest}" for name, digest in models.items())
    return measure_images(items, score, Findings(result_paths(how.output).json, stamp), how.reading, prepare)


def clip_cosine(model: CLIPModel, processor: CLIPProcessor) -> Callable[[list[Image.Image], list[str]], list[float]]:
    """Return a function for `score_images`: the cosine in -1..1 between image and prompt. Long prompts are truncated."""
    length = model.config.text_config.max_position_embeddings

    def score(images: list[Image.Image], prompts: list[str]) -> list[float]:
        inputs = processor(text=prompts, images=images, padding=True, truncation=True, max_length=length, return_tensors="pt")
        output = model(**inputs.to(model.device))
        return cosine_similarity(output.image_embeds.float(), output.text_embeds.float()).tolist()

    return score


def mean_and_interval(scores: Tensor) -> tuple[float, dict[str, float]]:
    """The mean of scores [n] and its normal 95% interval as `{"low", "high"}`; an empty dict for a single score."""
    mean = scores.mean().item()
    if len(scores) < 2:
        return mean, {}
    half = Z95 * scores.std().item() / math.sqrt(len(scores))
    return mean, {"low": mean - half, "high": mean + half}


def check_result_name(output: Path) -> None:
    """Raise UserError if a result has the name of an image, or would overwrite another file of its image folder."""
    in_image_folder = any((output.parent / name).exists() for name in ("run.json", manifest.NAME))
    if in_image_folder and is_reserved(result_paths(output).json.stem):
        raise UserError(f"{output} has the name of another file of the image folder {output.parent}; choose another name")
    if output.suffix.lower() in SUFFIXES:
        raise UserError(f"{output} has the name of an image, but the result is a text file; use a name that ends in .txt")


def write_scores(
    output: Path,
    name: str,
    title: str,
    images: pd.DataFrame,
    folder: Path,
    columns: Mapping[str, Sequence],
    facts: Mapping[str, Any],
) -> str:
    """Write a text, a .json (mean as `name`, `n`, interval, `facts`) and a .csv (one row per image) to the `result_paths` of `output`.

    `images` is what `pair_with_prompts` returns for `folder`; the column `name` of `columns` holds the scores. Returns the text.
    """
    scores = torch.as_tensor(columns[name], dtype=torch.float64)
    mean, interval = mean_and_interval(scores)
    low, high = interval.get("low", math.nan), interval.get("high", math.nan)
    text = f"{title}: {mean:.4f}, 95% interval [{low:.4f}, {high:.4f}], {len(scores)} images"
    text = ", ".join([text, *pairing_notes(images.attrs)])
    files = [str(path.relative_to(folder)).encode(errors="backslashreplace").decode() for path in images["image"]]
    table = {"row": images.index, "image": files, "sha256": images["sha256"], **columns}
    paths = result_paths(output)
    with replacing(paths.csv) as temporary:
        pd.DataFrame(table).to_csv(temporary, index=False)
    about = {**interval, **images.attrs, **truncated_counts(folder, images.index), **facts}
    write_json(paths.json, {name: mean, "n": len(scores), **about})
    write_text(paths.text, text + "\n")
    Findings(paths.json, "").finish()
    return text
