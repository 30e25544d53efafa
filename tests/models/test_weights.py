"""Rounded weights are the model's own, and a checkpoint knows its base: what counts as protection, and what as another model."""

import json
import shutil

from des.generation.unet_defences import load_unet_weights
from des.models.checkpoints import base_sketch, fingerprint, load_checkpoint, save_checkpoint
from des.models.weights import distance, same_weights, sketch
from des.utils.errors import UserError

import pytest
import torch
from conftest import GOLDEN, published_form
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

ROUNDED = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture
def encoder():
    return CLIPTextModel.from_pretrained(GOLDEN / "A/model/text_encoder")


def write(state, path):
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    return path


@pytest.mark.parametrize("model", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float64, *ROUNDED])
@pytest.mark.parametrize("widened", [False, True])
def test_the_original_in_any_float_type_is_the_original(encoder, tmp_path, model, stored, widened):
    state = {name: tensor.to(stored) for name, tensor in encoder.state_dict().items()}
    state = {name: tensor.float() if widened else tensor for name, tensor in state.items()}
    torch.save({"model_state_dict": state}, tmp_path / "c.pt")
    encoder.to(model)
    before = fingerprint(encoder)
    with pytest.raises(UserError, match="does not change the encoder"):
        load_checkpoint(encoder, tmp_path / "c.pt")
    assert fingerprint(encoder) == before


def test_types_may_be_mixed_and_a_trained_encoder_may_be_rounded(encoder, tmp_path):
    own = encoder.state_dict()
    mixed = {name: tensor.to(ROUNDED[i % 4]) if tensor.ndim > 1 else tensor for i, (name, tensor) in enumerate(own.items())}
    with pytest.raises(UserError, match="does not change the encoder"):
        load_checkpoint(encoder, write(mixed, tmp_path / "mixed.safetensors"))
    torch.manual_seed(0)
    trained = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in own.items()}
    for i, dtype in enumerate(ROUNDED):
        loaded = load_checkpoint(
            CLIPTextModel.from_pretrained(GOLDEN / "A/model/text_encoder"),
            write({name: tensor.to(dtype) for name, tensor in trained.items()}, tmp_path / f"{i}.safetensors"),
        )
        assert len(loaded["encoder_sha256"]) == len(loaded["file_sha256"]) == 64


def test_a_change_below_rounding_is_no_rounding():
    own = {"weight": torch.full((4, 4), 0.3), "bias": torch.zeros(4)}
    assert not same_weights(own, own | {"weight": torch.full((4, 4), 0.30003)})
    assert not same_weights(own, own | {"bias": torch.full((4,), 1e-9)})
    assert not same_weights(own, own | {"bias": torch.full((4,), torch.nan)})
    half_way = {"weight": torch.tensor([1 + 2**-8])}  # between two numbers of bf16: rounded to either, but not beyond
    assert same_weights(half_way, {"weight": torch.tensor([1 + 2**-7])}) and same_weights(half_way, {"weight": torch.ones(1)})
    assert not same_weights(half_way, {"weight": torch.tensor([1 + 2**-6])})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_original_of_a_rounded_model_is_no_change(dtype):
    torch.manual_seed(0)
    exact = {"weight": torch.randn(64, 64), "bias": torch.randn(64)}
    rounded = {name: tensor.to(dtype).float() for name, tensor in exact.items()}
    assert same_weights(rounded, exact)
    step = 1e-4 * torch.randn(64, 64)  # ten steps of training at 1e-5
    assert not same_weights(rounded, exact | {"weight": rounded["weight"] + step})


@pytest.mark.parametrize("dtype", ROUNDED)
def test_the_original_unet_in_another_type_is_refused(tiny_pipeline, tmp_path, dtype):
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet")
    state = {name: tensor.to(dtype) for name, tensor in unet.state_dict().items()}
    torch.save(state, tmp_path / "whole.pt")
    one = next(name for name in state if "attn2.to_k" in name)
    torch.save({one: state[one]}, tmp_path / "part.pt")
    for file in ("whole.pt", "part.pt"):
        with pytest.raises(UserError, match="does not change the UNet"):
            load_unet_weights(unet, tmp_path / file)


def test_safegen_of_the_original_unet_in_another_type_is_refused(call, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_pipeline, "SafeGen")
    file = next((tmp_path / "SafeGen/unet").glob("*.safetensors"))
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    done = call("generate.py", "--training_method", "safegen", "--model_path", "SafeGen", "--base_model_path", tiny_pipeline,
                "--device", "cpu", "--prompt", "a dog", "--output_path", "t2i")  # fmt: skip
    assert done.failed_in_one_sentence and "is not SafeGen" in done.err
    assert not (tmp_path / "results").exists()


def noisy(encoder, size):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(size * parameter.abs().mean() * torch.randn_like(parameter))
    return encoder


def checkpoint(tmp_path, encoder, **metadata):
    """A checkpoint of `encoder`, trained, with the sketch of what it was before."""
    facts = {"base_sketch": base_sketch(encoder), "base_encoder_sha256": fingerprint(encoder)} | metadata
    return save_checkpoint(tmp_path / "checkpoint-1", encoder, noisy(encoder, 0.5).state_dict(), facts)


def test_another_base_is_named_with_its_distance(encoder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("des.utils.logs.logger.propagate", True)
    path = checkpoint(tmp_path, encoder)

    def base(size=0.0, kind=CLIPTextModel):
        return noisy(kind.from_pretrained(GOLDEN / "A/model/text_encoder"), size)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert load_checkpoint(base().to(dtype), path)["base_distance"] == 0
    assert load_checkpoint(base().half().bfloat16(), path)["base_distance"] < 0.003  # as SD3's file is read
    assert load_checkpoint(base(kind=CLIPTextModelWithProjection), path)["base_distance"] == 0
    assert "another base" not in caplog.text
    apart = load_checkpoint(base(0.1), path)["base_distance"]
    assert 0.03 < apart < 0.3
    assert "trained from another base encoder" in caplog.text and f"difference of the weights is {apart:.3g}" in caplog.text
    unrelated = CLIPTextModel(encoder.config)
    assert load_checkpoint(unrelated, path)["base_distance"] > 1


def test_another_base_is_named_without_a_sketch(encoder, tmp_path, caplog, monkeypatch):
    """Metadata of earlier versions has a hash of the base, which is of fp32."""
    monkeypatch.setattr("des.utils.logs.logger.propagate", True)
    path = checkpoint(tmp_path, encoder, base_sketch=None)
    for same in (CLIPTextModel, CLIPTextModelWithProjection):
        for dtype in (torch.float32, torch.bfloat16):
            load_checkpoint(same.from_pretrained(GOLDEN / "A/model/text_encoder").to(dtype), path)
    assert "another base" not in caplog.text
    assert "base_distance" not in load_checkpoint(
        noisy(CLIPTextModel.from_pretrained(GOLDEN / "A/model/text_encoder"), 0.1), path
    )
    assert "another base" in caplog.text


def test_a_sketch_is_small_and_measures(encoder):
    state = encoder.state_dict()
    assert len(sketch(state)) < 32 * len(state)
    assert distance(sketch(state), state) == 0
    assert distance(sketch(state), {name: 2 * tensor for name, tensor in state.items()}) == pytest.approx(1)
    for damaged in ("", "?", "AAAA"):
        assert distance(damaged, state) is None


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "hf"])
def test_metadata_of_another_checkpoint_is_refused(encoder, tmp_path, suffix):
    base = CLIPTextModel.from_pretrained(GOLDEN / "A/model/text_encoder")
    mine = save_checkpoint(tmp_path / "mine", encoder, noisy(encoder, 0.1).state_dict(), {"concept_prompt": "mushroom"}, suffix)
    loaded = load_checkpoint(base, mine)
    assert loaded["concept_prompt"] == "mushroom" and loaded["file_sha256"]
    other = save_checkpoint(tmp_path / "other", encoder, noisy(encoder, 0.1).state_dict(), {"concept_prompt": "house"}, suffix)
    shutil.copy(tmp_path / "other-metadata.json", tmp_path / "mine-metadata.json")
    before = fingerprint(base)
    with pytest.raises(UserError, match=r"is not the checkpoint that .*mine-metadata\.json describes"):
        load_checkpoint(base, mine)
    assert fingerprint(base) == before
    assert load_checkpoint(base, other)["concept_prompt"] == "house"
    (tmp_path / "mine-metadata.json").unlink()
    assert "concept_prompt" not in load_checkpoint(CLIPTextModel.from_pretrained(GOLDEN / "A/model/text_encoder"), mine)


def test_the_same_weights_in_another_format_and_metadata_without_hashes_load(encoder, tmp_path):
    base = CLIPTextModel.from_pretrained(GOLDEN / "A/model/text_encoder")
    path = save_checkpoint(tmp_path / "c", encoder, noisy(encoder, 0.1).state_dict(), {"concept_prompt": "mushroom"})
    save_file(torch.load(path, weights_only=True)["model_state_dict"], tmp_path / "c.safetensors")
    assert load_checkpoint(base, tmp_path / "c.safetensors")["concept_prompt"] == "mushroom"
    published = published_form(GOLDEN / "A/model", tmp_path / "p.pt")
    content = torch.load(published, weights_only=True)
    torch.save({"model_state_dict": {name: tensor + 0.05 for name, tensor in content["model_state_dict"].items()}}, published)
    (tmp_path / "p-metadata.json").write_text(json.dumps({"concept_prompt": "house"}))
    assert load_checkpoint(base, published)["concept_prompt"] == "house"
