"""Image features for FID and KID, by Inception-v3 in one or several variants or by any image model."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from des.evaluation.batches import Item, Reading, measure_images
from des.evaluation.inception import VARIANTS, Inception, load_inception
from des.evaluation.scorer_identity import MODEL, PROCESSOR, configuration_sha256
from des.models.checkpoints import fingerprint
from des.models.loading import load_model, loading
from des.utils.resume import Findings

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, BaseImageProcessor, PreTrainedModel


@dataclass(frozen=True)
class InceptionExtractor:
    """Inception-v3 with one or several preprocessing variants: 2048 features per image and variant; each image is read once."""

    model: Inception
    variants: list[str]
    device: torch.device

    def prepare(self, image: Image.Image) -> list[Tensor]:
        return [VARIANTS[variant](image) for variant in self.variants]

    def __call__(self, batch: list[list[Tensor]]) -> list[Tensor]:
        return [self.model(torch.stack(inputs).to(self.device)) for inputs in zip(*batch, strict=True)]


@dataclass(frozen=True)
class ModelExtractor:
    """The pooled output of a transformers image model, which is fed by its image processor."""

    model: PreTrainedModel
    processor: BaseImageProcessor
    prepare: None = None

    def __call__(self, batch: list[Image.Image]) -> list[Tensor]:
        output = self.model(**self.processor(batch, return_tensors="pt").to(self.model.device))
        return [output.pooler_output.flatten(1)]


Extractor = InceptionExtractor | ModelExtractor


def load_extractor(source: str | None, variants: list[str], device: torch.device) -> Extractor:
    """Load the Inception-v3 (a weights file, or None for the published one) or an image model (a folder or hub id).

    Raises UserError if loading fails.
    """
    if source is None or Path(source).is_file():
        return InceptionExtractor(load_inception(source and Path(source), device), variants, device)
    with loading(f"the image processor of {source}", source):
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    return ModelExtractor(load_model(AutoModel, source, device, "the feature extractor"), processor)


def extractor_hashes(extractor: Extractor, source: str | None) -> dict[str, str]:
    """Hashes of the weights and, for an image model, of its configuration; with the variant they determine the features."""
    hashes = {"extractor_sha256": fingerprint(extractor.model)}
    if isinstance(extractor, ModelExtractor):
        hashes["configuration_sha256"] = configuration_sha256(source, MODEL + PROCESSOR)
    return hashes


def extract(extractor: Extractor, digests: Mapping[Path, str], reading: Reading, findings: Findings) -> list[Tensor]:
    """Extract features [images, features] for every variant, in float64 on the CPU; `digests` maps image paths to their sha256.

    Features that `findings` holds from an interrupted run are reused. Raises UserError that names an unreadable image.
    """

    def features(batch: list, _: list) -> list[list[str]]:
        variants = [each.float().cpu() for each in extractor(batch)]
        return [[_packed(each[i]) for each in variants] for i in range(len(batch))]

    items = [Item(digest, path) for path, digest in digests.items()]
    packed = measure_images(items, features, findings, reading, extractor.prepare)
    return [torch.stack([_unpacked(text) for text in texts]).double() for texts in zip(*packed, strict=True)]


def _packed(features: Tensor) -> str:
    return base64.b64encode(features.contiguous().view(torch.uint8).numpy()).decode()


def _unpacked(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
