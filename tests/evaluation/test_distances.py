"""fid.py --job kid and --job lpips."""

import json
import shutil

import fid
from demo.world import random_scene, render
from des.data.claims import RECORD
from des.evaluation.kid import kernel_distance
from des.evaluation.results import read_score
from des.utils.errors import UserError

import numpy as np
import pytest
import torch
from conftest import ROOT, flags
from PIL import Image
from torchvision.models import squeezenet1_1

SMALL = ROOT / "demo/models/classifier_object"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Six drawn scenes in `des`, the same with another first image in `none`, and a third folder with other rows."""
    folder = tmp_path_factory.mktemp("distances")
    for i in range(6):
        image = render(random_scene(np.random.default_rng(i)))
        for name in ("des", "none"):
            (folder / name).mkdir(exist_ok=True)
            image.save(folder / name / f"x_{name}_{i}p.png")
    render(random_scene(np.random.default_rng(9))).save(folder / "none/x_none_0p.png")
    return folder


def run(folders, tmp_path, job, **options):
    options = {"gen_imgs_path": folders / "des", "device": "cpu", "output_file": tmp_path / f"{job}.txt"} | options
    fid.main([str(part) for part in flags(job=job, **options)])
    return json.loads((tmp_path / f"{job}.json").read_text()), (tmp_path / f"{job}.txt").read_text()


def lines_of(folder):
    """The manifest lines of the images in a folder."""
    from des.utils.files import sha256_file

    return {path.name: {"file": path.name, "sha256": sha256_file(path)} for path in folder.glob("*.png")}


def polynomial_mmd(x, y):
    """The unbiased squared MMD with the kernel (x y / d + 1)^3, in NumPy."""
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    n, m = len(x), len(y)
    within = [(kernel(a, a).sum() - np.trace(kernel(a, a))) / (len(a) * (len(a) - 1)) for a in (x, y)]
    return sum(within) - 2 * kernel(x, y).sum() / (n * m)


def test_kid_of_whole_sets_is_the_unbiased_mmd():
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(9, 5, generator=draw, dtype=torch.float64) + shift for shift in (0, 1))
    mean, std = kernel_distance(x, y, 3, 9, 0)
    assert mean == pytest.approx(polynomial_mmd(x.numpy(), y.numpy()), rel=1e-9) and std == pytest.approx(0, abs=1e-9)


def test_kid_is_seeded_and_leaves_the_random_stream_alone():
    x, y = torch.randn(20, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(15, 4)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = kernel_distance(x, y, 5, 4, 7)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == kernel_distance(x, y, 5, 4, 7) != kernel_distance(x, y, 5, 4, 8)
    with pytest.raises(UserError, match="must be 2 to 15"):
        kernel_distance(x, y, 5, 16, 7)


def test_kid_on_another_models_features(folders, tmp_path):
    options = {"coco_imgs_path": folders / "none", "feature_extractor": SMALL, "kid_subsets": 4, "kid_subset_size": 5}
    result, text = run(folders, tmp_path, "kid", **options)
    assert (
        text.startswith(f"KID (the model's own): {result['kid']:.6f}, std over subsets")
        and result["std"]["the model's own"] > 0
    )
    assert (result["generated"], result["reference"], result["seed"]) == (6, 6, 0) and len(result["reference_sha256"]) == 64
    assert run(folders, tmp_path, "kid", **options)[0]["kid"] == result["kid"]
    (score,) = read_score(tmp_path / "kid.json", lines_of(folders / "des"))
    assert (score.kind, score.title, score.value) == ("kid", "KID (another model's features)", result["kid"])
    with pytest.raises(UserError, match="other images"):
        read_score(tmp_path / "kid.json", lines_of(folders / "none"))
    whole, _ = run(folders, tmp_path, "kid", coco_imgs_path=folders / "none", feature_extractor=SMALL)
    assert whole["subset_size"] == 6 and whole["std"]["the model's own"] == pytest.approx(0, abs=1e-9)


@pytest.fixture
def backbone(tmp_path, monkeypatch):
    """A random SqueezeNet at the path of the published one in torchvision's cache."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = squeezenet1_1().state_dict()
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub/checkpoints/squeezenet1_1-b8a52dc0.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture
def lpips(folders, tmp_path):
    def compare(**options):
        return run(folders, tmp_path, "lpips", **({"original_imgs_path": folders / "none", "lpips_net": "squeeze"} | options))

    return compare


def test_lpips_of_equal_images_is_zero(folders, tmp_path, backbone, lpips):
    result, text = lpips(batch_size=4)
    rows = [line.split(",") for line in (tmp_path / "lpips.csv").read_text().splitlines()]
    values = [float(row[rows[0].index("lpips")]) for row in rows[1:]]
    assert values[0] > 1e-6 and values[1:] == [0.0] * 5
    assert (
        result["lpips"] == pytest.approx(values[0] / 6)
        and result["n"] == 6
        and result["low"] < result["lpips"] < result["high"]
    )
    assert len(result["net_sha256"]) == 64 and text.startswith("LPIPS (squeeze): ") and "95% interval" in text
    (score,) = read_score(tmp_path / "lpips.json", lines_of(folders / "des"))
    assert (score.kind, score.title) == ("lpips", "LPIPS")


def test_lpips_compares_equal_rows_and_seeds_only(folders, tmp_path, backbone, lpips):
    other = shutil.copytree(folders / "none", tmp_path / "other")
    (other / "x_none_3p.png").unlink()
    with pytest.raises(UserError, match="row 3 is in one of them only"):
        lpips(original_imgs_path=other)
    Image.new("RGB", (40, 64)).save(other / "x_none_3p.png")
    with pytest.raises(UserError, match="they differ in size"):
        lpips(original_imgs_path=other)
    for name in ("small", "smaller"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (30, 64)).save(tmp_path / name / f"x_{name}_0p.png")
    with pytest.raises(UserError, match="31 pixels a side that --lpips_net alex needs"):
        lpips(gen_imgs_path=tmp_path / "small", original_imgs_path=tmp_path / "smaller", lpips_net="alex")
    drawn = {}
    for name, seed in (("des", 1), ("none", 2)):
        drawn[name] = shutil.copytree(folders / name, tmp_path / f"drawn_{name}")
        lines = [
            {**line, "seed": seed, "row": i, "settings_sha256": name} for i, line in enumerate(lines_of(drawn[name]).values())
        ]
        (drawn[name] / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (drawn[name] / RECORD).write_text("{}")
    with pytest.raises(UserError, match="they differ in seed"):
        lpips(gen_imgs_path=drawn["des"], original_imgs_path=drawn["none"])
    assert not (tmp_path / "lpips.json").exists()


def test_lpips_compares_runs_of_the_same_settings_with_the_original_model_only(folders, tmp_path, backbone, lpips):
    with pytest.raises(UserError, match="is given twice"):
        lpips(original_imgs_path=folders / "none/../des")
    unet = {"unet": "u", "vae": "v"}
    common = {"num_inference_steps": 50, "guidance_scale": 7.5, "scheduler": "DDIMScheduler", "components": unet, "seed": 1}
    drawn, records = {}, {"none": {"settings": common | {"training_method": "none", "text_encoder_sha256": "a"}}}
    records["des"] = {"settings": common | {"training_method": "des", "text_encoder_sha256": "b"}, "protection": {"1": {}}}
    for name in ("des", "none"):
        drawn[name] = shutil.copytree(folders / name, tmp_path / f"drawn_{name}")
        lines = [
            {**line, "seed": 1, "row": i, "settings_sha256": name} for i, line in enumerate(lines_of(drawn[name]).values())
        ]
        (drawn[name] / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def compare(none=(), des=(), **protection):
        for name, change in (("none", none), ("des", des)):
            record = {**records[name], "settings": records[name]["settings"] | dict(change)}
            (drawn[name] / RECORD).write_text(json.dumps(record | (protection if name == "des" else {})))
        return lpips(gen_imgs_path=drawn["des"], original_imgs_path=drawn["none"])[0]

    assert compare(des={"seed": 2, "deterministic": True})["n"] == 6  # the manifest has each image's seed
    assert compare(des={"unet_sha256": "c", "components": {"unet": "c", "vae": "v"}, "training_method": "uce"})["n"] == 6
    for change, what in (
        ({"num_inference_steps": 20}, "num_inference_steps"), ({"scheduler": "EulerDiscreteScheduler"}, "scheduler"),
        ({"components": {"unet": "u", "vae": "another"}}, "vae"), ({"negative_prompt": "x"}, "negative_prompt"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"differ in {what};"):
            compare(des=change)
    with pytest.raises(UserError, match="differ in text_encoder;"):
        compare(protection={})
    with pytest.raises(UserError, match="has images of esd instead of the original"):
        compare(none={"training_method": "esd"})


def test_without_the_backbone_lpips_says_so(tmp_path, monkeypatch, lpips):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    with pytest.raises(UserError, match=r"squeeze backbone of LPIPS.* could not be loaded: no network"):
        lpips()


@pytest.mark.parametrize(("options", "reason"), [
    ({"job": "kid"}, "needs --coco_imgs_path"), ({"job": "kid", "coco_imgs_path": "x", "ref_stats": "y"}, "does not read --ref_stats"),
    ({"job": "lpips"}, "needs --original_imgs_path"), ({"job": "fid", "coco_imgs_path": "x", "seed": 1}, "does not read --seed"),
    ({"job": "lpips", "original_imgs_path": "x", "variant": "paper"}, "does not read --variant"),
])  # fmt: skip
def test_options_of_other_jobs_are_refused(capsys, options, reason):
    with pytest.raises(SystemExit):
        fid.parse_args([str(part) for part in flags(gen_imgs_path="x", **options)])
    assert reason in capsys.readouterr().err
