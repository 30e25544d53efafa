"""Masks and sizes that generate.py takes or refuses: alpha channels, black masks, sizes that differ, sizes that would be rounded."""

import numpy as np
import pytest
from conftest import flags
from PIL import Image

SIDE = 16
SHAPE = np.zeros((SIDE, SIDE), np.uint8)
SHAPE[:, : SIDE // 2] = 255


def layers(grey, alpha):
    return Image.fromarray(np.dstack([grey, grey, grey, alpha]))


MASKS = {
    "grey": Image.fromarray(SHAPE),
    "black paint, shape in alpha": layers(np.zeros_like(SHAPE), SHAPE),
    "white paint on transparent": layers(np.full_like(SHAPE, 255), SHAPE),
    "grey and alpha": Image.merge("LA", [Image.new("L", (SIDE, SIDE)), Image.fromarray(SHAPE)]),
    "opaque alpha, shape in colours": layers(SHAPE, np.full_like(SHAPE, 255)),
    "half transparent all over": layers(SHAPE, np.full_like(SHAPE, 128)),
}


@pytest.fixture
def generate(call, tmp_path, monkeypatch, family):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.csv").write_text("prompt\na red kettle\n")
    for folder in ("init", "mask"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (SIDE, SIDE), (20, 120, 220)).save(tmp_path / "init/0.png")

    def run(mask=None, name="sd_v1", **changes):
        masks = {}
        if mask is not None:
            mask.save(tmp_path / "mask/0.png")
            masks = {"mask_images": "mask"}
        options = {"model_path": family(name), "device": "cpu", "prompts_csv": "p.csv", "output_path": "t2i", "strength": 0.9,
                   "init_images": "init", "num_inference_steps": 2, "height": SIDE, "width": SIDE} | masks | changes  # fmt: skip
        return call("generate.py", *flags(**options))

    return run


def drawn(tmp_path, results):
    (path,) = (tmp_path / results).rglob("*.png")
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_a_shape_in_the_alpha_channel_is_the_same_mask(generate, tmp_path):
    for number, (what, mask) in enumerate(MASKS.items()):
        done = generate(mask, results_dir=f"r{number}")
        assert done.code == 0, (what, done.err)
        assert np.array_equal(drawn(tmp_path, f"r{number}"), drawn(tmp_path, "r0")), what
    mirrored = Image.fromarray(np.ascontiguousarray(SHAPE[:, ::-1]))
    assert generate(mirrored, results_dir="other").code == 0
    assert (drawn(tmp_path, "other") != drawn(tmp_path, "r0")).any()


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (Image.new("L", (SIDE, SIDE)), "is black"),
        (Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 0)), "is black"),
        (Image.new("L", (SIDE, SIDE), 100), "is black"),  # pipelines draw from 128 up
        (layers(SHAPE, np.ascontiguousarray(SHAPE.T)), "each contain a shape"),
        (Image.new("L", (SIDE, 2 * SIDE), 255), "differ in size (16x16 and 16x32 pixels)"),
    ],
)
def test_a_mask_that_draws_nothing_or_does_not_fit_is_refused(generate, tmp_path, mask, says):
    done = generate(mask)
    assert done.failed_in_one_sentence and says in done.err and "mask/0.png" in done.err, done.err
    assert not (tmp_path / "results").exists()


def test_a_shape_outside_the_crop_is_black(generate, tmp_path):
    Image.new("RGB", (3 * SIDE, SIDE)).save(tmp_path / "init/0.png")
    mask = Image.new("L", (3 * SIDE, SIDE))
    mask.paste(255, (0, 0, SIDE // 2, SIDE))
    done = generate(mask)
    assert done.failed_in_one_sentence and "is black within the image" in done.err


@pytest.mark.parametrize(("name", "size"), [("sd_v1", {"height": 31}), ("sdxl", {"width": 20}), ("sd_v3", {"height": 12}), ("flux", {"width": 17})])  # fmt: skip
@pytest.mark.parametrize("mode", ["text", "image", "inpaint"])
def test_a_size_that_would_be_rounded_is_refused(generate, tmp_path, name, size, mode):
    texts = {"init_images": None, "strength": None} if mode == "text" else {}
    done = generate(MASKS["grey"] if mode == "inpaint" else None, name, **size, **texts)
    assert done.failed_in_one_sentence and "is not divisible by 8" in done.err, done.err
    assert not (tmp_path / "results").exists()


def test_a_row_brings_its_own_bad_size(generate, tmp_path):
    (tmp_path / "p.csv").write_text("prompt,height,width\na red kettle,16,16\na cup,31,16\n")
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "init/1.png")
    assert "height 31" in generate(use_row_settings=[]).err
    assert not (tmp_path / "results").exists()
    assert generate(use_row_settings=[], end_idx=1).code == 0  # the row that is not drawn does not matter
