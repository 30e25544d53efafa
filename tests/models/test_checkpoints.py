"""What loads is what was asked for, or the program stops."""

import argparse
import json
import os

from des.models.checkpoints import fingerprint, load_checkpoint, plain_names, save_checkpoint
from des.models.tensor_files import read_tensors
from des.utils.errors import UserError

import numpy as np
import pytest
import torch
from conftest import GOLDEN, published_form
from safetensors.torch import save_file
from tiny import t5
from transformers import CLIPTextModel


@pytest.fixture
def encoder():
    return CLIPTextModel.from_pretrained(GOLDEN / "A/model/text_encoder")


def edited(path, change):
    """Rewrite a checkpoint with its `model_state_dict` changed."""
    content = torch.load(path, weights_only=True)
    content["model_state_dict"] = change(content["model_state_dict"])
    torch.save(content, path)
    return path


PREFIXES = [
    "text_model.", "", "module.", "_orig_mod.text_model.", "module._orig_mod.text_encoder.text_model.",
    "text_encoders.clip_l.transformer.text_model.",
]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_names_with_prefixes_load(protected_checkpoint, encoder, prefix, suffix):
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    state = torch.load(protected_checkpoint, weights_only=True)["model_state_dict"]
    state = {prefix + name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    state[prefix + "embeddings.position_ids"] = torch.arange(77)[None]  # a constant that old files carry
    state = {name.replace("layers.1.", "layers.1._orig_mod."): tensor for name, tensor in state.items()}  # one compiled layer
    state["vision_model.embeddings.class_embedding"] = torch.zeros(3)  # of a whole CLIPModel
    path = protected_checkpoint.with_suffix(suffix)
    torch.save({"model_state_dict": state}, path) if suffix == ".pt" else save_file(state, path)
    load_checkpoint(encoder, path)
    for name, tensor in encoder.state_dict().items():
        torch.testing.assert_close(tensor, before[name] + 0.05)


def test_what_is_saved_loads_in_the_published_form(tmp_path, encoder):
    base = fingerprint(encoder)
    with torch.no_grad():
        plain_names(encoder.state_dict())["final_layer_norm.bias"].add_(1)
    assert (
        save_checkpoint(tmp_path / "checkpoint-1", encoder, encoder.state_dict(), {"epoch": 1}) == tmp_path / "checkpoint-1.pt"
    )
    content = torch.load(tmp_path / "checkpoint-1.pt", weights_only=True)
    assert all(name.startswith("text_model.") for name in content["model_state_dict"])
    fresh = CLIPTextModel.from_pretrained(GOLDEN / "A/model/text_encoder")
    loaded = load_checkpoint(fresh, tmp_path / "checkpoint-1.pt")
    assert loaded["epoch"] == 1
    assert loaded["encoder_sha256"] == fingerprint(fresh) == fingerprint(encoder) != base
    assert json.loads((tmp_path / "checkpoint-1-metadata.json").read_text())["encoder_sha256"] == fingerprint(encoder)


def test_weights_are_cast_to_the_encoders_dtype(protected_checkpoint, encoder):
    encoder.to(torch.bfloat16)
    load_checkpoint(encoder, protected_checkpoint)
    assert {tensor.dtype for tensor in encoder.state_dict().values()} == {torch.bfloat16}


NAME = "text_model.encoder.layers.1.mlp.fc1.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda state: {name: tensor for name, tensor in state.items() if name != NAME},
            "lacks `encoder.layers.1.mlp.fc1.weight`",
        ),
        (lambda state: state | {NAME: state[NAME][:-1]}, "made for another encoder"),
        (lambda state: state | {"text_model.extra.weight": torch.ones(1)}, "unknown tensor `extra.weight`"),
        (lambda state: {"model." + name: tensor for name, tensor in state.items()}, "does not fit"),
        (
            lambda state: state | {f"text_encoder_2.{name}": tensor for name, tensor in state.items()},
            "twice, with different prefixes",
        ),
        (lambda state: {name.removeprefix("text_model.encoder."): tensor for name, tensor in state.items()}, "does not fit"),
        (lambda state: state | {NAME: state[NAME] * torch.nan}, "NaN"),
        (lambda state: state | {NAME: torch.full(state[NAME].shape, torch.nan).to(torch.float8_e4m3fn)}, "NaN"),
        (lambda state: state | {NAME: state[NAME].to_sparse()}, "not a dense tensor"),
        (lambda state: state | {NAME: state[NAME].to("meta")}, "not a dense tensor"),
        (lambda state: state | {NAME.removeprefix("text_model."): state[NAME]}, "twice"),
        (lambda state: {}, "no `model_state_dict`"),
        (lambda state: {"weights": [1.0, 2.0]}, "no `model_state_dict`"),
    ],
)
def test_anything_not_fully_matched_is_refused(protected_checkpoint, encoder, change, says):
    before = fingerprint(encoder)
    with pytest.raises(UserError, match=says):
        load_checkpoint(encoder, edited(protected_checkpoint, change))
    assert fingerprint(encoder) == before


def test_the_models_own_weights_are_refused(tmp_path, encoder):
    path = published_form(GOLDEN / "A/model", tmp_path / "base.pt")
    with pytest.raises(UserError, match="does not change the encoder"):
        load_checkpoint(encoder, path)


def test_a_checkpoint_of_another_width_is_refused(tmp_path, encoder, other_width):
    path = published_form(other_width, tmp_path / "wide.pt")
    with pytest.raises(UserError, match="made for another encoder"):
        load_checkpoint(encoder, path)


class Code:
    """An object whose unpickling would run code: it would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder),))


# torch before 2.6 cannot list the objects in a pickle without loading it
LISTED = hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint")


def test_damaged_files_and_code_are_refused(tmp_path, protected_checkpoint, encoder):
    whole = protected_checkpoint.read_bytes()
    for length in (0, 100, 5000, len(whole) // 2, len(whole) - 1):  # torch raises an OSError for 5,000 bytes
        protected_checkpoint.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a complete checkpoint"):
            load_checkpoint(encoder, protected_checkpoint)
    torch.save({"model_state_dict": Code(tmp_path / "it-ran")}, tmp_path / "code.pt")
    with pytest.raises(UserError, match="can be code" if LISTED else "contains code"):
        load_checkpoint(encoder, tmp_path / "code.pt")
    assert not (tmp_path / "it-ran").exists()
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(encoder, tmp_path / "missing.pt")


def saved(content):
    return lambda path: torch.save(content, path)


def wrote(content):
    return lambda path: path.write_bytes(content)


SCALED = {"a.weight": torch.zeros(2).to(torch.float8_e4m3fn), "a.scale_weight": torch.ones(1)}
EXTRAS = {"model_state_dict": {"a.weight": torch.zeros(1)}, "loss": np.float64(0.5), "args": argparse.Namespace(lr=1)}
OTHER_FILES = {
    "c.gguf": (wrote(b"GGUF\x03" + bytes(90)), "GGUF file"),
    "c.bin": (wrote(b"GGUF\x03" + bytes(90)), "GGUF file"),
    "c.ckpt": (wrote(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "pointer of Git LFS"),
    "c.safetensors": (wrote(b"\n<!DOCTYPE html><html></html>"), "web page"),
    "extras.pt": (saved(EXTRAS), "objects beside tensors .*`numpy.*can be code" if LISTED else "contains code"),
    "scaled.safetensors": (lambda path: save_file(SCALED, path), "scaled fp8 weights .*scale_weight.* not supported"),
    "marked.pt": (saved({"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}), "scaled fp8 weights"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_are_called_what_they_are(tmp_path, name):
    write, message = OTHER_FILES[name]
    write(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} .*{message}"):
        read_tensors(tmp_path / name)


def files(folder, **contents):
    """Write files below a folder by their path, in which `__` stands for `/` and `_dot_` for a dot."""
    for name, content in contents.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


OTHER_FOLDERS = {
    "a UNet": ({"config_dot_json": '{"_class_name": "UNet2DConditionModel"}', "diffusion_pytorch_model_dot_safetensors": ""},
               "the folder of a UNet2DConditionModel of diffusers"),
    "an adapter": ({"adapter_config_dot_json": "{}", "adapter_model_dot_safetensors": ""}, "is a peft adapter"),
    "a pipeline": ({"model_index_dot_json": "{}", "text_encoder__model_dot_safetensors": ""}, "is a whole pipeline.*/text_encoder$"),
    "a run": ({f"checkpoint-{i}{end}": "" for i in (10, 2) for end in ("_dot_pt", "-metadata_dot_json")} | {"state_dot_pt": ""},
              r"is not one checkpoint; pass one of those inside it: \S+/checkpoint-2.pt, \S+/checkpoint-10.pt$"),
    "folders of runs": ({f"run{i}__1e-05__c__pytorch_model_dot_bin": "" for i in range(7)}, r"run0/1e-05/c, .* and 2 more$"),
    "another folder": ({"notes_dot_txt": ""}, "has no model.safetensors or pytorch_model.bin"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FOLDERS)
def test_other_folders_are_called_what_they_are(tmp_path, name):
    contents, message = OTHER_FOLDERS[name]
    files(tmp_path, **contents)
    with pytest.raises(UserError, match=message):
        read_tensors(tmp_path)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_t5_in_fp8(tmp_path, stored, copies):
    """ComfyUI's t5xxl_fp8_e4m3fn.safetensors has both names of the token embedding."""
    encoder = t5(0).bfloat16()
    state = {
        name: tensor for name, tensor in encoder.state_dict().items() if copies == 2 or name != "encoder.embed_tokens.weight"
    }
    save_file({name: tensor.to(stored).clone() for name, tensor in state.items()}, tmp_path / "original.safetensors")
    with pytest.raises(UserError, match="does not change the encoder"):
        load_checkpoint(encoder, tmp_path / "original.safetensors")
    changed = {name: (tensor * 1.3).to(stored) for name, tensor in state.items()}
    save_file(changed, tmp_path / "protected.safetensors")
    load_checkpoint(encoder, tmp_path / "protected.safetensors")
    loaded = encoder.state_dict()
    assert all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in changed.items())
