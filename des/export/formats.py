"""Writing protected text encoders in the formats of other programs, and reading them back with each format's reader.

Tensors have transformers 4.x's names, which ComfyUI and single-file checkpoints expect, with any version of transformers.
"""

import copy
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from des.models.checkpoints import PROJECTION, fingerprint, plain_names, published_names, save_published
from des.models.encoders import (
    TextEncoder,
    components_of,
    family_if_any,
    family_of,
    load_encoder,
    read_index,
    subfolder_of,
    text_encoders,
)
from des.models.families import COMFYUI, FAMILIES, exports_to
from des.models.loading import dtype_option, load_model, loading
from des.models.model_files import INDEX, WEIGHT_SUFFIXES, copy_weights, fetch, read_json, weight_files
from des.models.shift import concepts_of, embedding_of, is_unprotected, load_measured
from des.models.tensor_files import read_tensors
from des.utils.errors import UserError
from des.utils.files import check_room, replacing, write_json
from des.utils.logs import logger

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

PROMPTS = ["", "a red bicycle in front of a brick wall", "an oil painting of mountains at dawn", "two cups of tea on a table"]
LDM_ENCODER = "cond_stage_model.transformer.text_model."
_BUFFER = LDM_ENCODER + "embeddings.position_ids"  # a constant in single files
_NOVELAI = re.compile(r"^cond_stage_model\.transformer\.(?=(embeddings|encoder|final_layer_norm)\.)")  # without `text_model.`
_OF_THE_BASE = re.compile("hash|title", re.IGNORECASE)  # metadata that is wrong once the encoder is replaced
_T5_COPY = "encoder.embed_tokens.weight"  # the same tensor as `shared.weight`
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # of rounding, relative to the largest value


@dataclass(frozen=True)
class Base:
    """A single-file checkpoint of SD 1.x: its tensors and metadata."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype for an encoder in this file: that of the original encoder, or fp16 if it is fp8, in which nothing is computed."""
        dtype = self.encoder["final_layer_norm.bias"].dtype
        return dtype if dtype.itemsize > 1 else torch.float16

    @property
    def encoder(self) -> dict[str, Tensor]:
        """The text encoder's tensors, named from `LDM_ENCODER` on, without the position ids."""
        named = {name: tensor for name, tensor in self.tensors.items() if name.startswith(LDM_ENCODER) and name != _BUFFER}
        return {name.removeprefix(LDM_ENCODER): tensor for name, tensor in named.items()}


@dataclass
class Export:
    """Protected encoders to export by 1-based index, and the source of the model's other parts."""

    model_path: str
    encoders: dict[int, TextEncoder]
    loaded: dict[int, dict]  # results of `load_measured`, and the original encoder's hash as `original_sha256`
    base: Base | None = None  # a1111: the single file from which the other tensors are copied
    variant: str | None = None  # of the model's files
    drop_t5: bool = False  # pipeline: without T5

    @property
    def components(self) -> dict[str, tuple[str, str] | None]:
        """The components of the model, as `components_of` returns them."""
        return components_of(self.model_path, self.drop_t5)

    @property
    def size(self) -> int:
        """The bytes of the encoders, and of the base."""
        tensors = [tensor for encoder in self.encoders.values() for tensor in encoder.model.state_dict().values()]
        tensors += self.base.tensors.values() if self.base else []
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    def metadata(self, *indices: int) -> dict[str, str]:
        """Return the metadata of a safetensors file with these encoders: `format`, and in `des`, as JSON, what each encoder is.

        `des` has the method, the concept prompts, the reason why the encoder may not protect or null, and the sha256 of the original
        encoder (`des.models.checkpoints.fingerprint`) and of the checkpoint, by the encoder's subfolder.
        """
        facts = {
            self.encoders[i].subfolder: {
                "method": "des",
                "concept": concepts_of(self.loaded[i]),
                "doubt": self.loaded[i]["doubt"],
                "base_encoder_sha256": self.loaded[i]["original_sha256"],
                "checkpoint_sha256": self.loaded[i]["file_sha256"],
            }
            for i in indices
        }
        return {"format": "pt", "des": json.dumps(facts)}


def load_protected(
    model_path: str, checkpoints: Mapping[int, Path], variant: str | None = None, drop_t5: bool = False
) -> Export:
    """Load the encoders that have a checkpoint, with the checkpoint's weights.

    Raises UserError as `load_encoder` and `load_checkpoint` do, and for a checkpoint that does not move its concept's embedding.
    """
    encoders = {
        i: load_encoder(model_path, i, embedding=embedding_of(path), variant=variant) for i, path in checkpoints.items()
    }
    originals = {i: {"original_sha256": encoder.base_sha256} for i, encoder in encoders.items()}  # before the weights change
    family = family_if_any(model_path)
    loaded = {i: originals[i] | load_measured(encoders[i], path, family) for i, path in checkpoints.items()}
    for i, measured in loaded.items():
        if is_unprotected(measured):
            raise UserError(f"{checkpoints[i]} is not exported as protected: {measured['doubt']}")
    rest = [str(i) for i in text_encoders(model_path, drop_t5) if i not in checkpoints]
    if rest:
        logger.warning("text encoder %s of the model is the original, NOT protected", " and ".join(rest))
    return Export(model_path, encoders, loaded, variant=variant, drop_t5=drop_t5)


def cast(export: Export, dtype: torch.dtype | None) -> None:
    """Cast the encoders to `dtype` (None: as loaded) in place; UserError for weights that overflow it."""
    for i, encoder in export.encoders.items():
        encoder.model.to(dtype or encoder.model.dtype)
        if not all(tensor.isfinite().all() for tensor in encoder.model.state_dict().values()):
            raise UserError(
                f"{export.loaded[i]['file']} does not fit into {dtype}, which it overflows; use --dtype bf16 or fp32"
            )


def check_fits(name: str, model_path: str, indices: list[int], drop_t5: bool = False) -> None:
    """Raise UserError if a format does not support a model or one of its text encoders; reads no weights."""
    if read_index(model_path) is None:
        raise UserError(f"{model_path} has no model_index.json; exports need a whole pipeline")
    for i in indices:
        if subfolder_of(model_path, i) not in text_encoders(model_path, drop_t5).values():
            raise UserError(f"--drop_t5 leaves out text encoder {i}, for which a checkpoint is given; leave one of them out")
    family = family_of(model_path)
    if not exports_to(family, name):
        suits = ", ".join(each.name for each in FAMILIES.values() if exports_to(each, name))
        raise UserError(f"--format {name} is for {suits}, but {model_path} is {family.name} ({family.pipeline})")


def verify(export: Export, read: Mapping[int, nn.Module], exact: bool = True) -> None:
    """Raise UserError unless the encoders read back are those exported: the same weights (`exact`) and the same embeddings."""
    for i, encoder in export.encoders.items():
        again, dtype = read[i], encoder.model.dtype
        what = f"text encoder {i}, read back from the export,"
        empty = [name for name, tensor in again.state_dict().items() if tensor.is_meta]
        if empty:
            raise UserError(f"{what} lacks {len(empty)} weights, `{empty[0]}` first; nothing was kept")
        if exact and fingerprint(again) != fingerprint(encoder.model):
            raise UserError(f"{what} has other weights than the protected one; nothing was kept")
        ids = encoder.tokenize(PROMPTS)
        for ours, theirs in zip(outputs(encoder.model, ids), outputs(again, ids), strict=True):
            if not ours.isfinite().all():
                raise UserError(f"text encoder {i} overflows in {dtype}; use --dtype bf16 or fp32")
            if ours.shape != theirs.shape or not (ours - theirs).abs().max() <= _TOLERANCE[dtype] * ours.abs().max():
                raise UserError(f"{what} gives other embeddings than the protected one; nothing was kept")


@torch.inference_mode()
def outputs(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Return every output tensor of an encoder for token ids [batch, tokens], in fp32: hidden states, pooled, projected."""
    given = model.eval()(input_ids=ids.to(next(model.parameters()).device)).to_tuple()
    return [tensor.float() for tensor in given if isinstance(tensor, Tensor)]


def comfyui_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name an encoder's tensors for ComfyUI's CLIPLoader and DualCLIPLoader: transformers 4.x's names, without T5's tied copy."""
    plain = plain_names(state)
    named = published_names(state) | ({PROJECTION: plain[PROJECTION]} if PROJECTION in plain else {})
    return {name: tensor for name, tensor in named.items() if name != _T5_COPY}


def _write_pipeline(export: Export, folder: Path) -> None:
    """Write a folder with each component's weights once, under names without a variant.

    Everything else that may contain weights is left out: single files beside the components, as hub repositories have, and other
    variants and formats hold the unprotected encoder.
    """
    replaced = [encoder.subfolder for encoder in export.encoders.values()]
    kept = [name for name, kind in export.components.items() if kind and name not in replaced]
    files = fetch(export.model_path, kept, export.variant)
    weights = [path for name, variant in files.variants.items() for path in weight_files(files.folder / name, variant)]
    check_room(folder, sum(path.stat().st_size for path in weights) + export.size)
    folder.mkdir()
    for name in (".", *kept):
        (folder / name).mkdir(exist_ok=True)
        for path in (files.folder / name).glob("*"):
            is_weights = path.name.endswith(WEIGHT_SUFFIXES) or ".index." in path.name
            if path.is_file() and not (is_weights or path.name.startswith(".") or path.name == "README.md"):
                shutil.copyfile(path, folder / name / path.name)
        if name in files.variants:
            copy_weights(files.folder / name, folder / name, files.variants[name])
    if export.drop_t5:
        index = {name: [None, None] for name, kind in export.components.items() if kind is None}
        write_json(folder / INDEX, read_json(str(folder), INDEX) | index)
    for i, encoder in export.encoders.items():
        _save_described(export, i, folder / encoder.subfolder)


def _save_described(export: Export, index: int, folder: Path) -> None:
    """Save an encoder with `save_published`, and add its metadata to the headers of the safetensors files."""
    save_published(export.encoders[index].model, folder)
    for path in folder.glob("*.safetensors"):
        with replacing(path, size=path.stat().st_size) as temporary, path.open("rb") as old, temporary.open("wb") as new:
            header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
            header["__metadata__"] = header.get("__metadata__", {}) | export.metadata(index)
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            new.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(old, new, 2**24)


def _read_pipeline(export: Export, folder: Path) -> dict[int, nn.Module]:
    dtypes = {encoder.subfolder: encoder.model.dtype for encoder in export.encoders.values()}
    absent = {name: None for name, kind in export.components.items() if kind is None}
    with loading("the exported pipeline"):
        dtype = dtype_option("diffusers", {"default": torch.bfloat16} | dtypes)
        pipe = DiffusionPipeline.from_pretrained(folder, **dtype, **absent)
    return {i: getattr(pipe, encoder.subfolder).to(encoder.model.dtype) for i, encoder in export.encoders.items()}


def _hf_folder(export: Export, folder: Path, encoder: TextEncoder) -> Path:
    return folder if len(export.encoders) == 1 else folder / encoder.subfolder


def _write_hf(export: Export, folder: Path) -> None:
    for i, encoder in export.encoders.items():
        _save_described(export, i, _hf_folder(export, folder, encoder))


def _read_hf(export: Export, folder: Path) -> dict[int, nn.Module]:
    def read(encoder: TextEncoder) -> PreTrainedModel:
        dtype, place = encoder.model.dtype, _hf_folder(export, folder, encoder)
        return load_model(type(encoder.model), str(place), "cpu", "the exported encoder", dtype).to(dtype)

    return {i: read(encoder) for i, encoder in export.encoders.items()}


def _comfyui_files(export: Export, folder: Path) -> dict[int, Path]:
    encoders = family_of(export.model_path).encoders
    return {i: folder / f"{encoders[i].comfyui}.safetensors" for i in export.encoders}


def comfyui_misfit(name: str, model: PreTrainedModel) -> str:
    """Describe how an encoder differs from the network that ComfyUI builds for a name in COMFYUI; empty if it does not.

    ComfyUI chooses a network of fixed sizes by the names of a file's tensors. It stops at other shapes, but ignores surplus layers,
    leaves missing ones without weights, and cannot see the number of heads or the activation.
    """
    expected = COMFYUI[name]
    if hasattr(model, "text_projection"):
        expected = expected | {"projection_dim": expected["hidden_size"]}
    given = {entry: getattr(model.config, entry, None) for entry in expected}
    differing = [entry for entry in expected if given[entry] != expected[entry]]
    return ", ".join(f"{entry} {given[entry]} instead of {expected[entry]}" for entry in differing)


def _write_comfyui(export: Export, folder: Path) -> None:
    folder.mkdir()
    for i, path in _comfyui_files(export, folder).items():
        misfit = comfyui_misfit(path.stem, export.encoders[i].model)
        if misfit:
            warning = (
                "ComfyUI cannot run %s, because text encoder %s is not of the size that ComfyUI builds for this file: it has %s"
            )
            logger.warning(warning + "; export the model with --format pipeline or hf", path.name, i, misfit)
        named = comfyui_names(export.encoders[i].model.state_dict())
        save_file({name: tensor.detach().contiguous() for name, tensor in named.items()}, path, export.metadata(i))


def _read_comfyui(export: Export, folder: Path) -> dict[int, nn.Module]:
    """Load strictly by name, since ComfyUI is not a library: NaN would remain in any parameter without a tensor."""
    read = {}
    for i, path in _comfyui_files(export, folder).items():
        loaded, blank = plain_names(read_tensors(path)), copy.deepcopy(export.encoders[i].model)
        own = {name.removeprefix("text_model."): name for name in blank.state_dict()}
        if _T5_COPY in own:
            loaded[_T5_COPY] = loaded["shared.weight"]
        with torch.no_grad():
            for parameter in blank.parameters():
                parameter.fill_(torch.nan)
        with loading(f"the exported {path.name}"):
            blank.load_state_dict({own[name]: tensor for name, tensor in loaded.items()}, strict=True)
        read[i] = blank
    return read


def read_base(path: Path) -> Base:
    """Read a single-file SD 1.x checkpoint; UserError if it has no text encoder.

    Tensors under NovelAI's names get the usual ones, and position ids that are not 0, 1, 2, ..., as after a merge, are repaired.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"--base_checkpoint {path} is not a .safetensors file")
    read = read_tensors(path)
    tensors = {_NOVELAI.sub(LDM_ENCODER, name): tensor for name, tensor in read.items()}
    if len(tensors) < len(read):
        raise UserError(f"{path} has two text encoders, under `{LDM_ENCODER}` and under NovelAI's names without `text_model.`")
    ids = tensors.get(_BUFFER)
    if ids is not None and not torch.equal(ids.double(), torch.arange(ids.numel()).double().reshape(ids.shape)):
        tensors[_BUFFER] = torch.arange(ids.numel()).reshape(ids.shape)
        logger.warning("the position ids of %s are not 0, 1, 2, ..., as after a merge; the export has repaired ones", path)
    with safe_open(path, "pt") as file:
        base = Base(path, tensors, file.metadata() or {"format": "pt"})
    if "final_layer_norm.bias" not in base.encoder:
        raise UserError(f"{path} is not a single-file checkpoint of SD 1.x: it has no text encoder under `{LDM_ENCODER}`")
    return base


def _single_file(export: Export, folder: Path) -> Path:
    return folder / f"{export.base.path.stem}-des.safetensors"


def _write_a1111(export: Export, folder: Path) -> None:
    base, there = export.base, export.base.encoder
    (encoder,) = export.encoders.values()
    state = published_names(encoder.model.state_dict())
    ours = {name.removeprefix("text_model."): tensor.detach().contiguous() for name, tensor in state.items()}
    odd = sorted(ours.keys() ^ there.keys())
    if odd:
        which = "lacks" if odd[0] in ours else "has the unknown tensor"
        raise UserError(f"{base.path} is of another encoder: it {which} `{LDM_ENCODER}{odd[0]}` ({len(odd)} tensors differ)")
    shapes = [name for name in sorted(ours) if ours[name].shape != there[name].shape]
    if shapes:
        theirs, expected = (tuple(each[shapes[0]].shape) for each in (there, ours))
        raise UserError(
            f"{base.path} is of another encoder: `{LDM_ENCODER}{shapes[0]}` has shape {theirs} instead of {expected}"
        )
    folder.mkdir()
    tensors = base.tensors | {LDM_ENCODER + name: tensor for name, tensor in ours.items()}
    metadata = {name: text for name, text in base.metadata.items() if not _OF_THE_BASE.search(name)} | export.metadata(1)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, _single_file(export, folder), metadata)


def _read_a1111(export: Export, folder: Path) -> dict[int, nn.Module]:
    (encoder,), base = export.encoders.values(), export.base.tensors
    written = read_tensors(_single_file(export, folder))
    ldm = {name: tensor for name, tensor in written.items() if name.startswith(LDM_ENCODER) and name != _BUFFER}
    if written.keys() != base.keys() or not all(_same_bytes(written[name], base[name]) for name in base.keys() - ldm.keys()):
        raise UserError("the export changed tensors beside the text encoder's; nothing was kept")
    config = fetch(export.model_path, [encoder.subfolder], with_weights=False).folder
    options = {"subfolder": encoder.subfolder, "config": str(config), "torch_dtype": encoder.model.dtype}
    with loading("the exported checkpoint"):
        return {1: create_diffusers_clip_model_from_ldm(type(encoder.model), ldm, **options)}


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)))


WRITERS: dict[str, Callable[[Export, Path], None]] = {
    "pipeline": _write_pipeline,
    "hf": _write_hf,
    "comfyui": _write_comfyui,
    "a1111": _write_a1111,
}
READERS: dict[str, Callable[[Export, Path], dict[int, nn.Module]]] = {
    "pipeline": _read_pipeline,
    "hf": _read_hf,
    "comfyui": _read_comfyui,
    "a1111": _read_a1111,
}
