"""Which text encoders a pipeline has, loading one, and reading its embeddings in batches.

What an encoder is comes from `model_index.json` and its own `config.json`; how a path is spelled decides nothing.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from des.models.activations import use_lean_activations
from des.models.checkpoints import fingerprint
from des.models.loading import load_model, loading
from des.utils.errors import UserError
from des.utils.files import sha256_texts
from des.utils.logs import progress

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)
from transformers.utils import ModelOutput


@dataclass(frozen=True)
class Reading:
    """Which tensor of an encoder's output is its embedding, [batch, rows, hidden], and how the encoder is called for it."""

    states: Callable[[ModelOutput], Tensor]
    attention_mask: bool = False  # over padding
    length: int | None = None  # tokens to pad to; None for the tokenizer's `model_max_length`


LAST = Reading(lambda output: output.last_hidden_state)  # after the final layer norm, padding included
MASKED = replace(LAST, attention_mask=True)
PENULTIMATE = Reading(lambda output: output.hidden_states[-2])
POOLED = Reading(lambda output: output.pooler_output[:, None])


@dataclass(frozen=True)
class Kind:
    """One class of text encoder: how it is loaded, and its last hidden state as the paper reads it."""

    model_class: type[PreTrainedModel]
    last_hidden_state: Reading
    dtype: torch.dtype


# By the class that `text_encoder*/config.json` names, and what each pipeline (by the class that `model_index.json` names) feeds
# to its denoiser from each of its encoders. A further encoder or pipeline is one entry.
KINDS = {
    "CLIPTextModel": Kind(CLIPTextModel, LAST, torch.float32),
    "CLIPTextModelWithProjection": Kind(CLIPTextModelWithProjection, LAST, torch.float32),
    "T5EncoderModel": Kind(T5EncoderModel, MASKED, torch.bfloat16),
}
PIPELINES: dict[str, dict[int, Reading]] = {
    "StableDiffusionPipeline": {1: LAST},
    "StableDiffusionXLPipeline": {1: PENULTIMATE, 2: PENULTIMATE},
    "StableDiffusion3Pipeline": {1: PENULTIMATE, 2: PENULTIMATE, 3: replace(LAST, length=256)},
    "FluxPipeline": {1: POOLED, 2: replace(LAST, length=512)},
}
INDEX = "model_index.json"
EMBEDDINGS = ("last_hidden_state", "pipeline")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_FOLDER = re.compile(r"text_encoder(?:_(\d+))?")
_NO_LENGTH = 100_000  # tokenizers without a length of their own name a huge number
_NOTES = (
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)  # say nothing about values


@dataclass
class TextEncoder:
    """One text encoder of a pipeline with its tokenizer."""

    model_path: str
    index: int  # 1-based, as on the command line
    subfolder: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    embedding: str  # one of EMBEDDINGS
    reading: Reading
    length: int  # tokens a prompt is padded or truncated to

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def base_sha256(self) -> str:
        """The hash of the weights at its first use, which must come before training: it is kept from then on."""
        return fingerprint(self.model)

    @property
    def masked_by_config(self) -> bool:
        """Whether the pipeline masks the padding because config.json says so."""
        return self.embedding == "pipeline" and self.reading.attention_mask

    @property
    def identity(self) -> dict[str, str]:
        """The hashes of its configuration and tokenizer; see `identity`."""
        return identity(self.model, self.tokenizer)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids [prompts, length], padded and truncated, on the CPU."""
        options = {"padding": "max_length", "max_length": self.length, "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(prompts, **options).input_ids

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Embeddings [batch, rows, hidden] of token ids [batch, length], on the encoder's device."""
        ids = input_ids.to(self.device, non_blocking=True)
        special = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        mask = {"attention_mask": not_padding(ids, *special)} if self.reading.attention_mask else {}
        return self.reading.states(self.model(input_ids=ids, output_hidden_states=self.reading is PENULTIMATE, **mask))

    @torch.inference_mode()
    def encode(self, prompts: list[str], batch_size: int, desc: str | None = None) -> Iterator[Tensor]:
        """Embed prompts in eval mode, yielding [batch, rows, hidden] on the encoder's device, in order."""
        self.model.eval()
        starts = range(0, len(prompts), batch_size)
        for start in progress(starts, desc=desc, unit="batch") if desc else starts:
            yield self(self.tokenize(prompts[start : start + batch_size]))

    def shape(self) -> tuple[int, int]:
        """The shape (rows, hidden) of one embedding."""
        return tuple(next(self.encode([""], 1)).shape[1:])


def not_padding(ids: Tensor, pad_token_id: int, eos_token_id: int | None = None) -> Tensor:
    """The attention mask [batch, tokens] of ids padded on the right, as the tokenizer gives it: 1 up to the last real token.

    CLIP pads with its end-of-text token, whose first one in the padding is real.
    """
    mask = ids.ne(pad_token_id).flip(-1).cummax(-1).values.flip(-1).long()
    return torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], dim=1) if pad_token_id == eos_token_id else mask


def identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What an encoder's embeddings depend on beside its weights: `{"config": sha256, "tokenizer": sha256}`.

    Of the configuration, every value that is not its class's default counts (`hidden_act`, the number of layers and heads, ...), so
    that a later transformers with further defaults gives the same hash; of the tokenizer, its vocabulary, rules and length.
    """
    default = type(model.config)().to_dict()
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOTES}
    config = {name: value for name, value in config.items() if name not in default or default[name] != value}
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"vocab": tokenizer.get_vocab()}
    rules = {
        name: value for name, value in rules.items() if name not in ("padding", "truncation", "version")
    }  # set by each call
    rules |= {"special": tokenizer.special_tokens_map, "length": tokenizer.model_max_length}
    return {
        name: sha256_texts([json.dumps(content, sort_keys=True, default=str)])
        for name, content in (("config", config), ("tokenizer", rules))
    }


def read_index(model_path: str) -> dict | None:
    """What `model_index.json` says, locally or on the hub; None for a folder of bare encoders."""
    folder = Path(model_path)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        if not any(_FOLDER.fullmatch(path.name) for path in folder.iterdir()):
            raise UserError(f"{model_path} is no pipeline: it has neither model_index.json nor a folder text_encoder")
        return None
    if not folder.exists() and not _HUB_ID.fullmatch(model_path):
        raise UserError(f"there is no folder {model_path}, and it is no hub id, which would be `owner/name`")
    return _load_index(model_path) if folder.is_dir() else _hub_index(model_path)


def _load_index(model_path: str) -> dict:
    with loading(f"the pipeline {model_path}, as a folder or a hub id,"):
        folder = Path(model_path)
        path = folder / INDEX if folder.is_dir() else Path(hf_hub_download(model_path, INDEX))
        return json.loads(path.read_text(encoding="utf-8"))


_hub_index = cache(_load_index)  # one request a run


def text_encoders(model_path: str) -> dict[int, str]:
    """The subfolder of each text encoder that a pipeline has, by its 1-based index; one may be left out of SD3."""
    index = read_index(model_path)
    if index is None:
        names = [path.name for path in Path(model_path).iterdir()]
    else:
        if index["_class_name"] not in PIPELINES:
            raise UserError(f"{model_path} is a {index['_class_name']}; the pipelines known here are {', '.join(PIPELINES)}")
        names = [name for name, component in index.items() if isinstance(component, list) and component[0] is not None]
    matches = [match for match in map(_FOLDER.fullmatch, names) if match]
    return {int(match[1] or 1): match[0] for match in sorted(matches, key=lambda match: int(match[1] or 1))}


def subfolder_of(model_path: str, index: int) -> str:
    """The folder of text encoder `index` (1-based) of a pipeline, or UserError listing those that it has."""
    has = text_encoders(model_path)
    if index not in has:
        told = ", ".join(f"{i} ({folder})" for i, folder in has.items())
        raise UserError(f"{model_path} has no text encoder {index}; it has {told}")
    return has[index]


def own_name(model_path: str, index: int, single: str, many: str) -> str:
    """`single` for a pipeline with one text encoder, `many` with its `{i}` filled in for one with several."""
    return single if tuple(text_encoders(model_path)) == (1,) else many.format(i=index)


def _reading(model_path: str, index: int, kind: Kind, embedding: str, config: Mapping[str, Any]) -> Reading:
    if embedding == "last_hidden_state":
        return kind.last_hidden_state
    pipeline = read_index(model_path)
    if pipeline is None:
        raise UserError(f"--embedding pipeline needs a pipeline's model_index.json, which {model_path} lacks")
    reading = PIPELINES[pipeline["_class_name"]][index]
    # Of these pipelines, diffusers' StableDiffusionPipeline alone reads this key.
    masked = pipeline["_class_name"] == "StableDiffusionPipeline" and config.get("use_attention_mask")
    return replace(reading, attention_mask=True) if masked else reading


def load_encoder(
    model_path: str,
    index: int = 1,
    device: torch.device | str = "cpu",
    embedding: str = "last_hidden_state",
    max_sequence_length: int | None = None,
    device_map: str | None = None,
) -> TextEncoder:
    """Load text encoder `index` of a pipeline in eval mode, with every weight from its files.

    `embedding` is `last_hidden_state` (the paper) or `pipeline` (what its pipeline feeds to the denoiser). `max_sequence_length`
    is T5's. On the device "meta" no weight is read. `device_map` spreads the layers over several GPUs instead. Raises UserError
    for an index the pipeline lacks, a class that is not known here, or missing or mismatched weights.
    """
    subfolder = subfolder_of(model_path, index)
    with loading(f"the tokenizer of {subfolder} in {model_path}"):
        tokenizer = AutoTokenizer.from_pretrained(
            model_path, subfolder=subfolder.replace("text_encoder", "tokenizer"), trust_remote_code=False
        )
    with loading(f"the configuration of {subfolder} in {model_path}"):
        config, _ = PreTrainedConfig.get_config_dict(model_path, subfolder=subfolder)
    architecture = (config.get("architectures") or ["a model of no named class"])[0]
    if architecture not in KINDS:
        raise UserError(f"{subfolder} in {model_path} is {architecture}; the text encoders known here are {', '.join(KINDS)}")
    kind = KINDS[architecture]
    if max_sequence_length and kind.model_class is not T5EncoderModel:
        raise UserError(f"--max_sequence_length is T5's, and text encoder {index} of {model_path} is {architecture}")
    reading = _reading(model_path, index, kind, embedding, config)
    length = max_sequence_length or reading.length or tokenizer.model_max_length
    if length > _NO_LENGTH:
        raise UserError(f"the tokenizer of {subfolder} in {model_path} names no length; pass --max_sequence_length")
    if str(device) == "meta":
        with torch.device("meta"):
            model = kind.model_class(kind.model_class.config_class.from_dict(config)).to(kind.dtype)
    else:
        options = {"subfolder": subfolder, "device_map": device_map}
        model = load_model(kind.model_class, model_path, device, f"the {subfolder} of", kind.dtype, **options)
    use_lean_activations(model)
    return TextEncoder(model_path, index, subfolder, model, tokenizer, embedding, reading, length)


def spread(count: int, at_most: int) -> Tensor:
    """At most `at_most` row numbers, evenly spaced over `count` rows."""
    return torch.linspace(0, count - 1, min(count, at_most)).round().long()
