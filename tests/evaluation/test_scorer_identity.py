"""Scores are reused and compared only if everything that determines them is equal; paths and library versions do not count."""

import json
import random
import shutil

from demo.world import KINDS, random_scene, render
from des.evaluation.classify import ImageScores, stamp_of
from des.evaluation.detectors.classifier import Classifier
from des.evaluation.results import _distances
from des.evaluation.scorer_identity import MODEL, configuration_sha256, detector_identity
from des.utils.errors import UserError
from des.utils.files import sha256_texts

import pytest
import torch
from conftest import ROOT, flags
from PIL import Image

MODELS = ROOT / "demo/models"
ROWS = 4


def edit(path, **changes):
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_pixels(model):
    edit(model / "preprocessor_config.json", image_mean=[0.1, 0.9, 0.2], image_std=[2.0, 0.3, 1.0])


def other_size(model):
    edit(model / "preprocessor_config.json", size={"height": 24, "width": 24})


def other_labels(model):
    names = json.loads((model / "config.json").read_text())["id2label"]
    turned = {key: names[str((int(key) + 1) % len(names))] for key in names}
    edit(model / "config.json", id2label=turned, label2id={name: int(key) for key, name in turned.items()})


def nothing_that_counts(model):
    edit(model / "config.json", transformers_version="4.0.0", _name_or_path="elsewhere", dtype="float32")


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    rng = random.Random(5)
    for row in range(ROWS):
        render(random_scene(rng, KINDS[row]), rng).save(tmp_path / f"images/t2i_none_{row}p.png")
    return tmp_path / "images"


@pytest.fixture
def model(tmp_path):
    """A copy of the demo's classifier of objects."""
    shutil.copytree(MODELS / "classifier_object", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def classify(call, images, tmp_path):
    def run(model, **changes):
        options = {"folder_dir": images, "classifier": model, "cls_class": KINDS[0], "devices": "cpu"} | changes
        done = call("tasks/img_batch_classify.py", *flags(**options))
        assert done.code == 0, done.err
        content = json.loads((images / f"{changes.get('output_name', 'classify')}.json").read_text())
        return content, done.err

    return run


@pytest.mark.parametrize("change", [other_pixels, other_labels])
def test_another_processor_or_other_labels_are_scored_again(classify, model, change):
    before, _ = classify(model)
    change(model)
    after, log = classify(model)
    fresh, _ = classify(model, output_name="fresh")
    assert "scored before" not in log
    assert after["images"] == fresh["images"] != before["images"] and after["k"] == fresh["k"]
    assert detector_identity(after["detector"]) != detector_identity(before["detector"])


def test_what_decides_nothing_is_not_scored_again(classify, model, tmp_path, monkeypatch):
    before, _ = classify(model)
    nothing_that_counts(model)
    moved = shutil.move(model, tmp_path / "moved")
    monkeypatch.setattr("des.utils.provenance.LIBRARIES", ("torch",))
    after, log = classify(moved)
    assert f"{ROWS} of {ROWS} images were scored before" in log
    assert after["images"] == before["images"] and after["made_by"]["versions"] != before["made_by"]["versions"]
    assert detector_identity(after["detector"]) == detector_identity(before["detector"])


def test_a_result_without_the_configuration_is_not_reused(classify, model, images):
    """As earlier versions of this program wrote it."""
    content, _ = classify(model)
    del content["detector"]["configuration_sha256"]
    content["images"][0]["hit"] = not content["images"][0]["hit"]
    (images / "classify.json").write_text(json.dumps(content))
    again, log = classify(model)
    assert "scored before" not in log and again["images"][1:] == content["images"][1:]
    assert again["images"][0]["hit"] != content["images"][0]["hit"]


@pytest.mark.parametrize("change", [other_pixels, other_labels])
def test_a_card_of_another_detector_does_not_count(model, images, change):
    def cards():
        detector = Classifier(str(model), torch.device("cpu"), "ASR", [KINDS[0]])
        return ImageScores({"object": detector}, {"object": "classify_object"}, KINDS[0], images)

    path, line = images / "t2i_none_0p.png", {"file": "t2i_none_0p.png"}
    cards().score(path, line, Image.open(path))
    assert cards().read(path, line) is not None
    change(model)
    assert cards().read(path, line) is None


def test_library_versions_are_no_identity(model):
    detector = Classifier(str(model), torch.device("cpu"), "ASR", [KINDS[0]])
    before, stamp = detector_identity(detector.facts[""]), stamp_of(detector)
    detector.facts[""] |= {
        "onnxruntime": "0",
        "opencv": "0",
        "open_clip": "0",
        "provider": "other",
        "weights": "x",
        "classifier": "y",
    }
    assert (detector_identity(detector.facts[""]), stamp_of(detector)) == (before, stamp)
    for name in ("classifier_sha256", "configuration_sha256", "profile"):
        assert detector_identity(detector.facts[""] | {name: "other"}) != before


def test_a_model_without_configuration_is_refused(tmp_path):
    with pytest.raises(UserError, match="none of the files"):
        configuration_sha256(str(tmp_path), MODEL)


@pytest.fixture
def fid(call, images, model, tmp_path):
    def run(**changes):
        options = {"gen_imgs_path": images, "coco_imgs_path": images, "feature_extractor": model, "device": "cpu",
                   "output_file": tmp_path / "fid.txt"} | changes  # fmt: skip
        return call("fid.py", *flags(**options))

    return run


@pytest.mark.parametrize("change", [other_size, other_pixels])
def test_statistics_of_another_preprocessing_are_refused(fid, model, tmp_path, change):
    assert fid(save_stats=tmp_path / "ref.npz").code == 0
    use = {"coco_imgs_path": None, "ref_stats": tmp_path / "ref.npz", "output_file": tmp_path / "again.txt"}
    done = fid(**use)
    assert done.code == 0 and "not recorded" not in done.out
    nothing_that_counts(model)
    assert fid(**use).code == 0
    (tmp_path / "again.txt").unlink()
    change(model)
    done = fid(**use)
    assert done.failed_in_one_sentence and "another configuration" in done.err and "image size" in done.err, done.err
    assert not (tmp_path / "again.txt").exists()


def test_features_of_an_interrupted_fid_are_those_of_the_same_preprocessing(fid, model, images, tmp_path, monkeypatch):
    (tmp_path / "ref").mkdir()
    for path in images.glob("*.png"):
        Image.open(path).rotate(90).save(tmp_path / "ref" / path.name)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("des.evaluation.frechet.Gaussian.distance", killed)
        assert fid(coco_imgs_path=tmp_path / "ref").code != 0
    assert (tmp_path / ".fid.part.jsonl").stat().st_size > 0
    other_pixels(model)
    done, fresh = fid(coco_imgs_path=tmp_path / "ref"), fid(coco_imgs_path=tmp_path / "ref", output_file=tmp_path / "fresh.txt")
    assert done.code == 0 and "scored before" not in done.err
    assert done.out == fresh.out


def test_fids_against_other_references_do_not_compare(tmp_path):
    content = {"generated": 1, "reference": 9, "extractor_sha256": "a", "variants": {"paper": 1.0}, "reference_sha256": None}
    lines = {"x": {"sha256": "d"}}
    content["generated_sha256"] = sha256_texts(["d"])

    def identity(**changes):
        (tmp_path / "x_fid.json").write_text(json.dumps(content | changes))
        return _distances(tmp_path / "x_fid.json", lines)[0].identity

    plain = identity(ref_stats={"sha256": "one"})
    assert plain == identity(ref_stats={"sha256": "one"})
    assert len({plain, identity(ref_stats={"sha256": "two"}), identity(), identity(configuration_sha256="c")}) == 4


@pytest.fixture
def clipscore(call, images, tmp_path):
    (tmp_path / "p.csv").write_text("prompt\n" + "".join(f"a {kind}\n" for kind in KINDS[:ROWS]))

    def run(model):
        done = call("clipscore.py", *flags(image_folder=images, csv_file=tmp_path / "p.csv", clip_model=model, device="cpu"))
        path = images / "clipscore.json"
        return done, json.loads(path.read_text()) if path.exists() else None

    return run


def other_clip_pixels(model):
    part = json.loads((model / "processor_config.json").read_text())["image_processor"]
    edit(model / "processor_config.json", image_processor=part | {"image_mean": [0.1, 0.9, 0.2]})


def other_tokens(model):
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("change", [other_clip_pixels, other_tokens])
def test_clip_scores_of_an_interrupted_run_are_those_of_the_same_processor(clipscore, tmp_path, images, monkeypatch, change):
    shutil.copytree(MODELS / "clip", tmp_path / "clip")

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("des.evaluation.scored_images.write_json", killed)
        done, _ = clipscore(tmp_path / "clip")
        assert done.code != 0 and (images / ".clipscore.part.jsonl").is_file()
    nothing_that_counts(tmp_path / "clip")
    change(tmp_path / "clip")
    done, after = clipscore(tmp_path / "clip")
    assert done.code == 0 and "scored before" not in done.err
    _, original = clipscore(MODELS / "clip")
    assert after["clip_sha256"] == original["clip_sha256"]
    assert after["clip_configuration_sha256"] != original["clip_configuration_sha256"]
    if change is other_clip_pixels:
        assert after["clip_score"] != original["clip_score"]
