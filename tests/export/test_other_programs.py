"""Exports as docs/exports.md uses them in other programs: plain diffusers, A1111's single files, ComfyUI."""

import os
import re
import subprocess
import sys
from dataclasses import replace

from des.export.formats import LDM_ENCODER, WRITERS, Export, comfyui_misfit, comfyui_names, read_base
from des.models.checkpoints import fingerprint
from des.models.encoders import load_encoder
from des.utils.errors import UserError

import numpy as np
import pytest
import torch
from conftest import ROOT, flags
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_export import PUBLISHED, SCRIPT, assert_same_embeddings, clip_names, described, export
from test_model_card import run_python
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel


def test_plain_diffusers_draws_the_images_of_generate(call, tiny_pipeline, protected_checkpoint, tmp_path, monkeypatch):
    """The page's block is run as it is, apart from its paths, device and number of steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.csv").write_text("prompt\na grey cat\na red kettle\n")
    common = {"model_path": tiny_pipeline, "text_encoder_path": protected_checkpoint}
    done = call(SCRIPT, *flags(**common, format="pipeline", out="des-pipeline"))
    assert done.code == 0, done.err
    common |= {"device": "cpu", "prompts_csv": "prompts.csv", "output_path": "t2i", "num_inference_steps": 2, "batch_size": 1}
    for method in ("des", None):
        options = common | {"training_method": method, "text_encoder_path": protected_checkpoint if method else None}
        done = call("generate.py", *flags(**options))
        assert done.code == 0, done.err
    page = (ROOT / "docs/exports.md").read_text(encoding="utf-8")
    block = re.search(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[1]
    changes = {"exports/des-pipeline": "des-pipeline", "cuda:0": "cpu", "num_inference_steps=50": "num_inference_steps=2"}
    for before, after in changes.items():
        assert block.count(before) == 1
        block = block.replace(before, after)
    run_python(block, tmp_path)
    for row in range(2):
        plain, des, none = (
            np.asarray(Image.open(path))
            for path in (f"{row}.png", *(f"results/{m}/tiny-sd/t2i/t2i_{m}_{row}p.png" for m in ("des", "none")))
        )
        assert np.array_equal(plain, des) and not np.array_equal(plain, none)


def single_file(model, path, dtype=torch.float16, drop=(), metadata=None, **other):
    """A stand-in for a single-file SD 1.x checkpoint: the original encoder under its names, and other tensors."""
    encoder = load_encoder(str(model)).model.to(dtype)
    tensors = {"cond_stage_model.transformer." + name: tensor for name, tensor in comfyui_names(encoder.state_dict()).items()}
    tensors[LDM_ENCODER + "embeddings.position_ids"] = torch.arange(77)[None]
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.randn(8, 4, 3, 3).half()
    tensors["first_stage_model.decoder.conv_in.bias"] = torch.randn(5)
    tensors["model_ema.decay"] = torch.tensor(0.9999, dtype=torch.float64)
    tensors |= other
    metadata = {"format": "pt", "made": "here"} | (metadata or {})
    save_file({name: tensor for name, tensor in tensors.items() if name not in drop}, path, metadata)
    return path


def test_a1111_replaces_the_encoder_and_nothing_else(call, tiny_pipeline, tmp_path):
    base = single_file(tiny_pipeline, tmp_path / "v1-5.safetensors")
    done, encoders = export(call, tiny_pipeline, tmp_path, "a1111", base_checkpoint=base)
    assert done.code == 0, done.err
    written = tmp_path / "out/v1-5-des.safetensors"
    before, after = load_file(base), load_file(written)
    assert after.keys() == before.keys()
    expected = {"cond_stage_model.transformer." + name for name in clip_names(2)}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == expected and {after[name].dtype for name in changed} == {torch.float16}
    with safe_open(written, "pt") as file:
        assert file.metadata()["made"] == "here" and described(file.metadata(), encoders[1], tmp_path)
    original = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    parts = {"unet": original.unet, "vae": original.vae, "safety_checker": None}  # the stand-in has no whole ones
    pipe = StableDiffusionPipeline.from_single_file(written, config=str(tiny_pipeline), local_files_only=True, **parts)
    encoders[1].model.half().float()  # as rounded in the file
    assert fingerprint(pipe.text_encoder) == fingerprint(encoders[1].model) != fingerprint(original.text_encoder)
    assert_same_embeddings(encoders[1], pipe.text_encoder, 1e-5)


def test_an_a1111_base_as_merges_leave_it(call, tiny_pipeline, tmp_path):
    """NovelAI's names, an infinite schedule, the base's hashes and title, position ids that a merge has averaged."""
    ids, schedule = LDM_ENCODER + "embeddings.position_ids", {"log_one_minus_alphas_cumprod": torch.full((3,), -torch.inf)}
    stale = {"modelspec.hash_sha256": "0x1", "sshs_model_hash": "2", "modelspec.title": "Base", "modelspec.author": "me"}
    usual = load_file(single_file(tiny_pipeline, tmp_path / "usual.safetensors", metadata=stale, **schedule))
    renamed = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in usual.items()}
    broken = {ids.replace("text_model.", ""): (0.999 * torch.arange(77))[None].half()}
    save_file(renamed | broken, tmp_path / "nai.safetensors", {"format": "pt"} | stale)
    done, _ = export(call, tiny_pipeline, tmp_path, "a1111", base_checkpoint=tmp_path / "nai.safetensors")
    assert done.code == 0 and "position ids" in done.err, done.err
    written = tmp_path / "out/nai-des.safetensors"
    after = load_file(written)
    assert after.keys() == usual.keys() and torch.equal(after[ids], torch.arange(77)[None])
    assert {name for name in usual if not torch.equal(usual[name], after[name])} == {"cond_stage_model.transformer." + name for name in clip_names(2)}  # fmt: skip
    with safe_open(written, "pt") as file:
        assert file.metadata().keys() == {"format", "modelspec.author", "des"}
    save_file(usual | {name: tensor.clone() for name, tensor in renamed.items()}, tmp_path / "both.safetensors")
    with pytest.raises(UserError, match="two text encoders"):
        read_base(tmp_path / "both.safetensors")


def test_an_a1111_base_without_all_of_the_encoder_leaves_nothing(call, tiny_pipeline, tmp_path):
    lost = LDM_ENCODER + "encoder.layers.1.mlp.fc2.bias"
    base = single_file(tiny_pipeline, tmp_path / "base.safetensors", drop=(lost,))
    done, _ = export(call, tiny_pipeline, tmp_path, "a1111", base_checkpoint=base)
    assert done.failed_in_one_sentence and lost in done.err
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_comfyui_runs_the_published_sizes_and_no_others(name):
    model_class, config = PUBLISHED[name][:2]
    changes = {"num_hidden_layers": 2, "hidden_size": 960, "num_attention_heads": 8, "vocab_size": 49409, "hidden_act": "relu"}
    if model_class is T5EncoderModel:
        changes = {"num_layers": 2, "d_model": 2048, "num_heads": 8, "vocab_size": 32200}
    elif model_class is CLIPTextModelWithProjection:
        changes["projection_dim"] = 512
    with torch.device("meta"):
        model = model_class(config)
    assert comfyui_misfit(name.split()[0], model) == ""
    for entry, value in changes.items():
        model.config = type(config)(**config.to_dict() | {entry: value})
        assert comfyui_misfit(name.split()[0], model).startswith(f"{entry} {value} instead of ")


def test_a_file_that_comfyui_cannot_run_warns(call, tiny_pipeline, tmp_path):
    done, _ = export(call, tiny_pipeline, tmp_path, "comfyui")
    assert done.code == 0 and "ComfyUI cannot run clip_l.safetensors" in done.err
    assert "hidden_size 32 instead of 768" in done.err and "--format pipeline or hf" in done.err
    assert "of the sizes of CLIP-L" in (tmp_path / "out/README.md").read_text()


COMFYUI = """
import sys
sys.path.insert(0, ".")
import torch
from comfy.cli_args import args
args.cpu = args.fp32_text_enc = True
import comfy.sd
from safetensors.torch import save_file
with torch.inference_mode():
    clip = comfy.sd.load_clip([sys.argv[1]], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
    tokens = clip.tokenize("a red bicycle in front of a brick wall")
    embedding = clip.encode_from_tokens(tokens).float().contiguous()
save_file({"ids": torch.tensor([[token for token, _ in tokens["l"][0]]]), "embedding": embedding}, sys.argv[2])
"""


@pytest.mark.skipif("COMFYUI_DIR" not in os.environ, reason="COMFYUI_DIR names no checkout of ComfyUI")
def test_comfyui_itself_computes_the_protected_embeddings(tiny_pipeline, tmp_path):
    """An encoder of CLIP-L's size; the Python that runs the tests needs ComfyUI's requirements."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    torch.manual_seed(0)
    encoder = replace(load_encoder(str(tiny_pipeline)), model=CLIPTextModel(CLIPTextConfig(**sizes)).eval())
    hashes = {"original_sha256": "0", "file_sha256": "0"}
    WRITERS["comfyui"](Export(str(tiny_pipeline), {1: encoder}, {1: hashes}), tmp_path / "out")
    read = [str(tmp_path / name) for name in ("out/clip_l.safetensors", "read.safetensors")]
    done = subprocess.run([sys.executable, "-c", COMFYUI, *read], cwd=os.environ["COMFYUI_DIR"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = load_file(read[1])
    with torch.inference_mode():
        ours = encoder.model(input_ids=theirs["ids"]).last_hidden_state
    torch.testing.assert_close(theirs["embedding"], ours, atol=1e-4, rtol=1e-4)
