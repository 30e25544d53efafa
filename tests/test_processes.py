"""`accelerate launch` with two CPU processes (gloo) gives what one process gives."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import GOLDEN, ROOT, snapshot
from tiny import build


def launch(script, *argv, processes, cwd):
    """Run a script under `accelerate launch`, or alone for one process; returns its stderr."""
    start = [sys.executable]
    if processes > 1:
        launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", processes, "--num_machines", 1]
        start += [*launcher, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    command = [*map(str, start), str(ROOT / script), *map(str, argv)]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )
    return done


@pytest.fixture(scope="module")
def codebook(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codebook")
    options = [
        "--model_path",
        GOLDEN / "A/model",
        "--device",
        "cpu",
        "--csv_path",
        GOLDEN / "A/safe.csv",
        "--save_dir",
        folder / "cb",
    ]
    assert launch("save_codebook.py", *options, processes=1, cwd=folder).returncode == 0
    return folder / "cb"


def test_trained_weights_equal_those_of_one_process(codebook, tmp_path):
    """Twelve unsafe and safe prompts in batches of five: the last batch is uneven, and one of its halves has no row in the end."""
    states = []
    for processes in (1, 2):
        done = launch(
            "train_des.py", "--model_path", GOLDEN / "A/model", "--device", "cpu", "--codebook_dir", codebook,
            "--unsafe_csv_path", GOLDEN / "A/unsafe.csv", "--safe_csv_path", GOLDEN / "A/safe.csv", "--output_dir", f"out{processes}",
            "--num_epochs", 2, "--batch_size", 11, "--learning_rate", "1e-4", "--concept_guidance_scale", 20,
            processes=processes, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("protected encoder in") == 1
        run = tmp_path / f"out{processes}/0.0001_0.3"
        states.append(torch.load(run / "checkpoint-2.pt", weights_only=True)["model_state_dict"])
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    one, two = states
    base = torch.load(tmp_path / "out1/0.0001_0.3/checkpoint-1.pt", weights_only=True)["model_state_dict"]
    for name, tensor in one.items():
        if not name.endswith("k_proj.bias"):  # its gradient is zero but for rounding, which Adam scales up
            torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5, msg=name)
    assert max((base[name] - tensor).abs().max() for name, tensor in one.items()) > 1e-4


def test_the_images_are_the_same_file_for_file(tmp_path):
    build("sd_v1", tmp_path / "sd_v1")
    (tmp_path / "p.csv").write_text("prompt\n" + "\n".join(f"a photo of {i} dogs" for i in range(7)) + "\n")
    images = []
    for processes in (1, 2):
        done = launch(
            "generate.py", "--model_path", "sd_v1", "--device", "cpu", "--prompts_csv", "p.csv", "--output_path", "t2i",
            "--num_inference_steps", 2, "--batch_size", 3, "--results_dir", f"results{processes}", processes=processes, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        images.append({name: data for name, data in snapshot(tmp_path / f"results{processes}").items() if name.endswith("png")})
    assert len(images[0]) == 7
    assert images[0] == images[1]


def test_an_error_of_one_process_ends_all(tmp_path):
    done = launch(
        "generate.py", "--prompts_csv", "none.csv", "--output_path", "x", "--device", "cpu", processes=2, cwd=tmp_path
    )
    assert done.returncode != 0
    assert "error: there is no prompt file none.csv" in done.stderr
