"""fid.py --job fid: its variants compared with torch-fidelity, clean-fid and a few lines of NumPy, on one random Inception-v3.

The published weights cannot be had offline. What the variants differ in, and the layers, do not depend on the weights.
"""

import io
import itertools
import json
import random
import shutil
from unittest import mock

import fid
from demo.world import KINDS, random_scene, render
from des.data.image_folders import image_hashes
from des.evaluation.batches import Reading
from des.evaluation.fid_features import InceptionExtractor, ModelExtractor, extract
from des.evaluation.frechet import Gaussian, load_statistics, save_statistics
from des.evaluation.inception import VARIANTS, Inception, load_inception
from des.utils.choices import MODEL_VARIANT
from des.utils.errors import UserError
from des.utils.resume import Findings

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
from cleanfid import fid as cleanfid
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from conftest import ROOT, flags, snapshot
from PIL import Image
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance

SMALL = ROOT / "demo/models/classifier_object"
SIZES = [(64, 64), (120, 80), (81, 128), (300, 299), (33, 57), (500, 321)]


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file of random Inception-v3 weights whose features vary with the image."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=empty)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Images of many sizes in all formats: six generated ones and three brighter reference ones."""
    folder = tmp_path_factory.mktemp("fid")
    draw = np.random.default_rng(5)
    for name, count, low in (("gen", 6, 0), ("ref", 3, 90)):
        for i in range(count):
            path = folder / name / f"more{i % 2}" / f"x_{i}p.{('png', 'jpg', 'webp')[i % 3]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(draw.integers(low, 256, (9, 7, 3), dtype=np.uint8))
            coarse.resize(SIZES[i % len(SIZES)], Image.Resampling.BILINEAR).save(path)
    return folder


def run(folders, weights, output, **options):
    """Run fid.py on the two folders; returns its JSON."""
    options = {"coco_imgs_path": folders / "ref", "batch_size": 16} | options
    argv = flags(gen_imgs_path=folders / "gen", feature_extractor=weights, device="cpu", output_file=output, **options)
    fid.main([str(part) for part in argv])
    return json.loads(output.with_suffix(".json").read_text())


@pytest.fixture(scope="session")
def result(folders, weights, tmp_path_factory):
    """All variants from one pass."""
    output = tmp_path_factory.mktemp("result") / "all.txt"
    return run(folders, weights, output, variant=list(VARIANTS)) | {"text": output.read_text()}


def test_the_result_names_every_variant(result):
    lines = result["text"].splitlines()
    assert [line.split(": ")[0] for line in lines[:3]] == ["FID (paper)", "FID (torch-fidelity)", "FID (clean-fid)"]
    assert lines[3:] == [result["caution"]] and "3 images are fewer than the 2048 features" in result["caution"]
    assert lines[0].endswith(f"{result['fid']:.4f} (6 generated, 3 reference images, 2048 features)")
    assert (result["generated"], result["reference"], result["features"]) == (6, 3, 2048)
    assert result["fid"] == result["variants"]["paper"]
    values = sorted(result["variants"].values())
    assert values[0] > 0 and all(b / a > 1.01 for a, b in itertools.pairwise(values))


def test_torch_fidelity_computes_the_same(result, folders, weights):
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders / "gen"), input2=str(folders / "ref"), fid=True, cuda=False, cache=False, verbose=False, batch_size=1,
        samples_find_deep=True, samples_find_ext="png,jpg,webp", save_cpu_ram=True, feature_extractor_weights_path=str(weights),
    )  # fmt: skip
    assert result["variants"]["torch-fidelity"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)


def test_clean_fid_computes_the_same(result, folders, weights):
    model = InceptionV3W.__new__(InceptionV3W)  # without the download
    nn.Module.__init__(model)
    network = Inception(torch.load(weights, weights_only=True)).network
    model.layers, model.resize_inside = nn.Sequential(*network.children()), False
    options = {"mode": "clean", "num_workers": 0, "device": torch.device("cpu"), "verbose": False}
    with torch.random.fork_rng(devices=[]):
        theirs = [torch.tensor(cleanfid.get_folder_features(str(folders / name), model, **options)) for name in ("gen", "ref")]
    assert result["variants"]["clean-fid"] == pytest.approx(frechet_distance(*theirs), rel=1e-3)


def test_variant_paper_follows_its_definition(result, folders, weights):
    network = Inception(torch.load(weights, weights_only=True)).network
    features = {}
    for name in ("gen", "ref"):
        rows = []
        for path in sorted((folders / name).rglob("*.*")):
            pixels = np.asarray(Image.open(path).convert("RGB"))
            height, width, _ = pixels.shape
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            square = Image.fromarray(pixels[top : top + side, left : left + side]).resize((299, 299), Image.Resampling.BICUBIC)
            x = torch.tensor(np.array(square), dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
            with torch.inference_mode():
                rows.append(nn.Sequential(*network.children())(x).flatten().double().numpy())
        features[name] = np.array(rows)
    x, y = features["gen"], features["ref"]
    cross = (x - x.mean(0)) @ (y - y.mean(0)).T / np.sqrt((len(x) - 1) * (len(y) - 1))
    trace = x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum() - 2 * np.linalg.svd(cross, compute_uv=False).sum()
    assert result["variants"]["paper"] == pytest.approx(np.square(x.mean(0) - y.mean(0)).sum() + trace, rel=1e-5)


def test_batch_size_and_workers_change_nothing(result, folders, weights, tmp_path):
    again = run(folders, weights, tmp_path / "3.txt", batch_size=3, num_workers=4)
    assert (tmp_path / "3.txt").read_text().splitlines()[0] == result["text"].splitlines()[0]
    assert again["fid"] == pytest.approx(result["fid"], rel=1e-7)


def test_the_input_of_clean_fid_is_its_own_bit_for_bit():
    """Black and white images, for which bicubic interpolation overshoots and is clipped."""
    image = Image.effect_noise((70, 50), 90).point(lambda value: 255 * (value > 128)).convert("RGB")
    theirs = torch.tensor(build_resizer("clean")(np.array(image))).permute(2, 0, 1)
    assert theirs.min() == 0 and theirs.max() == 255
    assert torch.equal(VARIANTS["clean-fid"](image), (theirs - 128) / 128)


@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs_do_not_depend_on_the_workers(folders, variant, tmp_path):
    """Preprocessing equals bit for bit, by a stand-in network that returns its input."""
    extractor = InceptionExtractor(nn.Flatten(1), [variant], torch.device("cpu"))
    one, four = (
        extract(extractor, image_hashes(folders / "gen"), Reading(batch_size, n), Findings(tmp_path / f"{n}.json", "x"))[0]
        for batch_size, n in ((16, 1), (3, 4))
    )
    assert one.shape == (6, 3 * 299 * 299) and torch.equal(one, four)
    assert -1 <= one.min() < -0.8 and 0.9 < one.max() <= 1


def test_the_prepared_input_passes_through_the_networks_own_forward(weights):
    network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(weights))
    image = Image.effect_noise((70, 50), 60).convert("RGB")
    pixels = torch.tensor(np.array(image)).permute(2, 0, 1)[None]
    ours = load_inception(weights, torch.device("cpu"))
    with torch.inference_mode():
        torch.testing.assert_close(ours(VARIANTS["torch-fidelity"](image)[None]), network(pixels)[0], rtol=1e-5, atol=1e-5)


def test_statistics_replace_the_reference_images(folders, tmp_path):
    first = run(folders, SMALL, tmp_path / "a.txt", save_stats=tmp_path / "ref.npz")
    with np.load(tmp_path / "ref.npz") as file:
        mu, sigma = file["mu"], file["sigma"]
    assert (
        sigma.shape == (first["features"],) * 2 and mu.shape == (first["features"],) and mu.dtype == sigma.dtype == np.float64
    )
    second = run(folders, SMALL, tmp_path / "b.txt", coco_imgs_path=None, ref_stats=tmp_path / "ref.npz")
    assert second["fid"] == pytest.approx(first["fid"], rel=1e-6)
    assert second["reference"] == 3 and second["ref_stats"]["recorded"]["variant"] == MODEL_VARIANT
    assert "statistics of 3 reference images from ref.npz," in (tmp_path / "b.txt").read_text()

    np.savez(tmp_path / "theirs.npz", mu=mu, sigma=sigma)
    third = run(folders, SMALL, tmp_path / "c.txt", coco_imgs_path=None, ref_stats=tmp_path / "theirs.npz")
    assert third["fid"] == second["fid"]
    assert (third["reference"], third["ref_stats"]["recorded"]) == (None, {})
    unchecked = "an unrecorded number of reference images from theirs.npz (its variant and network not recorded)"
    assert unchecked in (tmp_path / "c.txt").read_text()


def frechet_distance(x, y):
    return Gaussian.of_features(x).distance(Gaussian.of_features(y))


@pytest.mark.parametrize(("n", "m", "d"), [(200, 150, 8), (12, 40, 30), (12, 9, 30), (50, 50, 50), (40, 60, 512)])
def test_frechet_distance_equals_scipy(n, m, d):
    draw = np.random.default_rng(n).normal
    x, y = draw(size=(n, d)) @ draw(size=(d, d)), draw(size=(m, d)) + 0.5
    sx, sy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(sx @ sy).astype(complex)).real.sum()  # the trace of the root of a product of PSD matrices
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(sx) + np.trace(sy) - 2 * root
    x, y = torch.tensor(x), torch.tensor(y)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)
    if n > d and m > d:
        assert root == pytest.approx(np.trace(scipy.linalg.sqrtm(sx @ sy)).real, rel=1e-6)
    of_sigma = Gaussian.of_covariance(y.mean(0), torch.tensor(sy))
    assert Gaussian.of_features(x).distance(of_sigma) == pytest.approx(frechet_distance(x, y), rel=1e-10)
    both = Gaussian.of_covariance(x.mean(0), torch.tensor(sx)).distance(of_sigma)
    assert both == pytest.approx(frechet_distance(x, y), rel=1e-10)


class FirstPixels(nn.Module):
    """A stand-in feature network for torchmetrics: the first eight values of each image."""

    num_features = 8

    def forward(self, x):
        return x.flatten(1)[:, :8].float()


def test_frechet_distance_equals_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(low, 256, (60, 3, 4, 4), generator=generator, dtype=torch.uint8) for low in (0, 60))
    metric = FrechetInceptionDistance(feature=FirstPixels(), input_img_size=(3, 4, 4)).set_dtype(torch.float64)
    metric.update(x, real=True)
    metric.update(y, real=False)
    features = FirstPixels()
    assert frechet_distance(features(x), features(y)) == pytest.approx(metric.compute().item(), rel=1e-6)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Renders of the demo's world for its small classifier: six balls, and one scene of every kind."""
    folder = tmp_path_factory.mktemp("scenes")
    for name, kinds in (("gen", ["ball"] * 6), ("ref", KINDS), ("one", ["ball"])):
        (folder / name).mkdir()
        for row, kind in enumerate(kinds):
            render(random_scene(random.Random(row), kind)).save(folder / name / f"b_{row}p.png")
    return folder


def test_an_image_model_is_its_own_variant(call, scenes, tmp_path):
    values = {}
    for name, gen, batch_size in (("same", "ref", 64), ("balls", "gen", 16), ("threes", "gen", 3), ("ones", "gen", 1)):
        done = call("fid.py", *flags(gen_imgs_path=scenes / gen, coco_imgs_path=scenes / "ref", feature_extractor=SMALL, device="cpu",
                                     batch_size=batch_size, output_file=tmp_path / f"{name}.txt"))  # fmt: skip
        assert done.code == 0, done.err
        assert done.out.startswith("FID (the model's own): ")
        values[name] = json.loads((tmp_path / f"{name}.json").read_text())["fid"]
    assert values["same"] == pytest.approx(0, abs=1e-6)
    assert values["balls"] == pytest.approx(values["threes"], rel=1e-5)
    assert values["balls"] == pytest.approx(values["ones"], rel=1e-5)
    assert len({(tmp_path / f"{name}.txt").read_text() for name in ("balls", "threes", "ones")}) == 1
    assert values["balls"] > 1


@pytest.fixture
def refusal(call, scenes, tmp_path):
    """Returns a function that runs fid.py with a change, checks that it fails in one sentence and writes nothing, and returns the message."""
    for name in ("gen", "ref", "one"):
        shutil.copytree(scenes / name, tmp_path / name)
    eight = Gaussian.of_features(torch.randn(9, 8, generator=torch.Generator().manual_seed(0)))
    save_statistics(tmp_path / "other_network.npz", eight, {"variant": MODEL_VARIANT, "extractor_sha256": "0" * 64, "n": 9})
    save_statistics(tmp_path / "narrow.npz", eight, {})
    save_statistics(tmp_path / "clean.npz", eight, {"variant": "clean-fid"})
    np.savez(tmp_path / "nan.npz", mu=np.full(4, np.nan), sigma=np.eye(4))
    np.savez(tmp_path / "negative.npz", mu=np.zeros(4), sigma=-np.eye(4))
    np.savez(tmp_path / "lopsided.npz", mu=np.zeros(2), sigma=np.array([[1.0, 0.5], [0.0, 1.0]]))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(tmp_path / "sigma.npz", sigma=np.eye(4))
    np.savez(tmp_path / "pickle.npz", mu=np.array([print], dtype=object), sigma=np.eye(1))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "nan.npz").read_bytes()[:-40])
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pth")
    (tmp_path / "damaged.pth").write_bytes(b"damaged")
    shutil.copytree(tmp_path / "gen", tmp_path / "broken")
    (tmp_path / "broken/b_3p.png").write_bytes(b"broken")

    def run(change):
        change = {key: tmp_path / value if str(value).endswith((".npz", ".pth")) else value for key, value in change.items()}
        options = {"gen_imgs_path": "gen", "coco_imgs_path": "ref", "feature_extractor": SMALL, "device": "cpu"} | change
        options |= {key: tmp_path / options[key] for key in ("gen_imgs_path", "coco_imgs_path") if options[key]}
        before = snapshot(tmp_path)
        done = call("fid.py", *flags(**options))
        assert done.failed_in_one_sentence, done.err
        assert snapshot(tmp_path) == before
        return done.err

    return run


STATS = {"coco_imgs_path": None}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gen_imgs_path": "one"}, "at least two generated images"),
        ({"coco_imgs_path": "one"}, "at least two reference images"),
        ({"gen_imgs_path": "nowhere"}, "nowhere does not exist"),
        ({"expected": 7}, "contains 6 images instead of the expected 7"),
        ({"expected_ref": 3}, "instead of the expected 3"),
        ({"gen_imgs_path": "broken", "save_stats": "new.npz"}, "b_3p.png is not a readable image"),
        ({"coco_imgs_path": None}, "--coco_imgs_path"),
        ({"ref_stats": "narrow.npz"}, "--ref_stats"),
        ({"variant": "paper"}, "--variant is for Inception-v3 weights"),
        ({"variant": "legacy", "feature_extractor": None}, "invalid choice"),
        (
            {"variant": ["paper", "clean-fid"], "feature_extractor": "weights.pth", "save_stats": "new.npz"},
            "the statistics of one variant",
        ),
        ({"feature_extractor": "weights.pth"}, "weights.pth could not be loaded"),
        ({"feature_extractor": "damaged.pth"}, "damaged.pth is not a file of Inception-v3 weights"),
        ({"feature_extractor": "nowhere"}, "nowhere could not be loaded"),
        (STATS | {"ref_stats": "narrow.npz"}, "holds 8 features"),
        (STATS | {"ref_stats": "clean.npz"}, "variant clean-fid, not of the model's own"),
        (STATS | {"ref_stats": "narrow.npz", "save_stats": "new.npz"}, "--save_stats needs reference images"),
        (STATS | {"ref_stats": "other_network.npz"}, "another feature extractor"),
        (STATS | {"ref_stats": "nan.npz"}, "not finite"),
        (STATS | {"ref_stats": "negative.npz"}, "negative eigenvalues"),
        (STATS | {"ref_stats": "lopsided.npz"}, "not symmetric"),
        (STATS | {"ref_stats": "shapes.npz"}, "do not match"),
        (STATS | {"ref_stats": "sigma.npz"}, "it has no array 'mu'"),
        (STATS | {"ref_stats": "pickle.npz"}, "is not a file of FID statistics"),
        (STATS | {"ref_stats": "cut.npz"}, "is not a file of FID statistics"),
        (STATS | {"ref_stats": "none.npz"}, "none.npz"),
        ({"job": "pickscore", "prompt_path": "p.csv"}, "--job pickscore does not read --feature_extractor"),
        ({"job": "blipscore", "feature_extractor": None}, "needs --prompt_path"),
        ({"model": "x"}, "--job fid does not read --model"),
    ],
)
def test_refusals_say_why_and_write_nothing(refusal, change, reason):
    assert reason in refusal(change)


def test_offline_the_weights_are_asked_for(call, scenes, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.urlopen", mock.Mock(side_effect=OSError("no network")))
    done = call("fid.py", *flags(gen_imgs_path=scenes / "gen", coco_imgs_path=scenes / "ref", device="cpu"))
    assert done.failed_in_one_sentence and "no network" in done.err and "--feature_extractor" in done.err


def test_pytorch_fid_reads_the_statistics(tmp_path):
    """As its `compute_statistics_of_path` does."""
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    save_statistics(tmp_path / "s.npz", Gaussian.of_features(features), {"n": 30})
    with np.load(tmp_path / "s.npz") as file:
        mu, sigma = file["mu"][:], file["sigma"][:]
    np.testing.assert_allclose(mu, features.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(features.numpy(), rowvar=False), rtol=1e-10, atol=1e-12)
    gaussian, facts = load_statistics(tmp_path / "s.npz")
    assert facts == {"n": 30} and gaussian.distance(Gaussian.of_features(features)) == pytest.approx(0, abs=1e-10)


def test_an_interrupted_fid_resumes_with_the_features_it_has(folders, tmp_path, monkeypatch):
    seen = []
    forward = ModelExtractor.__call__

    def counted(self, batch):
        if len(seen) == 4:
            raise UserError("stopped by the test")
        seen.append(len(batch))
        return forward(self, batch)

    output = tmp_path / "cut.txt"
    whole = run(folders, SMALL, tmp_path / "whole.txt", batch_size=2)
    monkeypatch.setattr(ModelExtractor, "__call__", counted)
    with pytest.raises(UserError, match="stopped by the test"):
        run(folders, SMALL, output, batch_size=2)
    assert not output.exists() and (tmp_path / ".cut.part.jsonl").exists()
    monkeypatch.setattr(ModelExtractor, "__call__", lambda self, batch: seen.append(len(batch)) or forward(self, batch))
    again = run(folders, SMALL, output, batch_size=2)
    assert sum(seen) == 9 and again["fid"] == pytest.approx(whole["fid"], rel=1e-7)
    assert not (tmp_path / ".cut.part.jsonl").exists()
