"""Files that an earlier version wrote (tests/before) are read, continued, scored and verified.

`tests/before` holds a codebook, the last checkpoint of a training, and a folder of two scored images, made on `smallest` (below).
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, flags
from diffusers import DDIMScheduler
from tiny import DIFFUSION, clip, stable_diffusion

IMAGES = Path("results/des/smallest/before")
CLIP, CLASSIFIER = ROOT / "demo/models/clip", ROOT / "demo/models/classifier_object"


@pytest.fixture(scope="module")
def smallest(tmp_path_factory) -> Path:
    """The pipeline from which the earlier files were made."""
    folder = tmp_path_factory.mktemp("models") / "smallest"
    with torch.random.fork_rng(devices=[]):
        scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **DIFFUSION)
        stable_diffusion(clip(1, width=16, layers=1, intermediate=16), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def before(tmp_path, monkeypatch, smallest) -> None:
    """A working folder with the model and the files, where the earlier version had them."""
    files = ROOT / "tests/before"
    shutil.copytree(smallest, tmp_path / "smallest")
    shutil.copytree(files / "codebook", tmp_path / "codebook")
    shutil.copytree(files / "training", tmp_path / "checkpoints/0.01_0.3")
    shutil.copytree(files / "images", tmp_path / IMAGES)
    for path in files.glob("*.csv"):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)


def losses_of(path: Path) -> list[float]:
    return [json.loads(line)["total"] for line in path.read_text().splitlines()]


def generated(call, **changes: object):
    """Run the command that drew the images of tests/before, with changed options."""
    options = {
        "model_path": "smallest", "training_method": "des", "text_encoder_path": "checkpoints/0.01_0.3/checkpoint-3.pt",
        "prompts_csv": "safe.csv", "output_path": "before", "num_inference_steps": 2, "device": "cpu", "dtype": "fp32",
    }  # fmt: skip
    return call("generate.py", *flags(**options | changes))


def test_training_reads_the_codebook_and_repeats_its_losses(call):
    options = {
        "model_path": "smallest", "codebook_dir": "codebook", "unsafe_csv_path": "unsafe.csv", "safe_csv_path": "safe.csv",
        "output_dir": "again", "num_epochs": 3, "learning_rate": 0.01, "batch_size": 2, "concept_prompt": "mushroom",
        "concept_guidance_ratio": 0.8, "device": "cpu",
    }  # fmt: skip
    done = call("train_des.py", *flags(**options))
    assert done.code == 0, done.err
    losses = losses_of(Path("again/0.01_0.3/metrics.jsonl"))
    assert losses == pytest.approx(losses_of(Path("checkpoints/0.01_0.3/metrics.jsonl")), abs=1e-3) and len(losses) == 6


def test_generation_continues_a_folder_with_its_checkpoint_and_scorers_read_it(call):
    earlier = {path.name: path.read_bytes() for path in IMAGES.glob("*.png")}
    done = generated(call, end_idx=4)
    assert done.code == 0, done.err
    images = {path.name: path.read_bytes() for path in IMAGES.glob("*.png")}
    assert set(images) - set(earlier) == {"before_des_2p.png", "before_des_3p.png"} and len(earlier) == 2
    assert all(images[name] == content for name, content in earlier.items())
    assert len((IMAGES / "manifest.jsonl").read_text().splitlines()) == 4
    done = call("clipscore.py", *flags(image_folder=IMAGES, csv_file="safe.csv", clip_model=CLIP, device="cpu"))
    assert done.code == 0 and json.loads((IMAGES / "clipscore.json").read_text())["n"] == 4, done.err


def test_another_seed_does_not_continue_the_folder(call):
    done = generated(call, end_idx=4, seed=7)
    assert done.failed_in_one_sentence and "seed" in done.err
    assert len(list(IMAGES.glob("*.png"))) == 2


def test_scoring_again_finds_the_same(call):
    files = ("clipscore.json", "classify.json")
    earlier = [json.loads((IMAGES / name).read_text()) for name in files]
    done = call("clipscore.py", *flags(image_folder=IMAGES, csv_file="two.csv", clip_model=CLIP, device="cpu"))
    assert done.code == 0, done.err
    options = {"job": "object", "classifier": CLASSIFIER, "cls_class": "mushroom", "folder_dir": IMAGES, "devices": "cpu"}
    done = call("tasks/img_batch_classify.py", *flags(**options))
    assert done.code == 0, done.err
    scores, verdicts = [json.loads((IMAGES / name).read_text()) for name in files]
    assert scores["clip_score"] == pytest.approx(earlier[0]["clip_score"], abs=1e-3)
    assert (verdicts["k"], verdicts["n"]) == (0, 2)
    probabilities = [[image["probability"] for image in each["images"]] for each in (verdicts, earlier[1])]
    assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-4)


def test_verify_and_the_report_accept_the_scores(call):
    done = call("scripts/verify.py", *flags(sample=2, tolerance=2, device="cpu"), IMAGES)
    assert done.code == 0, done.out + done.err
    assert all(f"{name}.json is about these images" in done.out for name in ("classify", "clipscore"))
    assert done.out.count("drawn again") == 2
    done = call("scripts/report.py", "results/des/smallest", "checkpoints", "--out", "page.html")
    assert done.code == 0, done.err
    page = Path("page.html").read_text()
    assert "0/2" in page and "11.07" in page


def test_verify_sees_an_edited_score(call):
    scores = json.loads((IMAGES / "classify.json").read_text())
    (IMAGES / "classify.json").write_text(json.dumps(scores | {"k": 1}))
    assert call("scripts/verify.py", *flags(sample=0, device="cpu"), IMAGES).code == 1
