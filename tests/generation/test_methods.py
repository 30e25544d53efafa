"""The defences that users compare with: what their files must be, and that no image is drawn under a name that was not loaded."""

import json
import shutil

from des.models.checkpoints import fingerprint
from des.models.pipelines import open_pipeline

import numpy as np
import pytest
import torch
from conftest import GOLDEN, flags
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import build
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

KEY = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture
def model(family):
    return family("sd_v1")


@pytest.fixture
def unet(model):
    return open_pipeline(str(model), torch.float32).unet


@pytest.fixture
def generate(call, tmp_path, monkeypatch, model):
    """Draw one image with a method; returns how the script ended."""
    monkeypatch.chdir(tmp_path)

    def run(method, **options):
        common = {"model_path": model, "device": "cpu", "prompt": "a dog", "output_path": "t2i", "num_inference_steps": 2}
        return call("generate.py", *flags(training_method=method, **common | options))

    return run


def image(tmp_path, method, model="sd_v1"):
    return np.asarray(Image.open(tmp_path / f"results/{method}/{model}/t2i/t2i_{method}_0p.png")).astype(int)


def adapters(unet):
    """An SPM file's tensors for one Linear of the UNet's transformers."""
    name = "lora_unet_" + KEY.removesuffix(".weight").replace(".", "_")
    outputs, inputs = unet.get_parameter(KEY).shape
    parts = {"lora_down.weight": torch.ones(1, inputs), "lora_up.weight": torch.ones(outputs, 1), "alpha": torch.tensor(0.5)}
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


@pytest.mark.parametrize("method", ["esd", "uce", "fmn", "salun", "spm"])
def test_unet_methods_draw_something_else(generate, model, unet, tmp_path, method):
    file, whole = tmp_path / "f.safetensors", method in ("fmn", "salun")
    state = {name: tensor + 0.02 for name, tensor in unet.state_dict().items() if whole or name == KEY}
    save_file(adapters(unet) if method == "spm" else state, file)
    options = {"adapter_path" if method == "spm" else "unet_path": file}
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
                patched.delitem(__import__("sys").modules, "des.generation.defences", raising=False)
            done = generate(method, results_dir=results, **options)
        assert done.code == 0, done.err
        record = json.loads((tmp_path / f"{results}/{method}/sd_v1/t2i/run.json").read_text())
        assert record["settings"]["text_encoder_sha256"] == expected
    assert asked == [{"advunlearn": "OPTML-Group/AdvUnlearn", "visu": "aimagelab/safeclip_vit-l_14"}[method]]


def test_safegen_must_differ_from_what_it_was_made_from(generate, model, tmp_path):
    safegen = tmp_path / "SafeGen"
    shutil.copytree(model, safegen)
    done = generate("safegen", model_path=safegen, base_model_path=model)
    assert done.failed_in_one_sentence and "is not SafeGen" in done.err
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
    torch.save({"a": torch.ones(1)}, tmp_path / "u.pt")
    options = {
        "training_method": "esd",
        "unet_path": "u.pt",
        "model_path": flux,
        "prompt": "a",
        "output_path": "t",
        "device": "cpu",
    }
    done = call("generate.py", *flags(**options))
    assert done.failed_in_one_sentence and "FluxPipeline has none" in done.err
