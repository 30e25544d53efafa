"""The defences that users compare with: what their files must be, and that no image is drawn under a name that was not loaded."""

import json
import shutil

from des.baselines import load_unet_weights, merge_spm
from des.checkpoints import fingerprint
from des.cli import UserError
from des.pipelines import open_pipeline

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import build
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

KEY = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build("sd_v1", tmp_path_factory.mktemp("methods") / "sd_v1")


@pytest.fixture
def unet(model):
    return open_pipeline(str(model), torch.float32).unet


@pytest.fixture
def generate(call, tmp_path, monkeypatch, model):
    """Draw one image with a method; returns how the script ended."""
    monkeypatch.chdir(tmp_path)

    def run(method, **options):
        options = {
            "model_path": model,
            "device": "cpu",
            "prompt": "a dog",
            "output_path": "t2i",
            "num_inference_steps": 2,
        } | options
        return call(
            "generate.py",
            "--training_method",
            method,
            *[part for key, value in options.items() for part in (f"--{key}", value)],
        )

    return run


def image(tmp_path, method, model="sd_v1"):
    return np.asarray(Image.open(tmp_path / f"results/{method}/{model}/t2i/t2i_{method}_0p.png")).astype(int)


def saved(state, path, nest=None):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({nest: state} if nest else state, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("part", ["one tensor", "all"])
def test_unet_weights_whole_or_in_part(unet, tmp_path, suffix, part):
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    state = {name: tensor + 0.5 for name, tensor in before.items() if part == "all" or name == KEY}
    told = load_unet_weights(
        unet.half(), saved({name: tensor.double() for name, tensor in state.items()}, tmp_path / f"w{suffix}")
    )
    assert told["tensors"] == len(state)
    for name, tensor in unet.state_dict().items():
        assert tensor.dtype == torch.float16
        torch.testing.assert_close(tensor, state.get(name, before[name]).half())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda own: {KEY: own[KEY]}, "does not change the UNet"),
        (lambda own: own, "does not change the UNet"),
        (lambda own: {KEY: own[KEY] + 1, "unknown.weight": own[KEY]}, "`unknown.weight`"),
        (lambda own: {f"model.diffusion_model.{KEY}": own[KEY] + 1}, "CompVis"),
        (lambda own: {KEY: own[KEY][:-1] + 1}, "made for another UNet"),
        (lambda own: {KEY: own[KEY] * torch.nan}, "NaN"),
        (lambda own: {}, "no `model_state_dict` of tensors"),
    ],
)
def test_unet_weights_that_do_not_fit_change_nothing(unet, tmp_path, change, says):
    before = fingerprint(unet)
    with pytest.raises(UserError, match=says):
        load_unet_weights(
            unet, saved(change({name: tensor.clone() for name, tensor in unet.state_dict().items()}), tmp_path / "w.pt")
        )
    assert fingerprint(unet) == before


def adapters(unet, rank=1, alpha=0.5):
    """An SPM file's tensors for a Linear and a Conv2d of the UNet's transformers, and the layers."""
    torch.manual_seed(0)
    paths = [KEY.removesuffix(".weight"), "down_blocks.1.attentions.0.proj_in"]
    state, layers = {}, {}
    for path in paths:
        layer = unet.get_submodule(path)
        name = "lora_unet_" + path.replace(".", "_")
        tail = layer.weight.shape[2:]
        state[f"{name}.lora_down.weight"] = torch.randn(rank, layer.weight.shape[1], *tail)
        state[f"{name}.lora_up.weight"] = torch.randn(layer.weight.shape[0], rank, *[1] * len(tail))
        state[f"{name}.alpha"] = torch.tensor(alpha)
        layers[name] = layer
    return state, layers


@pytest.mark.parametrize("rank", [1, 3])
def test_spm_is_the_sum_of_layer_and_adapter(model, unet, tmp_path, rank):
    other = open_pipeline(str(model), torch.float32).unet
    state, layers = adapters(other, rank)
    assert {type(layer) for layer in layers.values()} == {nn.Linear, nn.Conv2d}
    for name, layer in layers.items():
        down, up = (state[f"{name}.lora_{part}.weight"] for part in ("down", "up"))
        apply = nn.functional.conv2d if isinstance(layer, nn.Conv2d) else nn.functional.linear
        layer.register_forward_hook(lambda _, inputs, out, f=apply, d=down, u=up: out + f(f(inputs[0], d), u) * 0.5 / rank)
    inputs = torch.randn(2, 4, 8, 8), 5, torch.randn(2, 77, 32)
    with torch.no_grad():
        plain, expected = unet(*inputs).sample, other(*inputs).sample
        told = merge_spm(unet, saved(state, tmp_path / "spm.safetensors"))
        torch.testing.assert_close(unet(*inputs).sample, expected, rtol=1e-4, atol=1e-5)
    assert told["tensors"] == 2 and (plain - expected).abs().max() > 1e-3


def test_spm_of_a_convolution_with_a_kernel():
    from des.baselines import _product

    down, up, x = torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1), torch.randn(1, 3, 6, 6)
    merged = _product(down, up, torch.tensor(2.0), torch.empty(5, 3, 3, 3), "it")
    torch.testing.assert_close(
        nn.functional.conv2d(x, merged), nn.functional.conv2d(nn.functional.conv2d(x, down), up), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: {key: value for key, value in state.items() if not key.endswith("alpha")}, "alpha is missing"),
        (lambda state: {key.replace("lora_unet", "lora_te"): value for key, value in state.items()}, "no layer"),
        (
            lambda state: {
                key: value[..., :-1] if key.endswith("to_k.lora_down.weight") else value for key, value in state.items()
            },
            "does not fit",
        ),
        (lambda state: {key: value * 0 if "up" in key else value for key, value in state.items()}, "does not change"),
        (lambda state: state | {next(iter(state)).replace("lora_down", "lora_mid"): torch.ones(1)}, "no adapters"),
    ],
)
def test_spm_files_that_do_not_fit_change_nothing(unet, tmp_path, change, says):
    before = fingerprint(unet)
    state, _ = adapters(unet)
    with pytest.raises(UserError, match=says):
        merge_spm(unet, saved(change({key: value.contiguous() for key, value in state.items()}), tmp_path / "spm.pt"))
    assert fingerprint(unet) == before


@pytest.mark.parametrize("method", ["esd", "uce", "fmn", "salun", "spm"])
def test_unet_methods_draw_something_else(generate, model, unet, tmp_path, method):
    if method == "spm":
        options = {"adapter_path": saved(adapters(unet)[0], tmp_path / "f.safetensors")}
    else:
        options = {
            "unet_path": saved(
                {
                    name: tensor + 0.02
                    for name, tensor in unet.state_dict().items()
                    if method in ("fmn", "salun") or name == KEY
                },
                tmp_path / "f.pt",
            )
        }
    assert generate("none").code == 0
    done = generate(method, **options)
    assert done.code == 0, done.err
    assert (image(tmp_path, method) != image(tmp_path, "none")).any()
    record = json.loads((tmp_path / f"results/{method}/sd_v1/t2i/run.json").read_text())
    assert record["protection"]["tensors"] >= 1 and len(record["protection"]["sha256"]) == 64


def other_encoder(folder, whole_clip):
    """A text encoder as AdvUnlearn (CLIPTextModel) or Safe-CLIP (a whole CLIPModel) publish it, with the tiny model's shapes."""
    torch.manual_seed(5)
    text = CLIPTextModel.from_pretrained(GOLDEN / "A/model/text_encoder")
    with torch.no_grad():
        for parameter in text.parameters():
            parameter.add_(0.03)
    if not whole_clip:
        text.save_pretrained(folder)
        return folder, fingerprint(text)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    both = CLIPModel(CLIPConfig(text_config=text.config.to_dict(), vision_config=vision, projection_dim=8))
    both.text_model.load_state_dict({name.removeprefix("text_model."): tensor for name, tensor in text.state_dict().items()})
    both.save_pretrained(folder)
    return folder, fingerprint(text)


@pytest.mark.parametrize(
    ("method", "whole_clip", "subfolder"), [("advunlearn", False, "nudity_unlearned"), ("visu", True, None)]
)
def test_published_text_encoders_from_the_hub_or_a_folder(generate, tmp_path, monkeypatch, method, whole_clip, subfolder):
    folder, expected = other_encoder(tmp_path / "hub" / (subfolder or ""), whole_clip)
    asked = []

    def snapshot_download(hub_id, allow_patterns):
        asked.append(hub_id)
        return str(tmp_path / "hub")

    for results, options in {"hub": {}, "local": {"text_encoder_path": folder}}.items():
        with monkeypatch.context() as patched:
            if results == "hub":
                patched.setattr("huggingface_hub.snapshot_download", snapshot_download)
                patched.delitem(__import__("sys").modules, "des.methods", raising=False)
            done = generate(method, results_dir=results, **options)
        assert done.code == 0, done.err
        record = json.loads((tmp_path / f"{results}/{method}/sd_v1/t2i/run.json").read_text())
        assert record["settings"]["text_encoder_sha256"] == expected
    assert asked == [{"advunlearn": "OPTML-Group/AdvUnlearn", "visu": "aimagelab/safeclip_vit-l_14"}[method]]


def test_safegen_must_differ_from_what_it_was_made_from(generate, model, tmp_path):
    safegen = tmp_path / "SafeGen"
    shutil.copytree(model, safegen)
    done = generate("safegen", model_path=safegen, base_model_path=model)
    assert done.failed_in_one_sentence and "is no SafeGen" in done.err
    assert not (tmp_path / "results").exists()
    file = next((safegen / "unet").glob("*.safetensors"))
    save_file({name: tensor + 0.02 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert generate("safegen", model_path=safegen, base_model_path=model).code == 0
    assert image(tmp_path, "safegen", "SafeGen").shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("des", {}), ("esd", {}), ("uce", {}), ("fmn", {}), ("salun", {}), ("spm", {}), ("none", {"text_encoder_path": "c.pt"}),
        ("esd", {"text_encoder_path": "c.pt"}), ("des", {"unet_path": "u.pt"}), ("spm", {"unet_path": "u.pt"}), ("esd", {"unet_path": "nowhere.pt"}),
        ("spm", {"adapter_path": "nowhere.pt"}), ("advunlearn", {"text_encoder_path": "nowhere"}), ("advunlearn", {}), ("visu", {}),
        ("safegen", {"base_model_path": "nowhere"}), ("visu", {"text_encoder_path": GOLDEN / "A/model/text_encoder"}),
    ],
)  # fmt: skip
def test_a_method_without_what_it_needs_draws_nothing(generate, tmp_path, method, options):
    done = generate(method, **options)
    assert done.failed_in_one_sentence, done.err
    assert not (tmp_path / "results").exists()


def test_safegen_needs_its_own_pipeline(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("generate.py", "--training_method", "safegen", "--prompt", "a", "--output_path", "t2i", "--device", "cpu")
    assert done.failed_in_one_sentence and "needs --model_path" in done.err


def test_a_unet_method_needs_a_unet(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flux = build("flux", tmp_path / "flux")
    saved({"a": torch.ones(1)}, tmp_path / "u.pt")
    done = call(
        ROOT / "generate.py",
        "--training_method",
        "esd",
        "--unet_path",
        "u.pt",
        "--model_path",
        flux,
        "--prompt",
        "a",
        "--output_path",
        "t",
        "--device",
        "cpu",
    )
    assert done.failed_in_one_sentence and "FluxPipeline has none" in done.err
