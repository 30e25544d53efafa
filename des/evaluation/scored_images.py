"""Scores of single images: CLIP's cosine, the mean with its interval, and the files that hold them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from des.data import manifest
from des.data.images import SUFFIXES, image_batches, pairing_notes
from des.data.truncation import truncated_counts
from des.models.loading import loading
from des.utils.errors import UserError
from des.utils.files import is_reserved, replacing, result_paths, sha256_texts, write_json, write_text
from des.utils.logs import logger
from des.utils.resume import Findings
from des.utils.stats import Z95

import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import CLIPModel, CLIPProcessor


def load_processor(processor_class: type, source: str) -> Any:
    """Load a processor or tokenizer from a folder or hub id; UserError where that fails."""
    with loading(f"the processor of {source}"):
        return processor_class.from_pretrained(source, trust_remote_code=False)


@dataclass(frozen=True)
class Scoring:
    """How images are read and scored in batches, and where an interrupted run's scores are: beside the result file `output`."""

    output: Path
    folder: Path
    batch_size: int
    workers: int
    desc: str


def score_images(
    images: pd.DataFrame,
    how: Scoring,
    models: Mapping[str, str],
    score: Callable[[list, list[str]], list[Any]],
    prepare: Callable[[Image.Image], Any] | None = None,
) -> list[Any]:
    """What `score` makes of every image and its prompt, in order; what an interrupted run scored with the same `models` is kept.

    `images` is what `pair_with_prompts` returns for the folder; `score` takes a batch of images (or what `prepare` makes of them in
    the reading threads) and their prompts. Raises UserError that names an unreadable image.
    """
    partial = Findings(result_paths(how.output).json, sha256_texts(f"{name} {digest}" for name, digest in models.items()))
    rows = zip(images["image"], images["sha256"], images["prompt"], strict=True)
    keys = [f"{path.relative_to(how.folder)} {digest} {sha256_texts([prompt])}" for path, digest, prompt in rows]
    todo = [i for i, key in enumerate(keys) if key not in partial.found]
    if len(todo) < len(images):
        logger.info("%d of %d images were scored before", len(images) - len(todo), len(images))
    paths, prompts = ([images[column].iloc[i] for i in todo] for column in ("image", "prompt"))
    batches = image_batches(paths, how.batch_size, how.desc, how.workers, prepare)
    for start, batch in zip(range(0, len(todo), how.batch_size), batches, strict=True):
        part = slice(start, start + how.batch_size)
        with torch.inference_mode():
            found = score(batch, prompts[part])
        partial.add(dict(zip([keys[i] for i in todo[part]], found, strict=True)))
    return [partial.found[key] for key in keys]


def clip_cosine(model: CLIPModel, processor: CLIPProcessor) -> Callable[[list[Image.Image], list[str]], list[float]]:
    """The cosine in -1..1 of each of some images to its prompt, as a function for `score_images`; long prompts are truncated."""
    length = model.config.text_config.max_position_embeddings

    def score(images: list[Image.Image], prompts: list[str]) -> list[float]:
        inputs = processor(text=prompts, images=images, padding=True, truncation=True, max_length=length, return_tensors="pt")
        output = model(**inputs.to(model.device))
        return cosine_similarity(output.image_embeds.float(), output.text_embeds.float()).tolist()

    return score


def mean_and_interval(scores: Tensor) -> tuple[float, dict[str, float]]:
    """The mean of scores [n] and its normal 95% interval as `{"low", "high"}`, which is empty for a single score."""
    mean = scores.mean().item()
    if len(scores) < 2:
        return mean, {}
    half = Z95 * scores.std().item() / math.sqrt(len(scores))
    return mean, {"low": mean - half, "high": mean + half}


def check_result_name(output: Path) -> None:
    """Raise UserError for a result that would take the place of an image, or of another file of the image folder it goes to."""
    belongs = any((output.parent / name).exists() for name in ("run.json", manifest.NAME))
    if belongs and is_reserved(result_paths(output).json.stem):
        raise UserError(f"{output} has the name of another file of the image folder {output.parent}; choose another name")
    if output.suffix.lower() in SUFFIXES:
        raise UserError(f"{output} has the name of an image, and the result is a text; name it .txt")


def write_scores(
    output: Path,
    name: str,
    title: str,
    images: pd.DataFrame,
    folder: Path,
    columns: Mapping[str, Sequence],
    facts: Mapping[str, Any],
) -> str:
    """Write the `result_paths` of `output`: its text (the mean for people), and beside it .json (mean `name`, `n`, interval, `facts`) and .csv (one row an image).

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
