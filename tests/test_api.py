"""The Python interface against the scripts it stands for."""

import csv
import subprocess
import sys

import des

import pytest
import torch
from conftest import GOLDEN, ROOT, training_line
from diffusers import DiffusionPipeline
from PIL import Image


@pytest.fixture
def pipe(tiny_pipeline) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(tiny_pipeline)


def prompts(name: str) -> list[str]:
    with (GOLDEN / "A" / name).open(newline="", encoding="utf-8") as file:
        return [row["prompt"] for row in csv.DictReader(file)]


def test_training_gives_the_weights_of_the_script(call, codebook, pipe, tmp_path):
    before = {name: tensor.clone() for name, tensor in pipe.text_encoder.state_dict().items()}
    trained = des.train(pipe, prompts("unsafe.csv"), prompts("safe.csv"), tmp_path / "api", num_epochs=2, batch_size=5)
    assert call(*training_line(tmp_path)).code == 0
    weights = [
        torch.load(next(folder.rglob("checkpoint-2.pt")), weights_only=True) for folder in (tmp_path / "api", tmp_path / "out")
    ]
    first, second = (each["model_state_dict"] for each in weights)
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    assert all(before[name].equal(tensor) for name, tensor in pipe.text_encoder.state_dict().items())  # a copy is trained
    assert str(trained.checkpoint) in repr(trained) and trained.metadata["encoder"] == 1
    assert trained.protects or "DOES NOT PROTECT" in repr(trained)


def test_protecting_changes_the_text_encoder_and_names_what_was_loaded(pipe, protected_checkpoint):
    before = pipe.text_encoder.state_dict()["final_layer_norm.weight"].clone()
    protection = des.protect(pipe, protected_checkpoint)
    assert not pipe.text_encoder.state_dict()["final_layer_norm.weight"].equal(before)
    assert protection.checkpoints == {1: protected_checkpoint} and str(protected_checkpoint) in repr(protection)
    assert ("MAY NOT PROTECT" in repr(protection)) == bool(protection.doubts)
    assert "whether it protects was not measured" in repr(protection) and protection.unprotected == []


def test_all_checkpoints_are_loaded_or_none(family, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(family("sdxl"), torch_dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in pipe.text_encoder.state_dict().items()}
    path = tmp_path / "own-2.pt"
    torch.save({"model_state_dict": {name: tensor + 0.005 for name, tensor in before.items()}}, path)
    with pytest.raises(des.UserError, match="does not exist"):
        des.protect(pipe, {1: path, 2: tmp_path / "missing.pt"})
    assert all(tensor.equal(before[name]) for name, tensor in pipe.text_encoder.state_dict().items())
    protection = des.protect(pipe, {1: path})
    assert protection.unprotected == [2] and protection.doubts == ["text encoder 2 is the original, NOT protected"]
    assert "MAY NOT PROTECT: text encoder 2 is the original" in repr(protection)
    assert "text encoder 1: whether it protects was not measured" in repr(protection)


@pytest.mark.parametrize("checkpoint", ["missing.pt", {}, {2: "missing.pt"}])
def test_what_cannot_protect_is_refused_and_changes_nothing(pipe, checkpoint):
    before = pipe.text_encoder.state_dict()["final_layer_norm.weight"].clone()
    with pytest.raises(des.UserError):
        des.protect(pipe, checkpoint)
    assert pipe.text_encoder.state_dict()["final_layer_norm.weight"].equal(before)


@pytest.mark.parametrize(
    ("unsafe", "options", "message"),
    [
        ("a prompt", {}, "`unsafe` must be a list of prompts"),
        ([], {}, "`unsafe` has no prompts"),
        (["a", " "], {}, "none of them blank"),
        (["a"], {"encoder": 2}, "has no text encoder 2; it has 1"),
        (["a"], {"concept": []}, "`concept` has no prompts"),
        (["a"], {"concept": ["church", "church"]}, "one concept is named twice"),
    ],
)
def test_training_refuses_lists_that_do_not_suit(pipe, tmp_path, unsafe, options, message):
    with pytest.raises(des.UserError, match=message):
        des.train(pipe, unsafe, ["a safe prompt"], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_scoring_counts_like_the_script(call, tmp_path):
    for row, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{row}p.png")
    classifier = ROOT / "demo/models/classifier_colour"
    score = des.score(tmp_path, "red", classifier, device="cpu", output_name="api")
    line = ("--classifier", classifier, "--cls_class", "red", "--folder_dir", tmp_path, "--devices", "cpu")
    done = call("tasks/img_batch_classify.py", *line)
    assert done.code == 0 and (tmp_path / "api.txt").read_text() == (tmp_path / "classify.txt").read_text()
    assert (score.n, score.k) == (3, score.table()["hit"].sum()) and score.rate == score.k / 3
    assert f"{score.k}/3" in repr(score) and score.interval[0] <= score.rate <= score.interval[1]
    with pytest.raises(des.UserError, match="go together"):
        des.score(tmp_path, "red")
    with pytest.raises(des.UserError, match="contains 3 images"):
        des.score(tmp_path, "red", classifier, expected=4)


def test_importing_the_package_loads_no_library():
    code = "import sys, des; des.UserError; sys.exit(bool({'torch', 'numpy', 'transformers', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
