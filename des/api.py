"""The Python interface, `des.protect`, `des.train` and `des.score`: the steps of the scripts for a pipeline that is open already.

pipe = DiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
des.protect(pipe, "checkpoints/des_sexual/1e-05_0.3/checkpoint-2.pt")
image = pipe("a photo of a cat").images[0]
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from des.evaluation.batches import Reading
from des.evaluation.classify import images_of, score_folder
from des.evaluation.detectors.base import Detector
from des.evaluation.detectors.profiles import PROFILES
from des.models import pipelines
from des.models.activations import use_lean_activations
from des.models.checkpoints import read_metadata
from des.models.encoders import encoder_class
from des.models.shift import UNMEASURED, is_unmeasured
from des.training import run
from des.training.checks import check_concept, check_guidance, check_lengths, refuse_equal_concepts
from des.training.codebook import Codebook, write_codebook
from des.training.pairs import Pairs
from des.utils import stats
from des.utils.errors import UserError
from des.utils.locks import locked
from des.utils.logs import log_to
from des.utils.processes import Processes
from des.utils.provenance import provenance

import pandas as pd
import torch
from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Protection:
    """What `protect` loaded: the checkpoint of each text encoder by its number in the pipeline, and how far embeddings moved."""

    checkpoints: dict[int, Path]
    measured: dict[int, dict[str, Any]]  # `des.models.shift.measure`'s result for each
    unprotected: list[int] = field(default_factory=list)  # the pipeline's text encoders that are the originals

    @property
    def doubts(self) -> list[str]:
        """Reasons why the pipeline may not be protected; empty if there are none."""
        doubts = [f"text encoder {i}: {each['doubt']}" for i, each in self.measured.items() if each["doubt"]]
        return doubts + [f"text encoder {i} is the original, NOT protected" for i in self.unprotected]

    def __repr__(self) -> str:
        loaded = ", ".join(f"text encoder {i}: {path}" for i, path in self.checkpoints.items())
        unmeasured = [f"text encoder {i}: {UNMEASURED}" for i, each in self.measured.items() if is_unmeasured(each)]
        states = [f"MAY NOT PROTECT: {'; '.join(self.doubts)}"] if self.doubts else []
        return f"Protection({'; '.join([loaded, *(states + unmeasured or ['embeddings moved'])])})"


@dataclass(frozen=True)
class Training:
    """A finished training: the last epoch's checkpoint, for `protect`, and its metadata."""

    checkpoint: Path
    metadata: dict[str, Any]

    @property
    def protects(self) -> bool:
        """Whether the embeddings of unsafe prompts moved."""
        return self.metadata["protects"]

    def __repr__(self) -> str:
        moved = self.metadata["embeddings"]
        cosines = f"mean cosine to the original: unsafe {moved['cos_unsafe_to_original']:.3f}, safe {moved['cos_safe_to_original']:.3f}"
        return f"Training({self.checkpoint}; {cosines}{'' if self.protects else '; DOES NOT PROTECT'})"


@dataclass(frozen=True)
class Score:
    """The result of `score`: the number `k` of `n` images that count, and the JSON file with everything that was found."""

    path: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def k(self) -> int:
        return self.facts["k"]

    @property
    def n(self) -> int:
        return self.facts["n"]

    @property
    def rate(self) -> float:
        """k / n, the attack success rate where the prompts ask for the concept."""
        return self.facts["fraction"]

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson 95% interval of the rate, as fractions."""
        return self.facts["low"], self.facts["high"]

    def table(self) -> pd.DataFrame:
        """A row for each image: its file, its prompt's row, and what the detector found."""
        return pd.DataFrame(self.facts["images"])

    def __repr__(self) -> str:
        return f"Score({self.facts['what']}: {stats.show(self.facts)}; {self.path})"


def protect(pipe: DiffusionPipeline, checkpoint: str | PathLike | Mapping[int, str | PathLike]) -> Protection:
    """Load a checkpoint into a text encoder of `pipe`, in place.

    A single checkpoint is loaded into the text encoder that its metadata names (number 1 without metadata); several are given by
    the number of their text encoder, counted from 1. Raises `des.UserError` for a missing, unreadable or mismatched file and for
    the original weights, and then changes nothing; logs a warning if embeddings hardly moved and for each text encoder of the
    pipeline that stays the original, which `Protection.doubts` repeats.
    """
    if isinstance(checkpoint, Mapping):
        checkpoints = {int(i): Path(path) for i, path in checkpoint.items()}
    else:
        checkpoints = {read_metadata(Path(checkpoint)).get("encoder", 1): Path(checkpoint)}
    if not checkpoints:
        raise UserError("protect needs at least one checkpoint; the mapping is empty")
    measured = pipelines.protect(pipe, checkpoints)
    return Protection(checkpoints, measured, pipelines.unprotected_encoders(pipe, checkpoints))


def train(
    pipe: DiffusionPipeline,
    unsafe: Sequence[str],
    safe: Sequence[str],
    output_dir: str | PathLike,
    concept: str | Sequence[str] = "nudity",
    *,
    encoder: int = 1,
    embedding: str = "last_hidden_state",
    concept_guidance_scale: float = 200.0,
    concept_guidance_ratio: float | None = None,
    target: str = "lowest",
    precision: str | None = None,
    optimizer: str | None = None,
    resume: bool = False,
    **settings: Any,
) -> Training:
    """Train a copy of a text encoder of `pipe` with DES, on the encoder's device; `pipe` itself does not change.

    `unsafe` are prompts for the concept, `safe` prompts whose images must stay; `concept` names the concept in words. Further
    `settings` are those of `des.training.loop.Settings`: num_epochs, learning_rate, lambda_safe, batch_size, seed, ... All
    defaults are the paper's, as in train_des.py. Writes the codebook, the targets, train.log, metrics.jsonl and checkpoint-N.pt
    to `output_dir`. Raises `des.UserError` for prompts or files that do not suit.
    """
    unsafe, safe, output_dir = _prompts("unsafe", unsafe), _prompts("safe", safe), Path(output_dir)
    concepts = _prompts("concept", [concept] if isinstance(concept, str) else concept)
    if encoder not in pipelines.encoder_modules(pipe):
        raise UserError(
            f"the pipeline has no text encoder {encoder}; it has {', '.join(map(str, pipelines.encoder_modules(pipe)))}"
        )
    original = pipelines.text_encoder(pipe, encoder, embedding)
    model = copy.deepcopy(original.model).to(encoder_class(type(original.model).__name__, "the text encoder")[1])
    use_lean_activations(model)
    copied = replace(original, model=model)
    hyper = run.settings_for(model.dtype, precision, optimizer, **settings)
    processes = Processes(copied.device, all_trained=embedding == "last_hidden_state")
    check_concept(concepts, unsafe)
    refuse_equal_concepts(copied, concepts)
    facts = {"function": "des.train", "concept": concepts, "output_dir": str(output_dir), **asdict(hyper)}
    made_by = provenance(SimpleNamespace(device=copied.device, **facts))
    codebook_folder = output_dir / "codebook"
    write_codebook(codebook_folder, copied, safe, made_by=made_by)
    codebook = Codebook(codebook_folder)
    guide = run.frozen_concept(copied, concepts, concept_guidance_scale, concept_guidance_ratio)
    rows = run.shared_targets(
        processes, output_dir / "safe_embeddings.pth", codebook, copied, unsafe, recompute=True, choice=target, seed=hyper.seed
    )
    pairs = Pairs.of(copied.tokenize(unsafe), copied.tokenize(safe), rows, safe, codebook, codebook)
    metadata = run.facts_of(copied, codebook, guide, concepts, target, hyper)
    metadata |= {
        "truncated_prompts": check_lengths(copied, {"unsafe": unsafe, "safe": safe, "concept": concepts}),
        "made_by": made_by,
    }
    output = run.Output(output_dir, resume=resume)
    with locked(output_dir / ".lock", "a training run"), log_to(output_dir / "train.log"):
        check_guidance(guide.alpha, guide.n.norm().item())
        run.fit(output, copied, pairs, guide, concepts, hyper, processes, metadata)
    checkpoint = output.checkpoint(hyper.num_epochs)
    return Training(checkpoint, read_metadata(checkpoint))


def _prompts(what: str, prompts: Sequence[str]) -> list[str]:
    """The prompts as a list; UserError if it is empty, a single text, or has a blank or an entry that is no text."""
    if isinstance(prompts, str) or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise UserError(f"`{what}` must be a list of prompts, none of them blank")
    if not len(prompts):
        raise UserError(f"`{what}` has no prompts")
    return list(prompts)


def score(
    folder: str | PathLike,
    cls_class: str | None = None,
    classifier: str | PathLike | None = None,
    *,
    csv_path: str | PathLike | None = None,
    profile: str = "paper",
    device: str | torch.device | None = None,
    batch_size: int = 32,
    num_workers: int = 4,
    output_name: str = "classify",
    skip_unreadable: bool = False,
    expected: int | None = None,
) -> Score:
    """Count the images of a folder that show nudity (NudeNet with the rules of `profile`) or, with `classifier`, the class `cls_class`.

    `classifier` is the folder or hub id of an image classification model. With `csv_path`, the images must be those of its
    prompts. Writes `{output_name}.txt` and `.json` into the folder, like tasks/img_batch_classify.py. Raises `des.UserError` if
    images are missing, if an image is unreadable and `skip_unreadable` is not set, or if the classifier does not have the class.
    """
    if (cls_class is None) != (classifier is None):
        raise UserError("`cls_class` and `classifier` go together: one was given without the other")
    folder, place = Path(folder), torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    images = images_of(folder, Path(csv_path) if csv_path else None, expected, skip_unreadable).assign(label=cls_class)
    detector = _detector(cls_class, classifier, profile, place)
    options = {"function": "des.score", "folder": str(folder), "csv_path": str(csv_path) if csv_path else None}
    made_by = provenance(SimpleNamespace(device=place, **options))
    score_folder(folder, folder / output_name, detector, images, Reading(batch_size, num_workers), made_by, skip_unreadable)
    return Score(folder / f"{output_name}.json")


def _detector(cls_class: str | None, classifier: str | PathLike | None, profile: str, device: torch.device) -> Detector:
    if cls_class is None:
        if profile not in PROFILES:
            raise UserError(f"there is no profile {profile!r}; the profiles are {', '.join(PROFILES)}")
        from des.evaluation.detectors.nudenet import NudeNet  # imports onnxruntime and cv2

        return NudeNet([profile], device)
    from des.evaluation.detectors.classifier import Classifier

    return Classifier(str(classifier), device, f"ASR of {cls_class}", [cls_class])
