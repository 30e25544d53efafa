"""Which text encoders a pipeline has, loading one, and reading its embeddings in batches."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from des.activations import use_lean_activations
from des.cli import UserError, progress
from des.loading import load_model, loading


@dataclass(frozen=True)
class Kind:
    """How one class of text encoder is loaded and read: `read(model, input_ids)` gives [batch, tokens, hidden]."""

    model_class: type[PreTrainedModel]
    read: Callable[[nn.Module, Tensor], Tensor]
    dtype: torch.dtype = torch.float32


def _last_hidden_state(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The last hidden state after the final layer norm, padding included."""
    return model(input_ids=input_ids).last_hidden_state


# By the class that `text_encoder*/config.json` names, and by the class that `model_index.json` names. A further encoder or
# pipeline is one entry.
KINDS = {"CLIPTextModel": Kind(CLIPTextModel, _last_hidden_state)}
PIPELINES: dict[str, tuple[str, ...]] = {"StableDiffusionPipeline": ("text_encoder",)}


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass
class TextEncoder:
    """One text encoder of a pipeline with its tokenizer."""

    model_path: str
    index: int  # 1-based, as on the command line
    subfolder: str
    kind: Kind
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        return self.model.device

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids [prompts, tokens], padded to the tokenizer's `model_max_length` and truncated there, on the CPU."""
        length = self.tokenizer.model_max_length
        return self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Embeddings [batch, tokens, hidden] of token ids [batch, tokens], on the encoder's device."""
        return self.kind.read(self.model, input_ids.to(self.device, non_blocking=True))

    @torch.inference_mode()
    def encode(self, prompts: list[str], batch_size: int, desc: str | None = None) -> Iterator[Tensor]:
        """Embed prompts in eval mode, yielding [batch, tokens, hidden] on the encoder's device, in order."""
        self.model.eval()
        starts = range(0, len(prompts), batch_size)
        for start in progress(starts, desc=desc, unit="batch") if desc else starts:
            yield self(self.tokenize(prompts[start : start + batch_size]))


def pipeline_class(model_path: str) -> str | None:
    """The class that `model_index.json` names, locally or on the hub; None for a folder of bare encoders."""
    folder = Path(model_path)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        if not (folder / "text_encoder").is_dir():
            raise UserError(f"{model_path} is no pipeline: it has neither model_index.json nor a folder text_encoder")
        return None
    if not folder.exists() and not _HUB_ID.fullmatch(model_path):
        raise UserError(f"there is no folder {model_path}, and it is no hub id, which would be `owner/name`")
    with loading(f"the pipeline {model_path}, as a folder or a hub id,"):
        return DiffusionPipeline.load_config(model_path)["_class_name"]


def subfolder_of(model_path: str, index: int) -> str:
    """The folder of text encoder `index` (1-based) of a pipeline, or UserError listing those that it has."""
    name = pipeline_class(model_path)
    if name is not None and name not in PIPELINES:
        raise UserError(f"{model_path} is a {name}; the pipelines known here are {', '.join(PIPELINES)}")
    subfolders = PIPELINES[name] if name else tuple(sorted(path.name for path in Path(model_path).glob("text_encoder*")))
    if not 1 <= index <= len(subfolders):
        has = ", ".join(f"{i} ({folder})" for i, folder in enumerate(subfolders, 1))
        raise UserError(f"{model_path} has no text encoder {index}; it has {has}")
    return subfolders[index - 1]


def load_encoder(model_path: str, index: int = 1, device: torch.device | str = "cpu") -> TextEncoder:
    """Load text encoder `index` of a pipeline in eval mode, with every weight from its files.

    Raises UserError for an index the pipeline lacks, a class that is not known here, or missing or mismatched weights.
    """
    subfolder = subfolder_of(model_path, index)
    with loading(f"the tokenizer of {subfolder} in {model_path}"):
        tokenizer = AutoTokenizer.from_pretrained(model_path, subfolder=subfolder.replace("text_encoder", "tokenizer"))
    with loading(f"the configuration of {subfolder} in {model_path}"):
        config, _ = PreTrainedConfig.get_config_dict(model_path, subfolder=subfolder)
    architecture = (config.get("architectures") or ["a model of no named class"])[0]
    if architecture not in KINDS:
        raise UserError(f"{subfolder} in {model_path} is {architecture}; the text encoders known here are {', '.join(KINDS)}")
    kind = KINDS[architecture]
    model = load_model(kind.model_class, model_path, device, f"the {subfolder} of", kind.dtype, subfolder=subfolder)
    use_lean_activations(model)
    return TextEncoder(model_path, index, subfolder, kind, model, tokenizer)
