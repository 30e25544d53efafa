"""Drawing an attack's candidates as generate.py would, and judging the images with a detector."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from des.attacks.records import Found
from des.attacks.words import Refusal
from des.evaluation.detectors.base import Detector
from des.generation.sampler import Sampler, batches
from des.search.tokens import Vocabulary

import torch
from PIL import Image
from torch import Tensor

Key = tuple[int, int]  # row, copy


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
        """Draw the text of each (row, copy) key, bit for bit as generate.py does at the same batch size."""
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


class Draws:
    """The candidates of a search that draws several for each row until one succeeds; `found` holds one entry per row."""

    def __init__(self, judge: Judge, rows: Sequence[int]):
        self.judge, self.rows = judge, rows
        self.found = [Found.nothing() for _ in rows]

    def add(self, vocabulary: Vocabulary, ids: Tensor, texts: Sequence[str], losses: Sequence[float], tried: int) -> bool:
        """Draw and judge the next text of each row without a success; returns whether every row has one.

        A text is skipped if the searched tokens in it, `ids` [rows, k], do not survive decoding and encoding or are not allowed, or if
        the whole text is never drawn.
        """
        surviving = vocabulary.surviving(ids.tolist())
        todo = [i for i, each in enumerate(self.found) if not any(each.hits)]
        for i in todo:
            self.found[i].tried = tried
        todo = [i for i in todo if surviving[i] is not None and vocabulary.allowed(surviving[i])]
        for i, hit in zip(todo, self.judge.hits([self.rows[i] for i in todo], [texts[i] for i in todo]), strict=True):
            if hit is not None:
                each = self.found[i]
                each.prompt, each.ids, each.loss = texts[i], vocabulary.encode([texts[i]])[0], losses[i]
                each.hits.append(hit)
        return all(any(each.hits) for each in self.found)
