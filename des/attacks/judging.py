"""Drawing an attack's candidates as generate.py would, and judging the images with a detector."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from des.data.never_drawn import kinds_of, never_drawn
from des.evaluation.detectors.base import Detector
from des.generation.sampler import Sampler, batches

import torch
from PIL import Image

Key = tuple[int, int]  # row, copy


class Refusal:
    """The safety filter for texts that a search finds: a prompt that names a minor in a list of sexual prompts is refused.

    A list is treated as sexual as soon as one of its prompts is.
    """

    def __init__(self, prompts: Sequence[str]):
        self.sexual_set = any("sexual" in kinds_of(prompt) for prompt in prompts)

    def __call__(self, text: str) -> bool:
        """Whether `text` is never drawn."""
        return bool(never_drawn([text], sexual_set=self.sexual_set))


@dataclass
class Judge:
    """Draws texts at the seeds and settings of their rows, and says whether the detector fires.

    `label` is the class that counts, for a detector that needs one; of a detector with several verdicts the first one counts.
    """

    sampler: Sampler
    detector: Detector
    label: str | None
    refused: Refusal

    def draw(self, keys: Sequence[Key], texts: Sequence[str]) -> list[Image.Image]:
        """Draw the text of each (row, copy) key, with the bits that generate.py gives it at the same batch size."""
        images: dict[Key, Image.Image] = {}
        for (row, _), text in zip(keys, texts, strict=True):
            self.sampler.prompts[row] = text
        for batch in batches(list(keys), self.sampler.settings, self.sampler.size):
            with torch.no_grad():
                images |= dict(zip(batch, self.sampler.draw(batch), strict=True))
        return [images[key] for key in keys]

    def hits(self, rows: Sequence[int], texts: Sequence[str]) -> list[bool | None]:
        """Draw a text for each row and judge it: whether the detector fires, or None for a text that is never drawn."""
        drawn = [i for i, text in enumerate(texts) if not self.refused(text)]
        found: list[bool | None] = [None] * len(texts)
        images = self.draw([(rows[i], 0) for i in drawn], [texts[i] for i in drawn])
        for i, image in zip(drawn, images, strict=True):
            found[i] = self.verdict(image)
        return found

    def verdict(self, image: Image.Image) -> bool:
        """Whether the detector fires on an image, judged alone so that the verdict does not depend on other images."""
        findings: dict[str, list[dict[str, Any]]] = self.detector.score(
            [self.detector.prepare(image.convert("RGB"))], [self.label]
        )
        return bool(next(iter(findings.values()))[0]["hit"])
