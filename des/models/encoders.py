"""Listing a pipeline's text encoders, loading one, and computing its embeddings in batches.

The class of an encoder is read from `model_index.json` and the encoder's `config.json`, never guessed from a path.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from des.models.activations import use_lean_activations
from des.models.checkpoints import fingerprint
from des.models.families import ENCODER_CLASSES, FAMILIES, PIPELINES, Family, Reading, find_family
from des.models.loading import load_model, loading, release, torch_dtype
from des.models.model_files import INDEX, check_variant, fetch, file_names, is_local, read_json
from des.models.tokenizers import NO_LENGTH, load_tokenizer, tokenizer_name
from des.utils.errors import UserError
from des.utils.files import sha256_texts
from des.utils.logs import progress

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_STATES = {  # the embedding in an encoder's output, by `Reading.states`
    "last": lambda output: output.last_hidden_state,
    "penultimate": lambda output: output.hidden_states[-2],
    "pooled": lambda output: output.pooler_output[:, None],
}
_FOLDER = re.compile(r"text_encoder(?:_(\d+))?")
# Entries of config.json that do not change embeddings.
_NOTES = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


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
        """The hash of the weights, cached at the first use, which must come before training."""
        return fingerprint(self.model)

    @property
    def masked_by_config(self) -> bool:
        """Whether the pipeline masks padding because config.json sets `use_attention_mask`."""
        asked = bool(getattr(self.model.config, "use_attention_mask", False))
        return asked and self.embedding == "pipeline" and self.reading.attention_mask

    @property
    def identity(self) -> dict[str, str]:
        """The hashes of the configuration and the tokenizer; see `identity`."""
        return identity(self.model, self.tokenizer)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Return token ids [prompts, length], padded and truncated, on the CPU."""
        options = {"padding": "max_length", "max_length": self.length, "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(prompts, **options).input_ids

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return embeddings [batch, rows, hidden] of token ids [batch, length], on the encoder's device."""
        ids = input_ids.to(self.device, non_blocking=True)
        special = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        mask = {"attention_mask": not_padding(ids, *special)} if self.reading.attention_mask else {}
        states = self.reading.states
        return _STATES[states](self.model(input_ids=ids, output_hidden_states=states == "penultimate", **mask))

    @torch.inference_mode()
    def encode(self, prompts: list[str], batch_size: int, desc: str | None = None) -> Iterator[Tensor]:
        """Embed prompts in eval mode, yielding [batch, rows, hidden] on the encoder's device, in order."""
        self.model.eval()
        starts = range(0, len(prompts), batch_size)
        for start in progress(starts, desc=desc, unit="batch") if desc else starts:
            yield self(self.tokenize(prompts[start : start + batch_size]))

    def shape(self) -> tuple[int, int]:
        """Return the shape (rows, hidden) of one embedding."""
        return tuple(next(self.encode([""], 1)).shape[1:])


def not_padding(ids: Tensor, pad_token_id: int, eos_token_id: int | None = None) -> Tensor:
    """Return the attention mask [batch, tokens] of ids padded on the right, as the tokenizer does: 1 up to the last real token.

    CLIP pads with its end-of-text token; the first one ends the prompt and is real.
    """
    mask = ids.ne(pad_token_id).flip(-1).cumsum(-1).gt(0).flip(-1).long()  # MPS has no cummax
    return torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], dim=1) if pad_token_id == eos_token_id else mask


def identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return hashes of what embeddings depend on besides the weights: `{"config": sha256, "tokenizer": sha256}`.

    The configuration is hashed without its class's default values, so that a later transformers with new defaults gives the same
    hash; the tokenizer is hashed by its vocabulary, rules and length.
    """
    default = type(model.config)().to_dict()
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOTES}
    config = {name: value for name, value in config.items() if name not in default or default[name] != value}
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"vocab": tokenizer.get_vocab()}
    # Padding and truncation are set by each call.
    rules = {name: value for name, value in rules.items() if name not in ("padding", "truncation", "version")}
    rules |= {"special": tokenizer.special_tokens_map, "length": tokenizer.model_max_length}
    return {
        name: sha256_texts([json.dumps(content, sort_keys=True, default=str)])
        for name, content in (("config", config), ("tokenizer", rules))
    }


def read_index(model_path: str) -> dict | None:
    """Read `model_index.json` from a folder or the hub; None for a folder with only text encoders."""
    folder = Path(model_path)
    if is_local(model_path) and not (folder / INDEX).is_file():
        if not any(_FOLDER.fullmatch(path.name) for path in folder.iterdir()):
            raise UserError(f"{model_path} is not a pipeline: it has neither {INDEX} nor a folder text_encoder")
        return None
    return _load_index(model_path) if folder.is_dir() else _hub_index(model_path)


def _load_index(model_path: str) -> dict:
    index = read_json(model_path, INDEX)
    if not isinstance(index.get("_class_name"), str):
        raise UserError(f"{model_path} is not a pipeline of diffusers: `_class_name` in its {INDEX} does not name a class")
    for name, entry in index.items():
        pair = [type(part) for part in entry] if isinstance(entry, list) else None
        is_odd = (
            isinstance(entry, dict) or pair not in (None, [str, str], [type(None)] * 2) or (pair and not name.isidentifier())
        )
        if is_odd and not name.startswith("_"):
            raise UserError(
                f"the entry `{name}` in {INDEX} of {model_path} is not a component with [library, class] or [null, null]"
            )
    return index


_hub_index = cache(_load_index)  # one request per run


def components_of(model_path: str, drop_t5: bool = False) -> dict[str, tuple[str, str] | None]:
    """Return (library, class) of each component in model_index.json; None if it is [null, null] there or `drop_t5` leaves it out.

    Raises UserError if a pipeline without T5 cannot draw, or has no T5 to leave out.
    """
    index = read_index(model_path) or {}
    found = {name: tuple(entry) if entry[0] else None for name, entry in index.items() if isinstance(entry, list)}
    if drop_t5:
        optional = family_of(model_path).optional_encoders
        if not optional:
            able = ", ".join(each.name for each in FAMILIES.values() if each.optional_encoders)
            raise UserError(
                f"--drop_t5 is for {able}, which can draw without T5; {model_path} is a {family_of(model_path).name}"
            )
        dropped = [f"{kind}_{i}" for i in optional for kind in ("text_encoder", "tokenizer")]
        if not found.get(dropped[0]):
            raise UserError(f"{model_path} has no T5; leave --drop_t5 out")
        found |= dict.fromkeys(dropped)
    return found


def text_encoders(model_path: str, drop_t5: bool = False) -> dict[int, str]:
    """Return the subfolder of each text encoder of a pipeline by 1-based index; SD3 pipelines may lack one."""
    index = read_index(model_path)
    if index is None:
        names = [path.name for path in Path(model_path).iterdir()]
    else:
        _known(model_path, index["_class_name"])
        names = [name for name, component in components_of(model_path, drop_t5).items() if component]
    matches = [match for match in map(_FOLDER.fullmatch, names) if match]
    return {int(match[1] or 1): match[0] for match in sorted(matches, key=lambda match: int(match[1] or 1))}


def _known(model_path: str, pipeline: str) -> None:
    if pipeline not in PIPELINES:
        raise UserError(f"{model_path} is a {pipeline}; the supported pipelines are {', '.join(PIPELINES)}")


def family_of(model_path: str) -> Family:
    """Return the family of a pipeline, found by the class in model_index.json and, if families share it, a component's configuration.

    Raises UserError for unsupported classes and for a folder without model_index.json.
    """
    index = read_index(model_path)
    name = index["_class_name"] if index else "folder without model_index.json"
    _known(model_path, name)

    def config_of(component: str) -> dict[str, Any] | None:  # training needs no files of UNet and transformer
        return read_config(model_path, component) if f"{component}/config.json" in file_names(model_path) else None

    return find_family(name, config_of)


def family_if_any(model_path: str) -> Family | None:
    """Return `family_of`'s family, None for a folder with only text encoders."""
    return family_of(model_path) if read_index(model_path) else None


def read_config(model_path: str, subfolder: str) -> dict[str, Any]:
    """Read config.json of a component from a folder or the hub; UserError if it cannot be read."""
    return read_json(model_path, f"{subfolder}/config.json")


def subfolder_of(model_path: str, index: int) -> str:
    """Return the subfolder of text encoder `index` (1-based) of a pipeline; UserError with the existing ones if it has none."""
    has = text_encoders(model_path)
    if index not in has:
        listed = ", ".join(f"{i} ({folder})" for i, folder in has.items()) or "none"
        raise UserError(f"{model_path} has no text encoder {index}; it has {listed}")
    return has[index]


def per_encoder_name(model_path: str, index: int, stem: str, pattern: str = "encoder{i}_{stem}") -> str:
    """`stem`, or `encoder{i}_{stem}` (or another `pattern`) for a pipeline with several text encoders."""
    return stem if tuple(text_encoders(model_path)) == (1,) else pattern.replace("{i}", str(index)).replace("{stem}", stem)


def reading_for(family: Family | None, index: int, architecture: str, embedding: str, config: PretrainedConfig) -> Reading:
    """Return how text encoder `index` of a family is read for an `embedding`, one of EMBEDDINGS.

    `config` is the encoder's; some pipelines follow its `use_attention_mask`. `family` may be None for the last hidden state.
    """
    if embedding == "last_hidden_state":
        return ENCODER_CLASSES[architecture].last_hidden_state
    reading = family.encoders[index].reading
    masked = family.reads_use_attention_mask and getattr(config, "use_attention_mask", False)
    return replace(reading, attention_mask=True) if masked else reading


def as_pipeline_reads(encoder: TextEncoder, family: Family | None) -> TextEncoder | None:
    """Return an encoder with the embedding that its pipeline gives to the denoiser; None if `encoder` has it, or without a family."""
    if family is None or encoder.embedding == "pipeline":
        return None
    reading = reading_for(family, encoder.index, type(encoder.model).__name__, "pipeline", encoder.model.config)
    if replace(reading, length=None) == replace(encoder.reading, length=None):
        return None
    return replace(encoder, embedding="pipeline", reading=reading, length=reading.length or encoder.length)


def encoder_class(architecture: str, what: str) -> tuple[type[PreTrainedModel], torch.dtype]:
    """Return transformers' class of a text encoder and its training dtype; UserError, with `what`, for unsupported classes."""
    if architecture not in ENCODER_CLASSES:
        raise UserError(f"{what} is {architecture}; the supported text encoders are {', '.join(ENCODER_CLASSES)}")
    return getattr(transformers, architecture), torch_dtype(ENCODER_CLASSES[architecture].dtype)


def load_encoder(
    model_path: str,
    index: int = 1,
    device: torch.device | str = "cpu",
    embedding: str = "last_hidden_state",
    max_sequence_length: int | None = None,
    device_map: str | None = None,
    variant: str | None = None,
) -> TextEncoder:
    """Load text encoder `index` of a pipeline in eval mode, with every weight from its files.

    `embedding` is `last_hidden_state` (the paper) or `pipeline` (what the pipeline feeds to the denoiser). `max_sequence_length`
    applies to T5 only. On the device "meta" no weights are read. A `device_map`, which replaces `device`, spreads the layers over
    several GPUs. `variant` is that of the weights (see `find_weights`). Raises UserError for a missing encoder, an unsupported class,
    and missing or mismatched weights.
    """
    subfolder = subfolder_of(model_path, index)
    content, is_meta = read_config(model_path, subfolder), str(device) == "meta"
    architecture = (content.get("architectures") or ["a model of no named class"])[0]
    model_class, dtype = encoder_class(architecture, f"{subfolder} in {model_path}")
    if max_sequence_length and not ENCODER_CLASSES[architecture].any_length:
        raise UserError(f"--max_sequence_length is for T5, but text encoder {index} of {model_path} is {architecture}")
    check_variant(model_path, variant)
    files = fetch(model_path, (subfolder, tokenizer_name(subfolder)), variant, dtype, with_weights=not is_meta)
    pipeline = read_index(model_path)
    if embedding == "pipeline" and pipeline is None:
        raise UserError(f"--embedding pipeline needs a pipeline's model_index.json, which {model_path} lacks")
    if embedding == "pipeline" and pipeline["_class_name"] == "ChromaPipeline" and release("diffusers") < (0, 36):
        raise UserError(
            "--embedding pipeline needs diffusers 0.36 or newer for Chroma; earlier releases mask prompts differently"
        )
    family = family_if_any(model_path)
    with loading(f"the configuration of {subfolder} in {model_path}", model_path):
        config = model_class.config_class.from_dict(content)
    tokenizer = load_tokenizer(files.folder, model_path, subfolder, architecture, config, components_of(model_path), family)
    reading = reading_for(family, index, architecture, embedding, config)
    length = max_sequence_length or reading.length or tokenizer.model_max_length
    if length > NO_LENGTH:
        raise UserError(f"the tokenizer of {subfolder} in {model_path} has no maximum length; pass --max_sequence_length")
    if is_meta:
        with torch.device("meta"):
            model = model_class(config).to(dtype)
    else:
        options = {"subfolder": subfolder, "device_map": device_map, "variant": files.variant(subfolder)}
        model = load_model(model_class, str(files.folder), device, f"the {subfolder} of", dtype, **options)
    use_lean_activations(model)
    return TextEncoder(model_path, index, subfolder, model, tokenizer, embedding, reading, length)


def spread(count: int, at_most: int) -> Tensor:
    """Return at most `at_most` row numbers, evenly spaced over `count` rows."""
    return torch.linspace(0, count - 1, min(count, at_most)).round().long()
