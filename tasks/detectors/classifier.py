"""An image-classification model as a detector: an image counts when its top label is the class asked for."""

from collections.abc import Sequence
from typing import Any

from des.checkpoints import fingerprint
from des.cli import UserError
from des.loading import load_model, loading
from des.scorer_identity import MODEL, PROCESSOR, configuration_sha256

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification


class Classifier:
    """The top label of a transformers model, in fp32. See `des.scoring.Detector`."""

    def __init__(self, source: str, device: torch.device, what: str, classes: Sequence[str]):
        """Load the model of a folder or hub id; UserError where it cannot be, or lacks one of the `classes` that will count.

        `what` says in words what is counted.
        """
        with loading(f"the image processor of {source}"):
            self.processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        self.model = load_model(AutoModelForImageClassification, source, device, "the classifier")
        self.labels = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        self.index = {name: class_index(self.labels, name) for name in classes}
        self.titles = {"": what}
        digests = {
            "classifier_sha256": fingerprint(self.model),
            "configuration_sha256": configuration_sha256(source, MODEL + PROCESSOR),
        }
        self.facts = {"": {"classifier": source, **digests}}

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """Pixels [3, height, width] as the model takes them."""
        return self.processor(image, return_tensors="pt")["pixel_values"][0]

    @torch.inference_mode()
    def score(self, prepared: list, labels: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """Each image's top label, and the probability of the class that counts for it."""
        pixels = torch.stack(prepared).to(self.model.device)
        probabilities = self.model(pixel_values=pixels).logits.float().softmax(dim=1).cpu()
        wanted = [self.index[label] for label in labels]
        columns = zip(labels, wanted, probabilities.argmax(dim=1).tolist(), probabilities, strict=True)
        return {
            "": [
                {"hit": i == j, "label": label, "top": self.labels[j], "probability": each[i].item()}
                for label, i, j, each in columns
            ]
        }

    def summary(self, verdict: str, findings: list[dict[str, Any]]) -> dict[str, Any]:
        """The mean probability of the classes that count."""
        return {"mean_probability": sum(finding["probability"] for finding in findings) / len(findings)}

    def line(self, summary: dict[str, Any]) -> str:
        """That mean for people."""
        return f"mean probability {summary['mean_probability']:.4f}"


def class_index(labels: list[str], name: str) -> int:
    """The index of a class by its name, as the model spells it or with underscores, or by one of its comma-separated synonyms."""

    def plain(text: str) -> str:
        return text.strip().lower().replace("_", " ").replace("-", " ")

    for i, label in enumerate(labels):
        if plain(name) in (plain(label), *map(plain, label.split(","))):
            return i
    raise UserError(f"the classifier has no class {name!r}; it has {', '.join(labels[:12])}{', …' if len(labels) > 12 else ''}")
