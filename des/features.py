"""What FID compares: features of images, by the Inception-v3 in one or more variants, or by any image model its own way."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from des.images import image_batches
from des.inception import VARIANTS, Inception, load_inception
from des.loading import load_model, loading

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, BaseImageProcessor, PreTrainedModel

OWN = "the model's own"  # the variant of an image model, which brings its own preprocessing


@dataclass(frozen=True)
class InceptionExtractor:
    """2048 features of each image for each of the variants, from one reading of the image."""

    model: Inception
    variants: list[str]
    device: torch.device

    def prepare(self, image: Image.Image) -> list[Tensor]:
        return [VARIANTS[variant](image) for variant in self.variants]

    def __call__(self, batch: list[list[Tensor]]) -> list[Tensor]:
        return [self.model(torch.stack(inputs).to(self.device)) for inputs in zip(*batch, strict=True)]


@dataclass(frozen=True)
class ModelExtractor:
    """The pooled output of a transformers image model, with its own processor."""

    model: PreTrainedModel
    processor: BaseImageProcessor
    prepare: None = None

    def __call__(self, batch: list[Image.Image]) -> list[Tensor]:
        output = self.model(**self.processor(batch, return_tensors="pt").to(self.model.device))
        return [output.pooler_output.flatten(1)]


Extractor = InceptionExtractor | ModelExtractor


def is_image_model(source: str | None) -> bool:
    """Whether a --feature_extractor is an image model (a folder or hub id) and not a file of Inception-v3 weights."""
    return source is not None and not Path(source).is_file()


def load_extractor(source: str | None, variants: list[str], device: torch.device) -> Extractor:
    """Load the Inception-v3 (a weights file, or None for the published one) or an image model (a folder or hub id).

    Raises UserError where that fails.
    """
    if not is_image_model(source):
        return InceptionExtractor(load_inception(source and Path(source), device), variants, device)
    with loading(f"the image processor of {source}"):
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    return ModelExtractor(load_model(AutoModel, source, device, "the feature extractor"), processor)


@torch.inference_mode()
def extract(extractor: Extractor, paths: list[Path], batch_size: int, workers: int, desc: str) -> list[Tensor]:
    """The features [images, features] of every variant, in float64 on the CPU; UserError that names an unreadable image."""
    prepare: Callable[[Image.Image], Any] | None = extractor.prepare
    batches = [
        [features.cpu().double() for features in extractor(batch)]
        for batch in image_batches(paths, batch_size, desc, workers, prepare)
    ]
    return [torch.cat(features) for features in zip(*batches, strict=True)]
