"""What FID compares: features of images, by the Inception-v3 in one or more variants, or by any image model its own way."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from des.data.images import image_batches
from des.evaluation.inception import VARIANTS, Inception, load_inception
from des.evaluation.scorer_identity import MODEL, PROCESSOR, configuration_sha256
from des.models.checkpoints import fingerprint
from des.models.loading import load_model, loading
from des.utils.logs import logger
from des.utils.resume import Partial

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, BaseImageProcessor, PreTrainedModel


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


def extractor_hashes(extractor: Extractor, source: str | None) -> dict[str, str]:
    """What decides the features of an image beside the variant: the weights and, of an image model, how it reads images."""
    hashes = {"extractor_sha256": fingerprint(extractor.model)}
    if is_image_model(source):
        hashes["configuration_sha256"] = configuration_sha256(source, MODEL + PROCESSOR)
    return hashes


def extract(
    extractor: Extractor, digests: Mapping[Path, str], batch_size: int, workers: int, desc: str, partial: Partial
) -> list[Tensor]:
    """The features [images, features] of every variant, in float64 on the CPU, of images by path with their sha256.

    What `partial` has of an interrupted run is not computed again. Raises UserError that names an unreadable image.
    """
    todo = [path for path, digest in digests.items() if digest not in partial.found]
    if len(todo) < len(digests):
        logger.info("%s: the features of %d of %d images were there", desc, len(digests) - len(todo), len(digests))
    batches = image_batches(todo, batch_size, desc, workers, extractor.prepare)
    for start, batch in zip(range(0, len(todo), batch_size), batches, strict=True):
        with torch.inference_mode():
            variants = [features.float().cpu() for features in extractor(batch)]
        names = [digests[path] for path in todo[start : start + batch_size]]
        partial.add({name: [_packed(features[i]) for features in variants] for i, name in enumerate(names)})
    found = [[_unpacked(text) for text in partial.found[digest]] for digest in digests.values()]
    return [torch.stack(features).double() for features in zip(*found, strict=True)]


def _packed(features: Tensor) -> str:
    return base64.b64encode(features.contiguous().view(torch.uint8).numpy()).decode()


def _unpacked(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
