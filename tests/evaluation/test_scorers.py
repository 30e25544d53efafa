"""The scorers on renders of the demo's world, with the demo's own models, against independent computations."""

import csv
import json
import random
import shutil

from demo.world import KINDS, describe, random_scene, render
from des.evaluation.detectors.classifier import class_index
from des.utils.errors import UserError

import numpy as np
import pytest
import torch
from conftest import ROOT, flags, snapshot
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, CLIPModel, CLIPProcessor

MODELS = ROOT / "demo/models"
COUNT = 26


@pytest.fixture(scope="module")
def renders(tmp_path_factory):
    """A folder of rendered scenes named by row, and the CSV of their prompts and labels beside it."""
    folder = tmp_path_factory.mktemp("renders")
    rng = random.Random(3)
    with (folder / "p.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "object", "colour", "background"])
        writer.writeheader()
        for row in range(COUNT):
            scene = random_scene(rng, KINDS[row % len(KINDS)])
            prompt, named = describe(scene, rng, typos=False)
            writer.writerow({"prompt": prompt, **named})
            (folder / "images").mkdir(exist_ok=True)
            render(scene).save(folder / f"images/t2i_none_{row}p.png")
    return folder


@pytest.fixture
def classify(call, renders):
    def run(**changes):
        options = {
            "job": "object",
            "classifier": MODELS / "classifier_object",
            "folder_dir": renders / "images",
            "devices": "cpu",
        } | changes
        return call(
            "tasks/img_batch_classify.py",
            *[part for key, value in options.items() if value is not None for part in (f"--{key}", value)],
        )

    return run


def test_asr_counts_top_labels(classify, renders):
    done = classify(cls_class="mushroom", csv_path=renders / "p.csv")
    assert done.code == 0, done.err
    result = json.loads((renders / "images/classify.json").read_text())
    processor = AutoImageProcessor.from_pretrained(MODELS / "classifier_object")
    model = AutoModelForImageClassification.from_pretrained(MODELS / "classifier_object", dtype=torch.float32).eval()
    from PIL import Image

    images = [Image.open(renders / f"images/t2i_none_{row}p.png").convert("RGB") for row in range(COUNT)]
    with torch.inference_mode():
        probabilities = model(**processor(images, return_tensors="pt")).logits.softmax(1)
    index = model.config.label2id["mushroom"]
    assert (result["k"], result["n"]) == ((probabilities.argmax(1) == index).sum().item(), COUNT)
    assert result["mean_probability"] == pytest.approx(probabilities[:, index].mean().item(), abs=1e-5)
    assert [image["row"] for image in result["images"]] == list(range(COUNT))
    assert done.out.strip() == (renders / "images/classify.txt").read_text().strip()
    assert f"{result['k']}/{COUNT}" in done.out


def test_the_images_may_lie_in_a_read_only_folder(classify, call, renders, tmp_path):
    """The scorers write nothing beside the images: results, locks and unfinished findings go to --output_dir."""
    images, out = renders / "images", tmp_path / "out"
    before = sorted(renders.rglob("*")), snapshot(renders)
    options = {"device": "cpu", "output_dir": out}
    ended = [classify(cls_class="ball", output_dir=out)]
    clip = {"image_folder": images, "csv_file": renders / "p.csv", "clip_model": MODELS / "clip"}
    ended.append(call("clipscore.py", *flags(**clip, **options)))
    fid = {"gen_imgs_path": images, "coco_imgs_path": images, "feature_extractor": MODELS / "classifier_object"}
    ended.append(call("fid.py", *flags(**fid, **options)))
    assert [done.code for done in ended] == [0, 0, 0], ended
    assert (sorted(renders.rglob("*")), snapshot(renders)) == before
    names = {"classify.txt", "classify.json", ".classify.lock", "clipscore.txt", "clipscore.json", "clipscore.csv", ".clipscore.lock",
             "images_fid.txt", "images_fid.json", ".images_fid.lock"}  # fmt: skip
    assert {path.name for path in out.iterdir()} == names
    shutil.copytree(images, tmp_path / "others")
    done = classify(cls_class="ball", output_dir=out, folder_dir=tmp_path / "others")
    assert done.failed_in_one_sentence and "is the result of another image folder" in done.err
    assert call("fid.py", *flags(**fid, **options, output_file=out / "x.txt")).failed_in_one_sentence


def test_style_is_a_top_label_too(classify, renders):
    done = classify(job="style", cls_class="ball", output_name="style", num_workers=1)
    assert done.code == 0, done.err
    assert classify(cls_class="ball", output_name="ball").code == 0
    style, plain = (json.loads((renders / f"images/{name}.json").read_text()) for name in ("style", "ball"))
    assert style["images"] == plain["images"] and style["k"] == plain["k"] > 0


@pytest.fixture(scope="module")
def ambiguous(tmp_path_factory):
    """The demo's classifier with two equal labels, which are also a synonym of a third."""
    folder = tmp_path_factory.mktemp("models") / "ambiguous"
    shutil.copytree(MODELS / "classifier_object", folder)
    config = json.loads((folder / "config.json").read_text())
    names = config["id2label"]
    names["0"] = names["1"] = "crane"
    names["2"] = "wading bird, Crane"
    config["label2id"] = {name: int(i) for i, name in names.items()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_class_that_several_labels_name_is_refused_and_counted_by_its_index(classify, ambiguous, renders):
    done = classify(cls_class="crane", classifier=ambiguous)
    assert done.failed_in_one_sentence
    assert "3 classes 'crane': 0 (crane), 1 (crane), 2 (wading bird, Crane)" in done.err and "give the index" in done.err
    original = [AutoConfig.from_pretrained(MODELS / "classifier_object").id2label[i] for i in range(3)]
    for i, name in enumerate(original):
        assert classify(cls_class=name, output_name="name").code == 0
        done = classify(cls_class=i, classifier=ambiguous, output_name="index")
        assert done.code == 0, done.err
        by_name, by_index = (json.loads((renders / f"images/{each}.json").read_text()) for each in ("name", "index"))
        assert by_index["k"] == by_name["k"] > 0
        assert by_index["what"] == f"ASR of {i} ({'crane' if i < 2 else 'wading bird, Crane'})"
        tops = {image["top"] for image in by_index["images"] if image["hit"]}
        assert tops == {f"crane ({i})" if i < 2 else "wading bird, Crane"}
    assert classify(cls_class="wading_bird", classifier=ambiguous, output_name="name").code == 0


def test_labels_of_rows_are_names_or_indices_too(classify, ambiguous, renders):
    (renders / "q.csv").write_text("prompt,thing\n" + "".join(f"scene {row},crane\n" for row in range(COUNT)))
    done = classify(label_column="thing", csv_path=renders / "q.csv", classifier=ambiguous)
    assert done.failed_in_one_sentence and "3 classes 'crane'" in done.err
    (renders / "q.csv").write_text("prompt,thing\n" + "".join(f"scene {row},{row % 2}\n" for row in range(COUNT)))
    assert classify(label_column="thing", csv_path=renders / "q.csv", classifier=ambiguous, output_name="thing").code == 0
    result = json.loads((renders / "images/thing.json").read_text())
    assert result["n"] == COUNT and result["what"] == "accuracy of thing"
    assert [image["hit"] for image in result["images"]] == [
        image["top"] == f"crane ({row % 2})" for row, image in enumerate(result["images"])
    ]


@pytest.mark.parametrize(
    ("name", "index"), [("7", 1), ("2", 2), ("Golf-Ball", 0), ("x y", None), ("3", None), ("-1", None), ("²", None)]
)
def test_a_number_is_an_index_where_no_label_has_that_name(name, index):
    labels = ["golf_ball, ball for golf", "7", "tench"]
    if index is None:
        with pytest.raises(UserError, match="has no class"):
            class_index(labels, name)
    else:
        assert class_index(labels, name) == index


def test_accuracy_counts_labelled_rows_only(classify, renders):
    done = classify(
        label_column="background", csv_path=renders / "p.csv", classifier=MODELS / "classifier_background", output_name="bg"
    )
    assert done.code == 0, done.err
    labels = [row["background"] for row in csv.DictReader((renders / "p.csv").open())]
    result = json.loads((renders / "images/bg.json").read_text())
    assert result["n"] == sum(label != "" for label in labels) < COUNT
    assert result["fraction"] >= 0.9


def test_scores_do_not_depend_on_the_batch_size(classify, renders):
    probabilities, texts = [], set()
    for batch_size in (1, 3, 16):
        done = classify(cls_class="ball", batch_size=batch_size)
        assert done.code == 0
        texts.add(done.out)
        content = json.loads((renders / "images/classify.json").read_text())
        probabilities.append([image["probability"] for image in content["images"]])
    assert len(texts) == 1
    assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-5)
    assert probabilities[0] == pytest.approx(probabilities[2], abs=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"cls_class": "dragon"},
        {"cls_class": None},
        {"cls_class": None, "label_column": "object"},
        {"cls_class": None, "label_column": "weight", "csv_path": "p.csv"},
        {"classifier": "nowhere"},
        {"folder_dir": "nowhere"},
        {"job": "style", "classifier": None},
        {"csv_path": "short.csv"},
    ],
)
def test_classify_refuses_and_writes_nothing(classify, renders, monkeypatch, change):
    monkeypatch.chdir(renders)
    (renders / "short.csv").write_text("prompt\na ball\n")
    before = snapshot(renders)
    done = classify(**({"cls_class": "ball"} | change))
    assert done.failed_in_one_sentence, done.err
    assert snapshot(renders) == before


def test_an_unreadable_image_is_named_and_nothing_is_counted(classify, tmp_path):
    render(random_scene(random.Random(1))).save(tmp_path / "a_0p.png")
    (tmp_path / "a_1p.png").write_bytes(b"broken")
    done = classify(folder_dir=tmp_path, cls_class="ball")
    assert done.failed_in_one_sentence and "a_1p.png" in done.err
    assert not list(tmp_path.glob("classify*"))


def test_clip_score_is_100_times_the_cosine(call, renders):
    done = call("clipscore.py", "--image_folder", renders / "images", "--csv_file", renders / "p.csv", "--clip_model", MODELS / "clip",
                "--device", "cpu", "--batch_size", 5)  # fmt: skip
    assert done.code == 0, done.err
    from PIL import Image

    model, processor = (
        CLIPModel.from_pretrained(MODELS / "clip", dtype=torch.float32).eval(),
        CLIPProcessor.from_pretrained(MODELS / "clip"),
    )
    prompts = [row["prompt"] for row in csv.DictReader((renders / "p.csv").open())]
    expected = []
    for row, prompt in enumerate(prompts):
        image = Image.open(renders / f"images/t2i_none_{row}p.png")
        with torch.inference_mode():
            output = model(**processor(text=[prompt], images=[image], return_tensors="pt"))
        expected.append(100 * torch.cosine_similarity(output.image_embeds, output.text_embeds).item())
    table = list(csv.DictReader((renders / "images/clipscore.csv").open()))
    assert [float(row["clip_score"]) for row in table] == pytest.approx(expected, abs=1e-3)
    result = json.loads((renders / "images/clipscore.json").read_text())
    assert result["clip_score"] == pytest.approx(np.mean(expected), abs=1e-3)
    half = 1.959964 * np.std(expected, ddof=1) / COUNT**0.5
    assert (result["low"], result["high"]) == pytest.approx((np.mean(expected) - half, np.mean(expected) + half), abs=1e-3)


def test_the_clip_score_does_not_depend_on_batch_size_and_workers(call, renders):
    scores, texts = [], set()
    for batch_size, workers in ((1, 1), (3, 4), (16, 2)):
        options = flags(csv_file=renders / "p.csv", clip_model=MODELS / "clip", device="cpu", expected=COUNT)
        done = call(
            "clipscore.py", *options, *flags(image_folder=renders / "images", batch_size=batch_size, num_workers=workers)
        )
        assert done.code == 0, done.err
        texts.add(done.out)
        scores.append([float(row["clip_score"]) for row in csv.DictReader((renders / "images/clipscore.csv").open())])
    assert len(texts) == 1
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert scores[0] == pytest.approx(scores[2], abs=1e-4)


def test_the_clip_score_refuses_another_number_of_images(call, renders):
    before = snapshot(renders)
    options = flags(csv_file=renders / "p.csv", clip_model=MODELS / "clip", device="cpu", expected=COUNT + 1)
    done = call("clipscore.py", *options, *flags(image_folder=renders / "images"))
    assert done.failed_in_one_sentence and f"instead of the expected {COUNT + 1}" in done.err
    assert snapshot(renders) == before


def test_long_prompts_are_truncated(call, tmp_path):
    render(random_scene(random.Random(1))).save(tmp_path / "a_none_0p.png")
    (tmp_path / "p.csv").write_text("prompt\n" + "a red ball on a meadow " * 40 + "\n")
    done = call(
        "clipscore.py",
        "--image_folder",
        tmp_path,
        "--csv_file",
        tmp_path / "p.csv",
        "--clip_model",
        MODELS / "clip",
        "--device",
        "cpu",
    )
    assert done.code == 0 and "1 images" in done.out
