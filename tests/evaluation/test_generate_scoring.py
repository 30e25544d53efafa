"""generate.py --score_with: the same verdicts as from files, no discarded image on disk, and settings by row."""

import json
from pathlib import Path
from types import SimpleNamespace

from des.data.images import BLURRED
from des.data.run_record import COPY_SEED, Sampling
from des.generation.sampler import row_settings

import pandas as pd
import pytest
import torch
from conftest import ROOT, flags, snapshot
from PIL import Image
from PIL.PngImagePlugin import PngInfo

MODELS = ROOT / "demo/models"
ROWS = 6
CLASSIFIER = {"classifier": MODELS / "classifier_object", "cls_class": "mushroom"}


@pytest.fixture(scope="module")
def q16_prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("q16") / "prompts.pt"
    torch.save(torch.randn(2, 64, generator=torch.Generator().manual_seed(3)), path)
    return path


@pytest.fixture
def generate(call, tmp_path, monkeypatch):
    """Run generate.py on the demo's pipeline in `tmp_path` with changed options (None leaves one out)."""
    monkeypatch.chdir(tmp_path)
    lines = (ROOT / "datasets/demo_plain.csv").read_text().splitlines()[: ROWS // 2 + 1]
    lines += (ROOT / "datasets/demo_benign.csv").read_text().splitlines()[1 : ROWS // 2 + 1]
    (tmp_path / "p.csv").write_text("\n".join(lines) + "\n")

    def run(**changes):
        options = {"model_path": MODELS / "pipeline", "device": "cpu", "prompts_csv": "p.csv", "output_path": "t2i",
                   "num_inference_steps": 6, "guidance_scale": 3, "batch_size": 4} | changes  # fmt: skip
        return call("generate.py", *flags(**options))

    return run


def folder_of(tmp_path, results="results"):
    return tmp_path / results / "none/pipeline/t2i"


def read(path):
    return json.loads(path.read_text())


def test_verdicts_in_memory_equal_those_from_files(generate, call, tmp_path, q16_prompts):
    scoring = {
        "score_with": ["nudenet", "q16", "object"],
        "prompts_file": q16_prompts,
        "clip_model": MODELS / "clip",
        **CLASSIFIER,
    }
    done = generate(discard_images=[], **scoring)
    assert done.code == 0, done.err
    memory = folder_of(tmp_path)
    assert not list(memory.glob("*.png")) and len(list(memory.glob("t2i_none_*p.json"))) == ROWS
    assert generate(results_dir="kept").code == 0
    kept = folder_of(tmp_path, "kept")
    call("tasks/img_batch_classify.py", *flags(job="nudity", folder_dir=kept, devices="cpu", csv_path="p.csv"))
    call(
        "tasks/img_batch_classify_q16.py",
        *flags(folder_dir=kept, devices="cpu", prompts_file=q16_prompts, clip_model=MODELS / "clip"),
    )
    call(
        "tasks/img_batch_classify.py",
        *flags(job="object", folder_dir=kept, devices="cpu", output_name="classify_object", **CLASSIFIER),
    )
    for name in ("classify", "classify_16", "classify_object"):
        ours, theirs = read(memory / f"{name}.json"), read(kept / f"{name}.json")
        for key in ("k", "n", "fraction", "low", "high", "what", "detector"):
            assert ours[key] == theirs[key], (name, key)
        assert [(image["row"], image["hit"]) for image in ours["images"]] == [
            (image["row"], image["hit"]) for image in theirs["images"]
        ]
        assert (memory / f"{name}.txt").read_text() == (kept / f"{name}.txt").read_text()
    detections = [[image["detections"] for image in read(folder / "classify.json")["images"]] for folder in (kept, memory)]
    assert detections[0] == detections[1]
    objects = read(memory / "classify_object.json")
    assert objects["n"] == ROWS and 0 < objects["k"] < ROWS


def test_blurred_thumbnails_of_earlier_versions_are_not_scored(call, tmp_path):
    mark = PngInfo()
    mark.add_text(*BLURRED)
    Image.new("RGB", (128, 128)).save(tmp_path / "t2i_none_0p.png", pnginfo=mark)
    done = call("tasks/img_batch_classify.py", *flags(job="nudity", folder_dir=tmp_path, devices="cpu"))
    assert done.failed_in_one_sentence and "blurred" in done.err


def test_scores_resume_and_shards_add_up(generate, tmp_path):
    scoring = {"score_with": "object", "discard_images": [], **CLASSIFIER}
    assert generate(end_idx=3, **scoring).code == 0
    assert read(folder_of(tmp_path) / "classify_object.json")["n"] == 3
    before = {path: path.stat().st_mtime_ns for path in folder_of(tmp_path).glob("*p.json")}
    (folder_of(tmp_path) / "t2i_none_1p.json").write_text('{"file":')
    done = generate(**scoring)
    assert done.code == 0 and "4 images to draw" in done.err and "2 already done" in done.err
    assert read(folder_of(tmp_path) / "classify_object.json")["n"] == ROWS
    after = {path: path.stat().st_mtime_ns for path in before}
    assert [path.name for path in before if before[path] != after[path]] == ["t2i_none_1p.json"]
    whole = read(folder_of(tmp_path) / "classify_object.json")["images"]
    assert generate(results_dir="once", **scoring).code == 0
    assert read(folder_of(tmp_path, "once") / "classify_object.json")["images"] == whole


def test_images_that_are_there_are_scored_without_drawing(generate, tmp_path):
    assert generate().code == 0
    before = {path.name: path.read_bytes() for path in folder_of(tmp_path).glob("*.png")}
    done = generate(score_with="object", **CLASSIFIER)
    assert done.code == 0 and "0 images to draw" in done.err
    assert read(folder_of(tmp_path) / "classify_object.json")["n"] == ROWS
    assert {path.name: path.read_bytes() for path in folder_of(tmp_path).glob("*.png")} == before
    again = generate(discard_images=[], score_with="object", **CLASSIFIER)
    assert again.failed_in_one_sentence and "discard_images" in again.err
    assert {path.name: path.read_bytes() for path in folder_of(tmp_path).glob("*.png")} == before


def test_another_class_is_scored_from_scratch(generate, tmp_path):
    scoring = {"score_with": "object", "classifier": MODELS / "classifier_object"}
    counts = []
    for name in ("mushroom", "ball"):
        assert generate(cls_class=name, **scoring).code == 0
        counts.append(read(folder_of(tmp_path) / "classify_object.json"))
    assert "mushroom" in counts[0]["what"] and "ball" in counts[1]["what"] and counts[0]["k"] > counts[1]["k"]


@pytest.mark.parametrize(
    "change",
    [
        {"discard_images": []},
        {"score_with": "object"},
        {"score_with": "object", "cls_class": "dragon", "classifier": MODELS / "classifier_object"},
        {"profile": "paper"},
        {"score_with": "nudenet", "cls_class": "ball"},
        {"score_with": "q16", "prompts_file": "nowhere.pt"},
        {"use_row_settings": []},
        {"use_row_settings": [], "prompts_csv": None, "prompt": "a ball"},
    ],
)
def test_what_nothing_would_use_is_refused(generate, tmp_path, change):
    before = snapshot(tmp_path)
    done = generate(**change)
    assert done.failed_in_one_sentence, done.err
    assert snapshot(tmp_path) == before


def pixels(path):
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def test_a_setting_is_read_from_the_first_column_whose_cell_is_filled():
    """I2P's copies have `sd_seed` and `evaluation_seed`; a seed may be as large as ComfyUI's."""
    rows = pd.DataFrame({"prompt": list("abc"), "evaluation_seed": ["5", "6", ""], "sd_seed": [str(2**50), " ", ""]})
    pipe = SimpleNamespace(default_sample_size=8, vae_scale_factor=8)
    sampling = Sampling(seed=2**63 - 1, num_inference_steps=1, guidance_scale=7.5, use_row_settings=True)
    seeds = [each.seed for each in row_settings(sampling, pipe, rows, Path("p.csv"))]
    assert seeds == [2**50, 6, 2**63 + 1]
    assert [torch.Generator("cpu").manual_seed(seed + COPY_SEED).initial_seed() for seed in seeds]


def test_rows_bring_their_own_settings(generate, tmp_path):
    rows = [
        "prompt,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height",
        "a red ball,7,2.5,32,32",
        "a red ball,,,,",
        "a red ball,7,6,64,32",
    ]
    (tmp_path / "rows.csv").write_text("\n".join(rows) + "\n")
    assert generate(prompts_csv="rows.csv", use_row_settings=[], results_dir="own", batch_size=2).code == 0
    own = folder_of(tmp_path, "own")
    sizes = [Image.open(own / f"t2i_none_{row}p.png").size for row in range(3)]
    assert sizes == [(32, 32), (32, 32), (64, 32)]
    (tmp_path / "one.csv").write_text("prompt\na red ball\n")
    for row, options in enumerate(
        [{"seed": 7, "guidance_scale": 2.5}, {"seed": 43}, {"seed": 7, "guidance_scale": 6, "width": 64, "height": 32}]
    ):
        assert generate(prompts_csv="one.csv", results_dir=f"alone{row}", batch_size=1, **options).code == 0
        alone, together = (
            Image.open(folder / f"t2i_none_{i}p.png") for folder, i in ((folder_of(tmp_path, f"alone{row}"), 0), (own, row))
        )
        gaps = [abs(a - b) for a, b in zip(alone.tobytes(), together.tobytes(), strict=True)]
        assert max(gaps) <= 1  # rounding at another batch size
    rows[1] = "a red ball,8,2.5,32,32"
    (tmp_path / "rows.csv").write_text("\n".join(rows) + "\n")
    done = generate(prompts_csv="rows.csv", use_row_settings=[], results_dir="own", batch_size=2)
    assert done.failed_in_one_sentence and "row_settings" in done.err
    for cell in ("x", "-1", "nan", "1.5"):
        (tmp_path / "rows.csv").write_text(f"prompt,sd_seed\na red ball,{cell}\n")
        done = generate(prompts_csv="rows.csv", use_row_settings=[], results_dir="bad")
        assert done.failed_in_one_sentence and "column sd_seed" in done.err
