"""The cells of an attack: the attacked and the original pipeline, each with the prompts as they are and without the concept's names."""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from des.attacks.judging import Judge
from des.attacks.records import Found, Records
from des.generation.defences import Defence, open_defence
from des.generation.options import open_dtype
from des.models.encoders import TextEncoder
from des.models.loading import loading
from des.models.model_files import fetch
from des.models.pipelines import encoder_modules, open_pipeline, place, readers, text_encoder
from des.search.tokens import TokenPrompt, Vocabulary
from des.utils.errors import UserError

from diffusers import DiffusionPipeline
from torch import nn

CELLS = ("attack", "attack_without_names", "control", "control_without_names")


@dataclass
class Cell:
    """A model under a condition. `starts` and `targets` are prompts by row; without names, the starts lack the concept's `words`."""

    name: str  # one of CELLS
    pipe: DiffusionPipeline  # that draws the candidates
    original: DiffusionPipeline
    targets: list[str]
    starts: list[str]
    words: list[str]  # that were taken out of the starts; empty with names
    forbidden: list[str]  # words that found prompts may not contain
    judge: Judge  # of the pipeline's images
    images: Judge  # that draws with the original pipeline
    records: Records
    folder: Path  # of the records

    def vocabulary(self, encoder: TextEncoder) -> Vocabulary:
        """The tokens that a search of this cell may use."""
        return Vocabulary(encoder, self.forbidden, self.judge.refused)

    def encoders(self, which: Sequence[int] | None, search_on: str = "attacked") -> tuple[list[TextEncoder], list[TextEncoder]]:
        """The text encoders to search on and the same ones of the original pipeline, as the pipeline reads them."""
        known = self.pipe if search_on == "attacked" else self.original
        has = list(encoder_modules(known))
        if lacking := set(which or ()) - set(has):
            raise UserError(
                f"--encoders {min(lacking)}: the pipeline has no text encoder {min(lacking)}; it has {', '.join(map(str, has))}"
            )
        return tuple([self.encoder(pipe, i) for i in which or has] for pipe in (known, self.original))

    def encoder(self, pipe: DiffusionPipeline, index: int) -> TextEncoder:
        """Text encoder `index` of one of the pipelines, read as the pipeline reads it and at the length at which images are drawn."""
        found = text_encoder(pipe, index, "pipeline")
        _, length = readers(pipe, self.judge.sampler.sampling.max_sequence_length)[found.subfolder]
        return replace(found, length=length)

    def judged(self, rows: list[int], found: Sequence[TokenPrompt], tried: int) -> list[Found]:
        """Draw and judge what a search found for each row from `tried` candidates; a text that is never drawn is not kept."""
        hits = self.judge.hits(rows, [each.text for each in found])
        return [
            Found.nothing(tried) if hit is None else Found(*each, tried, [hit]) for each, hit in zip(found, hits, strict=True)
        ]


@dataclass
class Models:
    """The original and the attacked pipeline on their device, the defence, and what it loaded."""

    original: DiffusionPipeline
    attacked: DiffusionPipeline
    defence: Defence
    protection: dict[Any, Any]

    @property
    def base(self) -> str:
        """The path of the original pipeline."""
        return self.defence.base_model_path or self.defence.model_path

    def of(self, cell: str) -> tuple[DiffusionPipeline, Defence]:
        """The pipeline that a cell draws with, and its defence."""
        if cell.startswith("control"):
            return self.original, Defence("none", self.base, None, {}, None, None)
        return self.attacked, self.defence


def open_models(args: argparse.Namespace) -> Models:
    """Open both pipelines and apply the defence to one; options that were left out are filled in with the family's defaults."""
    dtype, defence = open_dtype(args), open_defence(args)
    models = Models(None, None, defence, {})
    models.original = open_pipeline(models.base, dtype, args.model_type, args.scheduler, variant=args.variant)
    if models.base == args.model_path:
        models.attacked = copied(models.original, models.base, bool(defence.unet_path or defence.adapter_path))
    else:
        models.attacked = open_pipeline(args.model_path, dtype, args.model_type, args.scheduler, variant=args.variant)
    models.protection = defence.apply(models.attacked)
    for pipe in (models.original, models.attacked):
        place(pipe, args.device)
        freeze(pipe)
    return models


def copied(pipe: DiffusionPipeline, model_path: str, unet: bool) -> DiffusionPipeline:
    """Return a copy of a pipeline whose text encoders, tokenizers and, if asked, UNet may be changed; it shares all other components."""
    twin, changed = copy.copy(pipe), ("text_encoder", "unet") if unet else ("text_encoder",)
    for name, component in pipe.components.items():
        if component is not None and name.startswith(changed):
            setattr(twin, name, copy.deepcopy(component))
        elif component is not None and name.startswith("tokenizer"):  # deepcopy would lose the decoder of a CLIPTokenizer
            folder = fetch(model_path, [name], with_weights=False).folder
            with loading(f"the {name} of {model_path}"):
                again = type(component).from_pretrained(folder, subfolder=name)
            again.model_max_length = component.model_max_length
            setattr(twin, name, again)
    return twin


def freeze(pipe: DiffusionPipeline) -> None:
    """Put a pipeline's modules into eval mode, without gradients of their weights."""
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
