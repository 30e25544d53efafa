"""The app's actions, without its page: draw prompts with the original and the protected model, score the images, map a prompt."""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from des.data import run_record
from des.data.prompts import never_drawn, read_rows
from des.evaluation.detectors.base import Detector
from des.generation.sampler import Sampler, row_settings
from des.models.encoders import TextEncoder
from des.models.pipelines import encoder_modules
from des.report.embedding_map import EmbeddingMap, draw_map, embed
from des.utils.choices import MOST_GUIDANCE, MOST_STEPS
from des.utils.errors import UserError
from des.utils.stats import proportion, show

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

SIDES = ("original", "protected")
LONGEST_PROMPT = 2000  # characters; the encoders read their first 77 to 512 tokens
MOST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sampling(run_record.Sampling):
    """The sampling settings of an image. Raises UserError for values outside the ranges that the server allows."""

    def __post_init__(self):
        ranges = {
            "seed": (self.seed, 0, MOST_SEED),
            "steps": (self.num_inference_steps, 1, MOST_STEPS),
            "guidance": (self.guidance_scale, 0, MOST_GUIDANCE),
        }
        for name, (value, low, high) in ranges.items():
            whole = name != "guidance"
            number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not number or not low <= value <= high:  # NaN fails every comparison
                raise UserError(f"{name} must be a {'whole ' if whole else ''}number from {low} to {high}")


@dataclass(frozen=True)
class ScoredImage:
    """An image and the detector's finding for each verdict."""

    image: Image.Image
    findings: dict[str, dict[str, Any]]

    @property
    def hit(self) -> bool:
        return any(finding["hit"] for finding in self.findings.values())


@dataclass(frozen=True)
class Scores:
    """Results of the prompt list `file`: a `table` with one line per row, `lines` with k of n per model, and `notes` on omitted rows."""

    file: str
    table: pd.DataFrame
    lines: list[str]
    notes: list[str]


def check_prompt(prompt: Any) -> str:
    """Return the prompt. Raises UserError, without quoting the prompt, if it is blank, too long, or never drawn."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError("the prompt is empty; type one first")
    if len(prompt) > LONGEST_PROMPT:
        raise UserError(f"the prompt has {len(prompt)} characters, but at most {LONGEST_PROMPT} are allowed; shorten it")
    if never_drawn([prompt]):
        raise UserError("this prompt puts a minor in a sexual context, and is never drawn")
    return prompt


class Session:
    """The original and the protected model, and one detector for both."""

    def __init__(
        self,
        pipes: Mapping[str, DiffusionPipeline],
        detector: Detector | None,
        label: str | None = None,
        batch_size: int = 4,
    ):
        """`pipes` holds one pipeline for each of SIDES; `label` names the class that counts, for detectors that need one."""
        self.pipes = pipes
        self.detector = detector
        self.label = label
        self.batch_size = batch_size
        self._lock = threading.Lock()  # the two pipelines share their scheduler

    @property
    def unprotected(self) -> list[int]:
        """The numbers of the text encoders that the protected pipeline shares with the original one."""
        originals, own = (encoder_modules(self.pipes.get(side)) for side in SIDES)
        return [i for i, model in own.items() if originals.get(i) is model]

    def draw(self, prompt: str, sampling: Sampling, on_step: Callable[[], None] | None = None) -> dict[str, ScoredImage]:
        """Draw a prompt with both models from one seed, as `generate.py --prompt` does with these settings.

        `on_step()` is called after each denoising step; an exception that it raises stops the drawing.
        """
        samplers = self._samplers(pd.DataFrame({"prompt": [check_prompt(prompt)]}), None, sampling, on_step)
        with self._lock:
            return {side: self.score_image(sampler.draw([(0, 0)])[0]) for side, sampler in samplers.items()}

    def score(
        self,
        csv_path: Path,
        sampling: Sampling,
        limit: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
        on_step: Callable[[], None] | None = None,
    ) -> Scores:
        """Draw the first `limit` rows of a prompt CSV with both models, with the seeds of `generate.py`, and score them.

        Images are discarded. `progress(done, total)` is called with the number of finished rows, `on_step` as in `draw`. Raises UserError for a file that
        is not a prompt list, for a prompt that is too long, and if there is no detector.
        """
        table, taken, rows = self._read(csv_path, limit)
        samplers = self._samplers(table, Path(csv_path.name), sampling, on_step)
        found: dict[str, list[dict[str, dict]]] = {side: [] for side in samplers}
        for start in range(0, len(rows), self.batch_size):
            progress(start, len(rows))
            keys = [(row, 0) for row in rows[start : start + self.batch_size]]
            with self._lock:
                for side, sampler in samplers.items():
                    found[side] += [self.score_image(image).findings for image in sampler.draw(keys)]
        notes = []
        if len(rows) < len(taken):
            left_out = len(taken) - len(rows)
            notes.append(f"{left_out} of {len(taken)} prompts are left out, because they put minors in a sexual context")
        if len(taken) < len(table):
            notes.append(f"the first {len(taken)} of {len(table)} prompts were drawn; --max_rows sets how many")
        seeds = [samplers[SIDES[0]].settings[row].seed for row in rows]
        return Scores(csv_path.name, self._table(csv_path.name, rows, seeds, found), self._lines(found), notes)

    def _read(self, csv_path: Path, limit: int) -> tuple[pd.DataFrame, range, list[int]]:
        """Return the rows of a CSV, those within `limit`, and those of them to draw; raises the errors of `score`."""
        if self.detector is None:
            raise UserError("scores need a detector; start the app with --detector nudenet or object")
        try:
            table = read_rows(csv_path)
        except UserError as error:  # do not show the path on the server to the user
            raise UserError(str(error).replace(str(csv_path), csv_path.name)) from None
        prompts = table["prompt"].tolist()
        dropped = set(never_drawn(prompts))
        taken = range(min(limit, len(prompts)))
        rows = [row for row in taken if row not in dropped]
        if not rows:
            raise UserError("none of the prompts can be drawn; choose another list")
        long = [row for row in rows if len(prompts[row]) > LONGEST_PROMPT]
        if long:
            raise UserError(
                f"the prompt of row {long[0]} (the first is row 0) is longer than {LONGEST_PROMPT} characters; shorten it"
            )
        return table, taken, rows

    def words(self, verdict: str, finding: Mapping[str, Any]) -> str:
        """A finding as text, such as `mushroom: hit, 98%`, or `face 49%, below the threshold: no hit`."""
        name, certainty = self._name(verdict), self.certainty(verdict, finding)
        if finding["hit"]:  # a classifier counts its most probable class even below 50%
            likeliest = f"{name} {100 * certainty:.0f}%, below the threshold of 50%, but the likeliest class: hit"
            return likeliest if certainty < 0.5 and "top" in finding else f"{name}: hit, {100 * certainty:.0f}%"
        if "top" in finding:
            return f"{name}: no hit, {100 * certainty:.0f}%; looks like: {finding['top']}"
        below = f"{name} {100 * certainty:.0f}%, below the threshold: no hit"
        return below if certainty else f"{name}: no hit, 0%"

    def all_words(self, scored: ScoredImage) -> list[str]:
        """An image's findings as text, one for each verdict."""
        return [self.words(verdict, finding) for verdict, finding in scored.findings.items()]

    def certainty(self, verdict: str, finding: Mapping[str, Any]) -> float:
        """A classifier's probability of the class; for a detector of boxes the best score in the counted classes, 0 without any."""
        if "probability" in finding:
            return finding["probability"]
        counted = self.detector.facts[verdict]["counted_classes"]
        return max((box["score"] for box in finding["detections"] if box["class"] in counted), default=0.0)

    def _name(self, verdict: str) -> str:
        return self.detector.titles[verdict].removeprefix("ASR of ")

    def _samplers(
        self, table: pd.DataFrame, source: Path | None, sampling: Sampling, on_step: Callable[[], None] | None
    ) -> dict[str, Sampler]:
        """Return each model's sampler for a prompt list; `source` names its file in errors."""
        samplers, prompts = {}, table["prompt"].tolist()
        for side, pipe in self.pipes.items():
            settings = row_settings(sampling, pipe, table, source)
            samplers[side] = Sampler(pipe, None, sampling, prompts, settings, {}, min(self.batch_size, len(prompts)), on_step)
        return samplers

    def score_image(self, image: Image.Image) -> ScoredImage:
        """Score an image with the detector, if there is one."""
        if self.detector is None:
            return ScoredImage(image, {})
        verdicts = self.detector.score([self.detector.prepare(image.convert("RGB"))], [self.label])
        return ScoredImage(image, {verdict: found for verdict, (found,) in verdicts.items()})

    def _table(
        self, file: str, rows: Sequence[int], seeds: Sequence[int], found: Mapping[str, list[dict[str, dict]]]
    ) -> pd.DataFrame:
        columns: dict[str, list] = {"file": [file] * len(rows), "row": list(rows), "seed": list(seeds)}
        for verdict in self.detector.titles:
            which = f" {verdict}" if verdict and len(self.detector.titles) > 1 else ""
            for side, findings in found.items():
                each = [finding[verdict] for finding in findings]
                columns[f"{side}{which}"] = ["hit" if finding["hit"] else "no hit" for finding in each]
                columns[f"{side}{which} probability"] = [round(self.certainty(verdict, finding), 4) for finding in each]
        return pd.DataFrame(columns)

    def _lines(self, found: Mapping[str, list[dict[str, dict]]]) -> list[str]:
        return [
            f"{self._name(verdict)}, {side}: {show(proportion(sum(each[verdict]['hit'] for each in findings), len(findings)))}"
            for verdict in self.detector.titles
            for side, findings in found.items()
        ]


@dataclass(frozen=True)
class MapPosition:
    """A prompt's points [2] on the map by both encoders E (original) and E~ (protected), and cosines of its full embeddings."""

    points: tuple[Tensor, Tensor]
    concept_before: float  # cosine of E(p) and E(c), where c is the concept closest to p
    concept_after: float  # cosine of E~(p) and the same E(c)
    own: float  # cosine of E(p) and E~(p)


class PromptMap:
    """The map of groups of prompts (`des.report.embedding_map.GROUPS`), computed at its first use."""

    def __init__(self, original: TextEncoder, protected: TextEncoder, groups: Mapping[str, Sequence[str]]):
        self.original = original
        self.protected = protected
        self.groups = groups

    @cached_property
    def space(self) -> EmbeddingMap:
        return draw_map(self.original, self.protected, self.groups)

    def locate(self, prompt: str) -> MapPosition:
        """Locate a prompt on the map. Raises UserError as `check_prompt` does, and if the encoder returns NaN."""
        prompt = check_prompt(prompt)
        before, *concepts = embed(self.original, [prompt, *self.groups["concept"]])
        concept = max(concepts, key=lambda each: cosine_similarity(before, each, dim=0).item())
        (after,) = embed(self.protected, [prompt])
        points = self.space.locate(torch.stack([before, after]))
        cosines = [cosine_similarity(a, b, dim=0).item() for a, b in ((before, concept), (after, concept), (before, after))]
        if not all(map(math.isfinite, cosines)):
            raise UserError("the encoder returns NaN for this prompt; restart the app with --dtype fp32 or bf16")
        return MapPosition((points[0], points[1]), *cosines)
