"""An image-classification model as a detector: an image counts if its top label is the requested class."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from des.evaluation.scorer_identity import MODEL, PROCESSOR, configuration_sha256
from des.models.checkpoints import fingerprint
from des.models.loading import load_model, loading
from des.utils.errors import UserError

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification


class Classifier:
    """The top label of a transformers model, in fp32. See `des.evaluation.detectors.base.Detector`."""

    def __init__(self, source: str, device: torch.device, what: str, classes: Sequence[str]):
        """Load a model from a folder or hub id. Raises UserError on failure, and if a class to count is missing or ambiguous.

        `classes` are names or indices for `class_index`. `what` is the title of the result; the label is added to it for a single
        class that is given by its index.
        """
        with loading(f"the image processor of {source}", source):
            self.processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        self.model = load_model(AutoModelForImageClassification, source, device, "the classifier")
        labels = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        self.index = {name: class_index(labels, name) for name in classes}
        self.labels = distinct(labels)
        by_index = [labels[i] for name, i in self.index.items() if len(self.index) == 1 and i not in named(labels, name)]
        self.titles = {"": f"{what} ({by_index[0]})" if by_index else what}
        digests = {
            "classifier_sha256": fingerprint(self.model),
            "configuration_sha256": configuration_sha256(source, MODEL + PROCESSOR),
        }
        self.facts = {"": {"classifier": source, **digests}}

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """Turn an image into the model's input [3, height, width]."""
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
        """The mean probability as text."""
        return f"mean probability {summary['mean_probability']:.4f}"


def class_index(labels: list[str], name: str) -> int:
    """The index of a class by its name (spaces may be underscores) or by one of its comma-separated synonyms.

    A number is taken as the index unless it is a label. Raises UserError if no class or several classes have the name: ImageNet
    has two classes `crane`, a bird (134) and a machine (517).
    """
    found = named(labels, name)
    if len(found) > 1:
        which = ", ".join(f"{i} ({labels[i]})" for i in found)
        raise UserError(f"the classifier has {len(found)} classes {name!r}: {which}; give the index of one of them")
    if found:
        return found[0]
    if name.isdecimal() and int(name) < len(labels):
        return int(name)
    raise UserError(
        f"the classifier has no class {name!r}; it has {', '.join(labels[:12])}{', …' if len(labels) > 12 else ''}, "
        f"with indices from 0 to {len(labels) - 1}"
    )


def named(labels: list[str], name: str) -> list[int]:
    """The indices of all classes with a name or synonym; case, underscores and hyphens are ignored."""
    return [i for i, label in enumerate(labels) if _plain(name) in (_plain(label), *map(_plain, label.split(",")))]


def distinct(labels: list[str]) -> list[str]:
    """The labels, followed by the index if several classes share one, so that each is unique."""
    count = Counter(labels)
    return [f"{label} ({i})" if count[label] > 1 else label for i, label in enumerate(labels)]


def _plain(text: str) -> str:
    return text.strip().lower().replace("_", " ").replace("-", " ")
