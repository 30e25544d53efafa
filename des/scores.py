"""Scores of single images: CLIP's cosine, the mean with its interval, and the files that hold them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from des.images import image_batches
from des.loading import loading
from des.results import Z95, replacing, write_json, write_text

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import CLIPModel, CLIPProcessor


def load_processor(processor_class: type, source: str) -> Any:
    """Load a processor or tokenizer from a folder or hub id; UserError where that fails."""
    with loading(f"the processor of {source}"):
        return processor_class.from_pretrained(source, trust_remote_code=False)


@torch.inference_mode()
def clip_cosines(
    paths: list[Path], prompts: list[str], processor: CLIPProcessor, model: CLIPModel, batch_size: int, workers: int, desc: str
) -> Tensor:
    """The cosine of each image to its prompt, [images] in -1..1, in float64 on the CPU; long prompts are truncated."""
    length = model.config.text_config.max_position_embeddings
    starts = range(0, len(paths), batch_size)
    cosines = []
    for start, images in zip(starts, image_batches(paths, batch_size, desc, workers), strict=True):
        texts = prompts[start : start + batch_size]
        inputs = processor(text=texts, images=images, padding=True, truncation=True, max_length=length, return_tensors="pt")
        output = model(**inputs.to(model.device))
        cosines.append(cosine_similarity(output.image_embeds.float(), output.text_embeds.float()).cpu().double())
    return torch.cat(cosines)


def mean_and_interval(scores: Tensor) -> tuple[float, dict[str, float]]:
    """The mean of scores [n] and its normal 95% interval as `{"low", "high"}`, which is empty for a single score."""
    mean = scores.mean().item()
    if len(scores) < 2:
        return mean, {}
    half = Z95 * scores.std().item() / math.sqrt(len(scores))
    return mean, {"low": mean - half, "high": mean + half}


def write_scores(
    output: Path,
    name: str,
    title: str,
    images: pd.DataFrame,
    folder: Path,
    columns: Mapping[str, Sequence],
    facts: Mapping[str, Any],
) -> str:
    """Write `output` (the mean for people), and beside it .json (mean `name`, `n`, interval, `facts`) and .csv (one row an image).

    `images` is what `pair_with_prompts` returns for `folder`; the column `name` of `columns` holds the scores. Returns the text.
    """
    scores = torch.as_tensor(columns[name], dtype=torch.float64)
    mean, interval = mean_and_interval(scores)
    low, high = interval.get("low", math.nan), interval.get("high", math.nan)
    text = f"{title}: {mean:.4f}, 95% interval [{low:.4f}, {high:.4f}], {len(scores)} images"
    names = [str(path.relative_to(folder)).encode(errors="backslashreplace").decode() for path in images["image"]]
    table = {"row": images.index, "image": names, **columns}
    with replacing(output.with_suffix(".csv")) as temporary:
        pd.DataFrame(table).to_csv(temporary, index=False)
    write_json(output.with_suffix(".json"), {name: mean, "n": len(scores), **interval, **facts})
    write_text(output, text + "\n")
    return text
