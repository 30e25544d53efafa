"""What loads is what was asked for, or the program stops."""

import json
import os

from des.models.checkpoints import fingerprint, load_checkpoint, plain_names, save_checkpoint
from des.utils.errors import UserError

import pytest
import torch
from conftest import GOLDEN, published_form
from safetensors.torch import save_file
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


@pytest.mark.parametrize("prefix", ["text_model.", ""])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_both_namings_load(protected_checkpoint, encoder, prefix, suffix):
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    state = torch.load(protected_checkpoint, weights_only=True)["model_state_dict"]
    state = {prefix + name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    state[prefix + "embeddings.position_ids"] = torch.arange(77)[None]  # a constant that old files carry
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
        (lambda state: {"module." + name: tensor for name, tensor in state.items()}, "does not fit"),
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


def test_damaged_files_and_code_are_refused(tmp_path, protected_checkpoint, encoder):
    whole = protected_checkpoint.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        protected_checkpoint.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a complete checkpoint"):
            load_checkpoint(encoder, protected_checkpoint)
    torch.save({"model_state_dict": Code(tmp_path / "it-ran")}, tmp_path / "code.pt")
    with pytest.raises(UserError, match="contains code"):
        load_checkpoint(encoder, tmp_path / "code.pt")
    assert not (tmp_path / "it-ran").exists()
    with pytest.raises(UserError, match="the checkpoint file"):
        load_checkpoint(encoder, tmp_path / "missing.pt")
