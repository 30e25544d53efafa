"""`accelerate launch` with two CPU processes (gloo) gives what one process gives."""

import os
import subprocess
import sys

import generate
import train_des
from des.data.prompts import read_prompts
from des.models.checkpoints import published_names
from des.models.encoders import load_encoder
from des.training.codebook import write_codebook
from des.utils.errors import UserError
from des.utils.processes import Processes, _check_type

import pytest
import torch
from accelerate import DistributedType
from conftest import GOLDEN, ROOT, Finished, flags, snapshot
from tiny import build
from transformers import CLIPTextModel


def launch(script, *argv):
    """Run a script under `accelerate launch` with two processes; returns how it ended."""
    # accelerate's own --cpu starts one process; with --multi_gpu it starts all, and --device cpu keeps them on the CPU
    options = [
        "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0",
    ]  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(ROOT / script), *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    return Finished(done.returncode, done.stdout, done.stderr)


def training(folder, codebook):
    """Twelve pairs in batches of eleven: the first batch splits unevenly, and the second leaves one of two processes without a pair."""
    options = flags(
        model_path=GOLDEN / "A/model", device="cpu", codebook_dir=codebook, num_epochs=2, unsafe_csv_path=GOLDEN / "A/unsafe.csv",
        safe_csv_path=GOLDEN / "A/safe.csv", output_dir=folder / "out", batch_size=11, learning_rate="1e-4", concept_guidance_scale=20,
    )  # fmt: skip
    return list(map(str, options))


def trained(folder):
    run = folder / "out/0.0001_0.3"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    return torch.load(run / "checkpoint-2.pt", weights_only=True)["model_state_dict"]


@pytest.fixture(scope="module")
def codebook(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codebook") / "cb"
    write_codebook(folder, load_encoder(str(GOLDEN / "A/model")), read_prompts(GOLDEN / "A/safe.csv"))
    return folder


@pytest.fixture(scope="module")
def alone(codebook):
    """The weights that one process trains."""
    train_des.main(training(codebook.parent, codebook))
    return trained(codebook.parent)


SHARDED = """
import sys

from des.utils.processes import Processes

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import train_des

def prepare(self, model, optimizer):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.encoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model, torch.optim.AdamW(model.parameters(), lr=optimizer.param_groups[0]["lr"], fused=True)

Processes.prepare = prepare
Processes.sharded = True
Processes.state_dict = lambda self, model: get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
train_des.main(sys.argv[1:])
"""


@pytest.mark.parametrize("how", ["replicated", "sharded"])
def test_trained_weights_equal_those_of_one_process(alone, codebook, fork, tmp_path, how):
    """accelerate shards on GPUs only, so the model is sharded here as it does it there, by FSDP2's `fully_shard`."""
    if how == "replicated":
        done = launch("train_des.py", *training(tmp_path, codebook))
    else:
        (tmp_path / "sharded.py").write_text(SHARDED)
        done = fork(tmp_path / "sharded.py", *training(tmp_path, codebook), count=2)
    assert done.code == 0, done.err
    assert done.err.count("DOES NOT PROTECT") == 1 and "by 2 processes" in done.err
    two = trained(tmp_path)
    base = published_names(CLIPTextModel.from_pretrained(GOLDEN / "A/model/text_encoder").state_dict())
    assert two.keys() == alone.keys() == base.keys()
    for name, tensor in alone.items():
        if not name.endswith("k_proj.bias"):  # its gradient is zero but for rounding, which Adam scales up
            torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5, msg=name)
    assert max((base[name] - tensor).abs().max() for name, tensor in alone.items()) > 1e-4


REPLICAS = """
import sys
from pathlib import Path

from des.models.checkpoints import fingerprint
from des.training import loop as training
from des.utils.processes import Processes

import train_des

whole, losses, stop_at = Processes.state_dict, training._losses, int(sys.argv.pop(1))

def state_dict(self, model):
    Path(f"rank{self.rank}.txt").write_text(fingerprint(model.module))
    return whole(self, model)

def interrupted(*given):
    global stop_at
    stop_at -= 1
    if stop_at == -1:
        raise SystemExit("interrupted")
    return losses(*given)

Processes.state_dict, training._losses = state_dict, interrupted
train_des.main(sys.argv[1:])
"""


def test_replicas_round_identically_and_resume_identically(fork, tmp_path):
    """T5's bf16 weights are rounded at random, and dropout differs between the processes: their weights must not."""
    (tmp_path / "replicas.py").write_text(REPLICAS)
    encoder = load_encoder(str(build("flux", tmp_path / "flux")), 2)
    write_codebook(tmp_path / "cb", encoder, read_prompts(GOLDEN / "A/safe.csv"))

    def train(stop_at, out, *more):
        return fork(
            tmp_path / "replicas.py", stop_at, "--model_path", "flux", "--device", "cpu", "--codebook_dir", "cb", "--unsafe_csv_path", GOLDEN / "A/unsafe.csv",
            "--output_dir", out, "--safe_csv_path", GOLDEN / "A/safe.csv", "--batch_size", 5, "--num_epochs", 1, "--learning_rate", "1e-3",
            "--text_encoder_idx", 2, "--save_every_steps", 1, *more, count=2,
        )  # fmt: skip

    def weights():
        return [(tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1)]

    done = train(100, "whole")
    assert done.code == 0, done.err
    assert "adamw_bf16_sr by 2 processes" in done.err
    whole = weights()
    assert whole[0] == whole[1]
    for rank in (0, 1):
        (tmp_path / f"rank{rank}.txt").unlink()
    assert train(2, "out").code != 0
    done = train(100, "out", "--resume")
    assert done.code == 0 and "resuming after step 2" in done.err, done.err
    assert weights() == whole


def test_two_processes_draw_the_files_of_one(fork, tmp_path):
    build("sd_v1", tmp_path / "sd_v1")
    (tmp_path / "p.csv").write_text("prompt\n" + "\n".join(f"a photo of {i} dogs" for i in range(7)) + "\n")

    def options(results):
        return list(map(str, flags(model_path=tmp_path / "sd_v1", device="cpu", prompts_csv=tmp_path / "p.csv", output_path="t2i",
                                   num_inference_steps=2, batch_size=3, results_dir=tmp_path / results)))  # fmt: skip

    def images(results):
        return {name: data for name, data in snapshot(tmp_path / results).items() if name.endswith("png")}

    generate.main(options("one"))
    done = fork("generate.py", *options("two"), count=2)
    assert done.code == 0, done.err
    assert "by 2 processes" in done.err
    assert len(images("one")) == 7 and images("two") == images("one")


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "4"}, "unset WORLD_SIZE"),
        ({"WORLD_SIZE": "4", "RANK": "0"}, "LOCAL_RANK is not set"),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "RANK is not set"),
        ({"WORLD_SIZE": "many"}, "unset WORLD_SIZE"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "MEGATRON_LM"),
    ],
)
def test_what_no_launcher_started_or_is_not_supported_is_refused(monkeypatch, variables, says):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        Processes(torch.device("cpu"))


def test_supported_ways_to_distribute_are_those_that_train():
    for kind in DistributedType:
        if kind.value == "NO" or kind.value == "FSDP" or kind.value.startswith("MULTI_"):
            _check_type(kind)
        else:
            with pytest.raises(UserError, match="not supported"):
                _check_type(kind)


def test_a_count_that_accelerate_does_not_have_is_refused(monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    one = type(
        "One",
        (),
        {"device": torch.device("cpu"), "distributed_type": DistributedType.NO, "num_processes": 1, "process_index": 0},
    )
    monkeypatch.setattr("des.utils.processes.Accelerator", lambda **options: one)
    with pytest.raises(UserError, match="accelerate runs 1 process; unset WORLD_SIZE"):
        Processes(torch.device("cpu"))
