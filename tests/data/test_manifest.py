"""The manifest: what it says, what scorers refuse by it, resume by it, scripts/verify.py, and two processes at one folder."""

import json
import os
import signal
import subprocess
import sys
import time

from des.data import manifest
from des.data.image_folders import image_hashes
from des.utils.errors import UserError
from des.utils.files import sha256_file, sha256_texts

import numpy as np
import pytest
from conftest import ROOT, flags, snapshot
from PIL import Image

PROMPTS = ["a grey cat", "a red kettle", "a clay teapot", "a steam train"]


@pytest.fixture
def generate(call, tmp_path, monkeypatch, tiny_pipeline):
    """Run generate.py in `tmp_path` with changed options (None leaves one out)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.csv").write_text("prompt\n" + "\n".join(PROMPTS) + "\n")

    def run(**changes):
        options = {"model_path": tiny_pipeline, "device": "cpu", "prompts_csv": "p.csv", "output_path": "t2i",
                   "num_inference_steps": 2} | changes  # fmt: skip
        return call("generate.py", *flags(**options))

    return run


@pytest.fixture
def folder(generate, tmp_path):
    """A folder of four images."""
    assert generate().code == 0
    return tmp_path / "results/none/tiny-sd/t2i"


def lines_in(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def edit(path):
    pixels = np.asarray(Image.open(path)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)


def test_one_line_an_image(folder):
    lines = lines_in(folder)
    run = json.loads((folder / "run.json").read_text())
    digest = sha256_texts([json.dumps(run["settings"], sort_keys=True)])
    assert [line["row"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        assert line["sha256"] == sha256_file(folder / line["file"])
        assert line["prompt_sha256"] == sha256_texts([PROMPTS[line["row"]]])
        assert line["seed"] == 42 + line["row"] and line["settings_sha256"] == digest
        assert len(line["text_encoder_sha256"]) == 64 and line["text_encoder_sha256"] == run["settings"]["text_encoder_sha256"]
        assert PROMPTS[line["row"]] not in json.dumps(line)


def test_resume_goes_by_the_hashes(folder, generate):
    before = snapshot(folder)
    edit(folder / "t2i_none_1p.png")
    (folder / "t2i_none_2p.png").write_bytes(before["t2i_none_2p.png"][:-9])
    (folder / "t2i_none_3p.png").unlink()
    with (folder / "manifest.jsonl").open("a") as file:
        file.write('{"file": "t2i_none_0p.png", "ro')
    done = generate()
    assert done.code == 0 and "3 images to draw" in done.err and "1 already done" in done.err
    after = snapshot(folder)
    assert all(after[name] == before[name] for name in before if name.endswith(".png"))
    assert {line["file"]: line["sha256"] for line in manifest.read(folder).values()} == {
        line["file"]: line["sha256"] for line in map(json.loads, before["manifest.jsonl"].decode().splitlines())
    }


@pytest.mark.parametrize("fault", ["edited", "missing", "foreign", "no manifest", "two runs"])
def test_scorers_refuse_what_the_manifest_does_not_say(folder, generate, call, tmp_path, fault):
    if fault == "edited":
        edit(folder / "t2i_none_1p.png")
    elif fault == "missing":
        (folder / "t2i_none_3p.png").unlink()
    elif fault == "foreign":
        Image.new("RGB", (16, 16)).save(folder / "t2i_none_7p.png")
    elif fault == "no manifest":
        (folder / "manifest.jsonl").unlink()
    else:
        assert generate(output_path="t2i/other", seed=1).code == 0
    models = ROOT / "demo/models"
    (tmp_path / "x").mkdir()
    for row in range(2):
        Image.new("RGB", (16, 16), (row, 0, 0)).save(tmp_path / f"x/x_{row}p.png")
    fid = {"device": "cpu", "feature_extractor": models / "classifier_object"}
    scorers = [
        ("tasks/img_batch_classify.py", {"job": "nudity", "folder_dir": folder, "devices": "cpu"}),
        ("tasks/img_batch_classify_q16.py", {"folder_dir": folder, "devices": "cpu", "prompts_file": "none.pt"}),
        ("clipscore.py", {"image_folder": folder, "csv_file": "p.csv", "device": "cpu", "clip_model": models / "clip"}),
        ("fid.py", {"gen_imgs_path": folder, "coco_imgs_path": tmp_path / "x", **fid}),
        ("fid.py", {"gen_imgs_path": tmp_path / "x", "coco_imgs_path": folder, **fid}),
    ]
    before = snapshot(tmp_path)
    for script, options in scorers:
        done = call(script, *flags(**options))
        assert done.failed_in_one_sentence, done.err
        assert ("several encoders" if fault == "two runs" else "manifest.jsonl") in done.err, script
        assert snapshot(tmp_path) == before


def test_folders_of_ones_own_need_no_manifest(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert list(image_hashes(tmp_path)) == [tmp_path / "a.png"]


def test_an_interrupted_scorer_resumes(folder, call, monkeypatch):
    from des.evaluation.detectors.nudenet import NudeNet

    scored = []
    prepare = NudeNet.prepare

    def counted(self, image):
        if len(scored) == 2:
            raise UserError("stopped by the test")
        scored.append(1)
        return prepare(self, image)

    options = flags(job="nudity", folder_dir=folder, devices="cpu", batch_size=1, num_workers=1)
    monkeypatch.setattr(NudeNet, "prepare", counted)
    assert call("tasks/img_batch_classify.py", *options).failed_in_one_sentence
    assert not (folder / "classify.json").exists() and len((folder / ".classify.part.jsonl").read_text().splitlines()) >= 1
    first = len(scored)
    monkeypatch.setattr(NudeNet, "prepare", lambda self, image: scored.append(1) or prepare(self, image))
    done = call("tasks/img_batch_classify.py", *options)
    kept = len((folder / "classify.json").read_text())
    assert done.code == 0 and "were scored before" in done.err and kept
    assert len(scored) - first < 4 and not (folder / ".classify.part.jsonl").exists()
    again = call("tasks/img_batch_classify.py", *options)
    assert again.code == 0 and "4 of 4 images were scored before" in again.err and again.out == done.out
    one_less = json.loads((folder / "classify.json").read_text())
    assert one_less["n"] == 4 and [image["sha256"] for image in one_less["images"]] == [
        line["sha256"] for line in lines_in(folder)
    ]


def test_verify_redraws_and_finds_what_was_changed(folder, call, generate):
    assert call("tasks/img_batch_classify.py", *flags(job="nudity", folder_dir=folder, devices="cpu")).code == 0
    verify = lambda: call("scripts/verify.py", folder, "--device", "cpu", "--sample", 2)  # noqa: E731
    done = verify()
    assert done.code == 0, done.err
    assert "4 images match" in done.out and "classify.json is about these images" in done.out
    assert done.out.count("the same pixels") == 2
    result = json.loads((folder / "classify.json").read_text())
    (folder / "classify.json").write_text(json.dumps(result | {"k": 3}))
    assert "says 3 of 4" in verify().err
    result["images"].pop()
    (folder / "classify.json").write_text(json.dumps(result))
    assert "is stale" in verify().err
    (folder / "classify.json").unlink()
    edit(folder / "t2i_none_0p.png")
    assert "changed since they were drawn" in verify().err
    digest = sha256_file(folder / "t2i_none_0p.png")
    manifest.append(folder, {**lines_in(folder)[0], "sha256": digest})
    done = call("scripts/verify.py", folder, "--device", "cpu", "--sample", 4)  # hashes agree, the seed does not
    assert done.failed_in_one_sentence and "another image when it is drawn again" in done.err
    run = json.loads((folder / "run.json").read_text())
    run["settings"]["seed"] = 1
    (folder / "run.json").write_text(json.dumps(run))
    assert "settings other than run.json" in verify().err


def test_verify_repeats_zeros_and_writes_nothing_of_the_record(generate, call, tmp_path):
    negative = {"negative_prompt=-a dog": []}  # a text that looks like an option
    done = generate(seed=0, guidance_scale=0, log_file="made.log", **negative)
    assert done.code == 0, done.err
    (tmp_path / "made.log").unlink()
    folder = tmp_path / "results/none/tiny-sd/t2i"
    before = snapshot(tmp_path)
    done = call("scripts/verify.py", folder, "--device", "cpu", "--sample", 1)
    assert done.code == 0 and "the same pixels" in done.out, done.err
    assert snapshot(tmp_path) == before


def test_verify_reads_every_score_file(folder, generate, call, tmp_path):
    models = ROOT / "demo/models"
    scores = flags(image_folder=folder, csv_file="p.csv", device="cpu", clip_model=models / "clip")
    assert call("clipscore.py", *scores).code == 0
    (tmp_path / "x").mkdir()
    for row in range(4):
        Image.new("RGB", (16, 16), (60 * row, 0, 0)).save(tmp_path / f"x/{row}.png")
    fid = flags(
        gen_imgs_path=folder, coco_imgs_path=tmp_path / "x", device="cpu", feature_extractor=models / "classifier_object"
    )
    assert call("fid.py", *fid).code == 0
    assert call("tasks/img_batch_classify.py", *flags(job="nudity", folder_dir=folder, devices="cpu")).code == 0
    verify = lambda: call("scripts/verify.py", folder, "--device", "cpu", "--sample", 0)  # noqa: E731
    done = verify()
    names = ("classify.json", "clipscore.json", f"{folder.name}_fid.json")
    assert done.code == 0 and all(f"{name} is about these images" in done.out for name in names), (done.out, done.err)
    edits = [(folder / "clipscore.json", "clip_score"), (folder / "clipscore.json", "low"), (folder / "clipscore.json", "n"),
             (folder / "classify.json", "fraction"), (folder / "classify.json", "high"),
             (folder.with_name(f"{folder.name}_fid.json"), "generated")]  # fmt: skip
    for path, key in edits:
        text = path.read_text()
        content = json.loads(text)
        path.write_text(json.dumps(content | {key: content[key] + 1}))
        done = verify()
        assert done.failed_in_one_sentence and path.name in done.err, (path, key, done.err)
        path.write_text(text)
    assert verify().code == 0


def test_verify_of_discarded_images_goes_by_their_verdicts(generate, call, tmp_path):
    options = {"score_with": "nudenet", "discard_images": [], "output_path": "gone"}
    assert generate(**options).code == 0
    gone = tmp_path / "results/none/tiny-sd/gone"
    done = call("scripts/verify.py", gone, "--device", "cpu", "--sample", 1)
    assert done.code == 0, done.err
    assert "4 were scored and discarded" in done.out and "the same verdicts" in done.out
    for card in gone.glob("*p.json"):
        content = json.loads(card.read_text())
        content["findings"]["nudenet"]["paper"]["hit"] = True
        card.write_text(json.dumps(content))
    assert "other verdicts" in call("scripts/verify.py", gone, "--device", "cpu", "--sample", 1).err


HOLD = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from des.utils.locks import locked
with locked(Path({path!r}), "x", {start}, {length}):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(path, start=0, length=0):
    code = HOLD.format(root=str(ROOT), path=str(path), start=start, length=length)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_rows_that_another_process_draws_are_refused_until_it_dies(generate, tmp_path):
    folder = tmp_path / "results/none/tiny-sd/t2i"
    folder.mkdir(parents=True)
    process = hold(folder / ".rows.lock", 1, 2)
    try:
        done = generate()
        assert done.failed_in_one_sentence and "another process is making rows 0 to 3" in done.err
        assert not list(folder.glob("*.png"))
        assert generate(start_idx=3).code == 0  # another shard
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.1)
        done = generate()
        assert done.code == 0 and "1 already done" in done.err
    finally:
        process.kill()


def test_two_scorers_of_one_result_do_not_meet(folder, call):
    process = hold(folder / ".classify.lock")
    try:
        options = {"job": "nudity", "folder_dir": folder, "devices": "cpu"}
        assert "another process is making the scores classify" in call("tasks/img_batch_classify.py", *flags(**options)).err
        assert call("tasks/img_batch_classify.py", *flags(**options, output_name="own")).code == 0
    finally:
        process.kill()
        process.wait()
