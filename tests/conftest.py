"""What the tests share: running the scripts, and tiny models of the real classes."""

import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path.insert(0, str(ROOT))


@dataclass
class Finished:
    """How a script ended."""

    code: int
    out: str
    err: str

    @property
    def failed_in_one_sentence(self) -> bool:
        """Whether it stopped with a non-zero code and one line that says why."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ") or ": error: " in line]
        return self.code != 0 and len(lines) == 1 and "Traceback" not in self.err


@pytest.fixture
def call(capfd, monkeypatch):
    """Run a script as `__main__` in this process, with its command line; returns how it ended."""

    def run(script: str, *argv: object) -> Finished:
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *map(str, argv)])
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        out, err = capfd.readouterr()
        return Finished(code, out, err)

    return run


def spawn(script: str, *argv: object, cwd: Path = ROOT) -> Finished:
    """Run a script in a process of its own."""
    command = [sys.executable, str(ROOT / script), *map(str, argv)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ)
    return Finished(done.returncode, done.stdout, done.stderr)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> Path:
    """A StableDiffusionPipeline with random weights, 16x16 images, and case A's text encoder and tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    torch.manual_seed(0)
    text_encoder = CLIPTextModel.from_pretrained(GOLDEN / "A/model/text_encoder")
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=32, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=AutoTokenizer.from_pretrained(GOLDEN / "A/model/tokenizer"), unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def other_width(tmp_path_factory) -> Path:
    """A folder with a text encoder of another width and the same tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "other-width"
    shutil.copytree(GOLDEN / "A/model/tokenizer", folder / "tokenizer")
    config = CLIPTextConfig.from_pretrained(GOLDEN / "A/model/text_encoder")
    config.hidden_size = 64
    torch.manual_seed(1)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture
def protected_checkpoint(tiny_pipeline, tmp_path) -> Path:
    """A checkpoint in the published form whose weights differ from the tiny pipeline's."""
    state = torch.load(published_form(tiny_pipeline, tmp_path / "checkpoint-2.pt"), weights_only=True)
    state["model_state_dict"] = {name: tensor + 0.05 for name, tensor in state["model_state_dict"].items()}
    torch.save(state, tmp_path / "checkpoint-2.pt")
    return tmp_path / "checkpoint-2.pt"


def published_form(model: Path, path: Path) -> Path:
    """Write a model's own text encoder as transformers 4.x and the published checkpoints name it."""
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder")
    state = {f"text_model.{name.removeprefix('text_model.')}": tensor.clone() for name, tensor in encoder.state_dict().items()}
    torch.save({"model_state_dict": state, "epoch": 2}, path)
    return path
