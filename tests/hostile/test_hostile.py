"""Hostile input: each is read as docs/input.md says, or refused in one sentence; never a traceback, never a silent skip."""

import argparse
import io
import json
import os
import pickle
import runpy
import shutil
import struct
import sys
import time
import zlib

from des.data.image_folders import image_hashes
from des.data.images import read_image
from des.data.prompts import never_drawn, read_rows
from des.evaluation.imagereward import load_imagereward
from des.evaluation.inception import VARIANTS, load_inception
from des.models.checkpoints import fingerprint, load_checkpoint
from des.utils.errors import UserError

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, SCRIPTS, flags, snapshot
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import OPEN_CLIP
from transformers import CLIPTextModel

MARKER = "zyzzyva"  # a word that stands for a prompt which no message may repeat
CLASSIFIER = ROOT / "demo/models/classifier_object"

# ---------------------------------------------------------------- prompt CSVs


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"\xef\xbb\xbfprompt\na\n", ["a"]),
        (b"prompt\r\na\r\nb\r\n", ["a", "b"]),
        (b'prompt\n"a, ""b""\nc"\nd "e" f\n', ['a, "b"\nc', 'd "e" f']),
        (b"prompt\nnan\nNaN\nNA\nnull\n1e5\n-0\n", ["nan", "NaN", "NA", "null", "1e5", "-0"]),
        (b"prompt\na\na\n a\n", ["a", "a", " a"]),
        (b"prompt\n\n \na\n\t\n\n", ["a"]),
        (b"prompt,x\na\nb,c\n", ["a", "b"]),
        ("prompt\nein Käse 図 \N{PILE OF POO}\n".encode(), ["ein Käse 図 \N{PILE OF POO}"]),
        (b"prompt\n" + b"x" * 1_000_000 + b"\n", ["x" * 1_000_000]),
    ],
    ids=["BOM", "CRLF", "quotes", "NaN", "duplicates", "empty rows", "short row", "unicode", "1 MB"],
)
def test_unusual_prompt_lists_are_read_unchanged(tmp_path, content, prompts):
    (tmp_path / "p.csv").write_bytes(content)
    rows = read_rows(tmp_path / "p.csv")
    assert rows["prompt"].tolist() == prompts and rows.index.tolist() == list(range(len(prompts)))


REFUSED_LISTS = {
    "wrong column": (f"text\n{MARKER}\n".encode(), "no column `prompt`"),
    "no header": (f"{MARKER}\na\n".encode(), "no column `prompt`"),
    "two columns": (f"prompt,prompt\n{MARKER},a\n".encode(), "two columns named `prompt`"),
    "more cells": (f"prompt\na {MARKER}, b\n".encode(), "more cells"),
    "open quote": (f'prompt\na\n"{MARKER}\n'.encode(), "open quote"),
    "NUL": (f"prompt\n\na\n{MARKER}\0\n".encode(), "a NUL character in row 1"),
    "NUL beside": (f"prompt,x\n{MARKER},a\nb,\0\n".encode(), "a NUL character in row 1"),
    "Latin-1": (f"prompt\n{MARKER} château\n".encode("latin-1"), "UTF-8"),
    "UTF-16": (f"prompt\n{MARKER}\n".encode("utf-16"), "UTF-8"),
    "UTF-16 without mark": (f"prompt\n{MARKER}\n".encode("utf-16-le"), "UTF-8"),
    "no rows": (b"prompt\n", "no prompt"),
    "blank rows": (b"prompt\n \n\n", "no prompt"),
    "nothing": (b"", "not a readable CSV"),
    "binary": (bytes(range(256)), "UTF-8"),
}


@pytest.mark.parametrize("what", REFUSED_LISTS)
def test_unusable_prompt_lists_are_refused_and_not_quoted(call, tmp_path, what):
    content, says = REFUSED_LISTS[what]
    (tmp_path / "p.csv").write_bytes(content)
    done = call("save_codebook.py", *flags(model_path=GOLDEN / "A/model", device="cpu", csv_path=tmp_path / "p.csv", save_dir=tmp_path / "cb"))  # fmt: skip
    assert done.failed_in_one_sentence and says in done.err and "p.csv" in done.err
    assert MARKER not in done.out + done.err
    assert not (tmp_path / "cb").exists()


def test_a_prompt_of_a_megabyte_is_encoded_as_its_beginning(call, tmp_path):
    (tmp_path / "p.csv").write_text(f"prompt\n{'a cat ' * 170_000}\n{'a cat ' * 100}\n")
    done = call("save_codebook.py", *flags(model_path=GOLDEN / "A/model", device="cpu", csv_path=tmp_path / "p.csv", save_dir=tmp_path / "cb"))  # fmt: skip
    assert done.code == 0, done.err
    from des.training.codebook import Codebook

    long, short = Codebook(tmp_path / "cb").rows(torch.tensor([0, 1]))
    assert torch.equal(long, short)


def test_a_long_run_of_spaces_does_not_stop_the_filter():
    start = time.process_time()
    assert never_drawn([f"nsfw, 1{' ' * 200_000}", f"nsfw, 12{' ' * 200_000}years old", f"nsfw, 12 years{' ' * 200_000}"]) == [
        1
    ]
    assert time.process_time() - start < 5  # minutes where a pattern goes back over the spaces


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("sd_seed", MARKER), ("sd_seed", "-1"), ("sd_seed", "nan"), ("sd_seed", "inf"), ("sd_seed", "1.5"), ("sd_seed", "1e300"),
        ("sd_image_width", "0"), ("sd_guidance_scale", "-1"), ("sd_guidance_scale", "nan"), ("sd_guidance_scale", MARKER),
    ],
)  # fmt: skip
def test_a_cell_that_is_no_number_is_named_and_not_quoted(call, tmp_path, monkeypatch, tiny_pipeline, column, cell):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.csv").write_text(f"prompt,{column}\na ball,\na box,{cell}\n")
    done = call("generate.py", *flags(model_path=tiny_pipeline, device="cpu", prompts_csv="p.csv", output_path="x", use_row_settings=[]))  # fmt: skip
    assert done.failed_in_one_sentence and f"row 1, column {column}" in done.err
    assert MARKER not in done.err and not (tmp_path / "results").exists()


# ---------------------------------------------------------------- images


def png(width, height, content=b"", kind=0):
    """The bytes of a PNG that says it is so large, with 8 bits a channel."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def image_bytes(image, kind="PNG", **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def frames(kind):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    return image_bytes(red, kind, save_all=True, append_images=[blue])


SIXTEEN = np.array([[0, 255, 256, 32768, 65535]], np.uint16)  # the high bytes are 0, 0, 1, 128, 255
PALETTE = Image.new("P", (1, 1))
PALETTE.putpalette([9, 8, 7])

READ = {
    "one pixel": (image_bytes(Image.new("RGB", (1, 1), (1, 2, 3))), [(1, 2, 3)]),
    "16-bit PNG": (image_bytes(Image.fromarray(SIXTEEN)), [(v,) * 3 for v in (0, 0, 1, 128, 255)]),
    "16-bit TIFF": (image_bytes(Image.fromarray(SIXTEEN), "TIFF"), [(v,) * 3 for v in (0, 0, 1, 128, 255)]),
    "16-bit PGM": (b"P5\n5 1\n65535\n" + SIXTEEN.astype(">u2").tobytes(), [(v,) * 3 for v in (0, 0, 1, 128, 255)]),
    "CMYK": (image_bytes(Image.new("CMYK", (1, 1), (255, 0, 0, 0)), "TIFF"), [(0, 255, 255)]),
    "palette": (image_bytes(PALETTE), [(9, 8, 7)]),
    "transparent palette": (image_bytes(PALETTE, transparency=0), [(9, 8, 7)]),
    "transparent": (image_bytes(Image.new("RGBA", (1, 1), (200, 100, 50, 0))), [(200, 100, 50)]),
    "transparent grey": (image_bytes(Image.new("LA", (1, 1), (200, 0))), [(200, 200, 200)]),
    "black and white": (image_bytes(Image.new("1", (1, 1), 1)), [(255, 255, 255)]),
    "another format": (image_bytes(Image.new("RGB", (1, 1), (1, 2, 3)), "BMP"), [(1, 2, 3)]),
    "a long one": (image_bytes(Image.new("L", (1, 100))), [(0, 0, 0)] * 100),
}  # fmt: skip


@pytest.mark.parametrize("what", READ)
def test_odd_images_are_read_with_the_right_pixels(tmp_path, what):
    content, pixels = READ[what]
    (tmp_path / "x_0p.png").write_bytes(content)
    image = read_image(tmp_path / "x_0p.png")
    assert image.mode == "RGB" and np.asarray(image).reshape(-1, 3).tolist() == [list(pixel) for pixel in pixels]


def test_orientation_marks_are_not_followed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    (tmp_path / "x_0p.jpg").write_bytes(image_bytes(Image.new("RGB", (4, 2)), "JPEG", exif=exif))
    assert read_image(tmp_path / "x_0p.jpg").size == (4, 2)


def test_a_cameras_jpeg_with_a_preview_is_its_picture(tmp_path):
    (tmp_path / "x_0p.jpg").write_bytes(frames("MPO"))
    assert read_image(tmp_path / "x_0p.jpg").getpixel((0, 0)) == (254, 0, 0)  # red, as JPEG keeps it


UNREADABLE = {
    "nothing": (b"", "not one of PNG"),
    "text": (b"no image", "not one of PNG"),
    "truncated": (image_bytes(Image.new("RGB", (64, 64)))[:-30], "truncated"),
    "animated PNG": (frames("PNG"), "2 frames"),
    "animated WebP": (frames("WEBP"), "2 frames"),
    "pages": (frames("TIFF"), "2 frames"),
    "GIF": (frames("GIF"), "not one of PNG"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not one of PNG"),
    "bomb": (png(10_000, 10_000), "100000000 pixels|10000x10000"),
    "bigger bomb": (png(50_000, 50_000), "2500000000 pixels"),
    "bomb of text": (png(1, 1)[:33] + struct.pack(">I", 70011) + b"zTXt" + b"a\0\0" + zlib.compress(b"x" * (70 << 20)), "[Dd]ecompressed|truncated|chunk"),
    "no width": (png(0, 5), "not one of PNG"),
    "far too long": (png(1, 101, b"\0\0" * 101), "one side more than 100 times"),
    "32-bit": (image_bytes(Image.new("I", (4, 4)), "TIFF"), "32-bit"),
    "floats": (image_bytes(Image.new("F", (4, 4), float("nan")), "TIFF"), "32-bit"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNREADABLE)
def test_unreadable_images_are_named_with_the_reason(tmp_path, what, recwarn):
    content, says = UNREADABLE[what]
    (tmp_path / "x_0p.png").write_bytes(content)
    with pytest.raises(UserError, match=rf"x_0p\.png is not a readable image: .*({says})"):
        read_image(tmp_path / "x_0p.png")


@pytest.fixture
def classify(call, tmp_path):
    """Run the classifier on a folder with one good image and whatever was put beside it."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "images/x_0p.png")

    def run(**changes):
        options = {
            "classifier": CLASSIFIER,
            "cls_class": "ball",
            "folder_dir": tmp_path / "images",
            "devices": "cpu",
            "num_workers": 1,
        }
        return call("tasks/img_batch_classify.py", *flags(**options | changes))

    return run


def test_a_scorer_stops_at_each_of_them_or_counts_them_apart(classify, tmp_path):
    for row, (what, (content, _)) in enumerate(UNREADABLE.items(), 1):
        path = tmp_path / f"images/x_{row}p.png"
        path.write_bytes(content)
        done = classify()
        assert done.failed_in_one_sentence and path.name in done.err, what
        path.unlink()
    assert not list((tmp_path / "images").glob("classify*"))
    for row, (content, _) in enumerate(UNREADABLE.values(), 1):
        (tmp_path / f"images/x_{row}p.png").write_bytes(content)
    done = classify(skip_unreadable=[])
    assert done.code == 0 and f"{len(UNREADABLE)} unreadable images are not counted" in done.out
    result = json.loads((tmp_path / "images/classify.json").read_text())
    assert result["n"] == 1
    assert sorted(result["unreadable"]) == sorted(f"x_{row}p.png" for row in range(1, 1 + len(UNREADABLE)))


def odd_entry(folder, what):
    """Put into a folder of images what is none itself; returns its path."""
    outside = folder.parent / "outside"
    outside.mkdir()
    Image.new("RGB", (8, 8)).save(outside / "secret_1p.png")
    path = folder / "x_1p.png"
    if what == "folder":
        path.mkdir()
    elif what == "link out":
        path.symlink_to(outside / "secret_1p.png")
    elif what == "link within":
        path.symlink_to(folder / "x_0p.png")
    elif what == "link to nothing":
        path.symlink_to(folder / "nothing.png")
    elif what == "link to itself":
        path.symlink_to(path)
    elif what == "link to a folder":
        path = folder / "more"
        path.symlink_to(outside)
    elif what == "pipe":
        os.mkfifo(path)
    return path


@pytest.mark.parametrize("what", ["folder", "link out", "link within", "link to nothing", "link to itself", "link to a folder", "pipe"])  # fmt: skip
def test_what_only_looks_like_an_image_is_refused_by_name(classify, tmp_path, what):
    path = odd_entry(tmp_path / "images", what)
    done = classify(skip_unreadable=[])
    assert done.failed_in_one_sentence and str(path) in done.err
    assert not list((tmp_path / "images").glob("classify*"))


def test_the_folder_itself_may_be_a_link_and_hidden_files_do_not_count(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("x_0p.png", ".x_1p.png.tmp", ".x_1p.png"):
        (tmp_path / "images" / name).write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "images")
    assert [path.name for path in image_hashes(tmp_path / "link")] == ["x_0p.png"]


def test_an_image_of_one_pixel_is_scored(classify, call, tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "images/x_1p.png")
    done = classify(batch_size=1)
    assert done.code == 0 and "/2 = " in done.out, done.err
    (tmp_path / "p.csv").write_text("prompt\na red ball\na red box\n")
    done = call("clipscore.py", *flags(image_folder=tmp_path / "images", csv_file=tmp_path / "p.csv", clip_model=ROOT / "demo/models/clip", device="cpu"))  # fmt: skip
    assert done.code == 0 and "2 images" in done.out, done.err
    for variant in VARIANTS.values():
        pixels = variant(read_image(tmp_path / "images/x_1p.png"))
        assert pixels.shape == (3, 299, 299) and (pixels == pixels[:, :1, :1]).all()


# ---------------------------------------------------------------- checkpoints

NAME = "text_model.encoder.layers.1.mlp.fc1.weight"


@pytest.fixture
def encoder():
    return CLIPTextModel.from_pretrained(GOLDEN / "A/model/text_encoder")


@pytest.fixture
def state(protected_checkpoint):
    return torch.load(protected_checkpoint, weights_only=True)["model_state_dict"]


def write_state(folder, state, form):
    """Write a checkpoint as a file of either kind, or as a model's folder of either kind."""
    if form == "pt":
        torch.save({"model_state_dict": state}, folder / "c.pt")
        return folder / "c.pt"
    if form == "safetensors":
        save_file(state, folder / "c.safetensors")
        return folder / "c.safetensors"
    (folder / "c").mkdir()
    save_file(state, folder / "c/model.safetensors") if form == "hf" else torch.save(state, folder / "c/pytorch_model.bin")
    return folder / "c"


def refused(encoder, path):
    """The sentence with which a checkpoint is refused; the encoder is as it was."""
    before = fingerprint(encoder)
    with pytest.raises(UserError) as error:
        load_checkpoint(encoder, path)
    assert fingerprint(encoder) == before
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("form", ["pt", "safetensors", "hf", "hf bin"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_weight_that_is_not_finite_is_found(tmp_path, encoder, state, form, value):
    state[NAME][3, 4] = value
    message = refused(encoder, write_state(tmp_path, state, form))
    assert "NaN or infinite" in message and f"`{NAME}`" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_other_floats_are_converted(tmp_path, encoder, state, dtype):
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    load_checkpoint(encoder, write_state(tmp_path, state, "pt"))
    loaded = encoder.get_parameter(NAME.removeprefix("text_model."))
    assert loaded.dtype == torch.float32 and torch.equal(loaded, state[NAME].float())


ODD_TENSORS = {
    "int64": (lambda tensor: tensor.long(), "int64, but weights must be floating-point"),
    "uint8": (lambda tensor: tensor.to(torch.uint8), "uint8, but weights"),
    "bool": (lambda tensor: tensor > 0, "bool, but weights"),
    "complex": (lambda tensor: tensor.to(torch.complex64), "not a dense tensor"),
    "quantized": (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "not a dense tensor"),
    "nested": (lambda tensor: torch.nested.nested_tensor([tensor[0], tensor[1, :3]]), "not a dense tensor"),
    "bomb": (lambda tensor: torch.zeros(1).expand(10**13), "not a dense tensor"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:The PyTorch API of nested", "ignore:TypedStorage")
@pytest.mark.parametrize("what", ODD_TENSORS)
def test_tensors_that_are_no_weights_are_refused(tmp_path, encoder, state, what):
    change, says = ODD_TENSORS[what]
    message = refused(encoder, write_state(tmp_path, state | {NAME: change(state[NAME])}, "pt"))
    assert says in message and "layers.1.mlp.fc1.weight`" in message


def test_integers_are_no_weights_of_other_defences_either(call, tmp_path, monkeypatch, tiny_pipeline):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv_in.bias": torch.ones(8, dtype=torch.int64)}, "esd.pt")
    done = call("generate.py", *flags(model_path=tiny_pipeline, device="cpu", prompt="x", output_path="x", training_method="esd", unet_path="esd.pt"))  # fmt: skip
    assert done.failed_in_one_sentence and "`conv_in.bias` as torch.int64" in done.err
    assert not (tmp_path / "results").exists()


class Code:
    """An object whose unpickling would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder),))


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle", "named safetensors", "hf bin"])
def test_code_in_a_checkpoint_is_not_run(call, tmp_path, monkeypatch, tiny_pipeline, form):
    monkeypatch.chdir(tmp_path)
    content, path = {"model_state_dict": Code(tmp_path / "it-ran")}, tmp_path / "c.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif form == "named safetensors":
        path = tmp_path / "c.safetensors"
        path.write_bytes(pickle.dumps(content))
    elif form == "hf bin":
        path = tmp_path / "c"
        path.mkdir()
        torch.save(content, path / "pytorch_model.bin")
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    done = call("generate.py", *flags(model_path=tiny_pipeline, device="cpu", prompt="x", output_path="x", training_method="des", text_encoder_path=path))  # fmt: skip
    assert done.failed_in_one_sentence and ("contains code" in done.err or "can be code" in done.err)
    assert not (tmp_path / "it-ran").exists() and not (tmp_path / "results").exists()


def header(entry, content=b"", size=None):
    """The bytes of a safetensors file with one tensor `a`."""
    text = entry if isinstance(entry, bytes) else json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + content


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES = {
    "empty": b"",
    "header beyond the file": header(F32, bytes(8), size=2**60),
    "header is no JSON": header(b"\xff\xfe{"),
    "truncated": header(F32, bytes(7)),
    "shape beyond the data": header(F32 | {"shape": [3]}, bytes(8)),
    "shape overflows": header(F32 | {"shape": [2**40, 2**40]}, bytes(8)),
    "negative shape": header(F32 | {"shape": [-2]}, bytes(8)),
    "offsets beyond the data": header(F32 | {"shape": [2**30], "data_offsets": [0, 2**32]}, bytes(8)),
    "no dtype": header(F32 | {"dtype": "CODE"}, bytes(8)),
}


@pytest.mark.parametrize("what", LIES)
def test_safetensors_that_lie_are_refused(tmp_path, encoder, what):
    (tmp_path / "c").mkdir()
    for path in (tmp_path / "c.safetensors", tmp_path / "c/model.safetensors"):
        path.write_bytes(LIES[what])
    for path in (tmp_path / "c.safetensors", tmp_path / "c"):
        assert "not a complete checkpoint" in refused(encoder, path)


@pytest.mark.parametrize(
    "index",
    ["", "{", "[]", "1", '{"weight_map": []}', '{"weight_map": 3}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../c.safetensors"}}',
     '{"weight_map": {"a": "/etc/hostname"}}', '{"weight_map": {"a": "missing.safetensors"}}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_list_of_files_is_refused(tmp_path, encoder, state, index):
    (tmp_path / "c").mkdir()
    save_file(state, tmp_path / "c.safetensors")
    (tmp_path / "c/model.safetensors.index.json").write_text(index)
    assert str(tmp_path / "c") in refused(encoder, tmp_path / "c")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff"])
def test_damaged_metadata_is_named_before_anything_changes(encoder, protected_checkpoint, content):
    protected_checkpoint.with_name("checkpoint-2-metadata.json").write_bytes(content)
    assert "checkpoint-2-metadata.json" in refused(encoder, protected_checkpoint)


# ---------------------------------------------------------------- models


def damaged(source, folder, file, name, value=torch.nan):
    """A copy of a model's folder with one value of one tensor changed."""
    shutil.copytree(source, folder)
    state = load_file(folder / file)
    state[name].view(-1)[0] = value
    save_file(state, folder / file, {"format": "pt"})
    return folder


def last_weight(source):
    """The name of a weight that all readers of a model use; the first one is a classifier's head."""
    return max(name for name in load_file(source / "model.safetensors") if name.endswith("weight"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_detector_or_metric_with_nan_gives_no_figure(classify, call, tmp_path, value):
    for source in (CLASSIFIER, ROOT / "demo/models/clip"):
        damaged(source, tmp_path / source.name, "model.safetensors", last_weight(source), value)
    (tmp_path / "p.csv").write_text("prompt\na red ball\n")
    images, clip, cpu = tmp_path / "images", tmp_path / "clip", {"device": "cpu"}
    before = snapshot(images)
    fid = {"gen_imgs_path": images, "coco_imgs_path": images, "feature_extractor": tmp_path / CLASSIFIER.name}
    Image.new("RGB", (8, 8)).save(images / "x_1p.png")
    ended = [
        classify(classifier=tmp_path / CLASSIFIER.name),
        call("fid.py", *flags(**fid | cpu)),
    ]
    (images / "x_1p.png").unlink()
    ended.append(call("clipscore.py", *flags(image_folder=images, csv_file=tmp_path / "p.csv", clip_model=clip, **cpu)))
    for done in ended:
        assert done.failed_in_one_sentence and "NaN or infinite values in `" in done.err
    assert snapshot(images) == before
    for load in (load_inception, load_imagereward):
        torch.save({"layer.weight": torch.tensor([value])}, tmp_path / "weights.pt")
        with pytest.raises(UserError, match=r"NaN or infinite values in `layer\.weight`"):
            load(tmp_path / "weights.pt", torch.device("cpu"))


@pytest.mark.parametrize(("part", "name"), [("unet", "conv_in.weight"), ("vae", "decoder.conv_in.weight")])
def test_a_model_that_draws_nan_leaves_no_black_image(call, tmp_path, monkeypatch, tiny_pipeline, part, name):
    monkeypatch.chdir(tmp_path)
    damaged(tiny_pipeline, tmp_path / "model", f"{part}/diffusion_pytorch_model.safetensors", name)
    done = call("generate.py", *flags(model_path="model", device="cpu", prompt="x", output_path="x", num_inference_steps=1))
    assert done.failed_in_one_sentence and "drew NaN" in done.err
    assert not list(tmp_path.rglob("*.png"))


def with_code(source, folder, file, ran):
    """A copy of a model's folder whose weights are a pickle that would make the folder `ran`."""
    shutil.copytree(source, folder)
    for path in (folder / file).parent.glob("*.safetensors"):
        path.unlink()
    torch.save({"a": Code(ran)}, folder / file)
    return folder


def test_code_in_a_models_folder_is_not_run(classify, call, tmp_path, tiny_pipeline):
    ran, draw = tmp_path / "it-ran", {"device": "cpu", "prompt": "x", "output_path": "x", "results_dir": tmp_path / "results"}
    model = with_code(CLASSIFIER, tmp_path / "classifier", "pytorch_model.bin", ran)
    ended = [classify(classifier=model)]
    for part, file in (("unet", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")):
        model = with_code(tiny_pipeline, tmp_path / f"with code in {part}", f"{part}/{file}", ran)
        ended.append(call("generate.py", *flags(model_path=model, **draw)))
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    torch.save({"a": Code(ran)}, tmp_path / "clip/open_clip_pytorch_model.bin")
    torch.save(torch.ones(2, OPEN_CLIP["model_cfg"]["embed_dim"]), tmp_path / "q16.pt")
    q16 = {
        "folder_dir": tmp_path / "images",
        "prompts_file": tmp_path / "q16.pt",
        "clip_model": tmp_path / "clip",
        "devices": "cpu",
    }
    ended.append(call("tasks/img_batch_classify_q16.py", *flags(**q16)))
    for done in ended:
        assert done.failed_in_one_sentence and "weights_only" not in done.err, done.err
    assert not ran.exists() and not (tmp_path / "results").exists()


def test_code_beside_a_model_is_not_run(classify, call, tmp_path):
    """A model's configuration may name Python files in its folder; there is no option to trust them."""
    model = shutil.copytree(CLASSIFIER, tmp_path / "model")
    (model / "custom.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'it-ran')!r})\nclass Mine: pass\n")
    config = json.loads((model / "config.json").read_text())
    for key in ("AutoConfig", "AutoModel", "AutoModelForImageClassification"):
        config.setdefault("auto_map", {})[key] = "custom.Mine"
    (model / "config.json").write_text(json.dumps(config | {"model_type": "mine"}))
    Image.new("RGB", (8, 8)).save(tmp_path / "images/x_1p.png")
    images, before = tmp_path / "images", snapshot(tmp_path / "images")
    fid = {"gen_imgs_path": images, "coco_imgs_path": images, "feature_extractor": model, "device": "cpu"}
    for done in (classify(classifier=model), call("fid.py", *flags(**fid))):
        assert done.failed_in_one_sentence, done.err
    assert not (tmp_path / "it-ran").exists() and snapshot(images) == before


# ---------------------------------------------------------------- paths

LONG = "x" * 300  # beyond the 255 bytes of a file's name
PATHS = {
    "save_codebook.py": ("csv_path", "save_dir", "model_path"),
    "train_des.py": ("codebook_dir", "unsafe_csv_path", "output_dir", "safe_embedding_path"),
    "generate.py": ("prompts_csv", "output_path", "results_dir", "text_encoder_path", "init_images", "model_path"),
    "tasks/img_batch_classify.py": ("folder_dir", "csv_path", "classifier", "output_name"),
    "tasks/img_batch_classify_q16.py": ("folder_dir", "prompts_file"),
    "clipscore.py": ("image_folder", "csv_file", "clip_model"),
    "fid.py": ("gen_imgs_path", "coco_imgs_path", "ref_stats", "output_file", "feature_extractor"),
}


@pytest.fixture
def working(call, tmp_path, monkeypatch, tiny_pipeline):
    """Command lines that work, by script, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.csv").write_text("prompt\na ball\na box\n")
    (tmp_path / "images").mkdir()
    for row in range(2):
        Image.new("RGB", (32, 32), (9 * row, 5, 3)).save(tmp_path / f"images/x_{row}p.png")
    golden, cpu = GOLDEN / "A", {"device": "cpu"}
    training = {
        "codebook_dir": "cb",
        "unsafe_csv_path": "p.csv",
        "safe_csv_path": "p.csv",
        "output_dir": "out",
        "num_epochs": 1,
    }
    return {
        "save_codebook.py": {"model_path": golden / "model", "csv_path": "p.csv", "save_dir": "cb"} | cpu,
        "train_des.py": {"model_path": golden / "model"} | training | cpu,
        "generate.py": {"model_path": tiny_pipeline, "prompts_csv": "p.csv", "output_path": "t2i", "num_inference_steps": 1}
        | cpu,
        "tasks/img_batch_classify.py": {
            "classifier": CLASSIFIER,
            "cls_class": "ball",
            "folder_dir": "images",
            "devices": "cpu",
        },
        "tasks/img_batch_classify_q16.py": {"folder_dir": "images", "devices": "cpu"},
        "clipscore.py": {"image_folder": "images", "csv_file": "p.csv", "clip_model": ROOT / "demo/models/clip"} | cpu,
        "fid.py": {"gen_imgs_path": "images", "coco_imgs_path": "images", "feature_extractor": CLASSIFIER} | cpu,
    }


@pytest.mark.parametrize("script", PATHS)
def test_names_that_are_too_long_are_one_sentence(call, working, script):
    if script == "train_des.py":
        assert call("save_codebook.py", *flags(**working["save_codebook.py"])).code == 0
    more = {
        "text_encoder_path": {"training_method": "des"},
        "init_images": {"strength": 1},
        "ref_stats": {"coco_imgs_path": None},
    }
    for option in PATHS[script]:
        done = call(script, *flags(**working[script] | {option: LONG} | more.get(option, {})))
        assert done.failed_in_one_sentence, (option, done.err)
        assert LONG in done.err or "too long" in done.err, (option, done.err)


def test_a_file_name_that_is_not_utf8_is_kept_in_the_scores(classify, call, tmp_path):
    (tmp_path / "images/x_0p.png").rename(tmp_path / "images" / os.fsdecode(b"caf\xe9_0p.png"))
    done = classify()
    assert done.code == 0, done.err
    (entry,) = json.loads((tmp_path / "images/classify.json").read_text())["images"]
    assert os.fsencode(entry["file"]) == b"caf\xe9_0p.png"
    (tmp_path / "p.csv").write_text("prompt\na red ball\n")
    done = call("clipscore.py", *flags(image_folder=tmp_path / "images", csv_file=tmp_path / "p.csv", clip_model=ROOT / "demo/models/clip", device="cpu"))  # fmt: skip
    assert done.code == 0 and r"caf\udce9_0p.png" in (tmp_path / "images/clipscore.csv").read_text(), done.err


def test_text_that_is_not_utf8_on_the_command_line_is_one_sentence(call, working):
    done = call("generate.py", *flags(**working["generate.py"] | {"prompts_csv": None, "prompt": "caf\udce9"}))
    assert done.failed_in_one_sentence and "UTF-8" in done.err


# ---------------------------------------------------------------- arguments

ZERO = {
    "test",
    "start_idx",
    "seed",
    "seeds",
    "sample",
    "tolerance",
    "damages",
    "guidance_scale",
    "expected_asr",
    "weight_decay",
    "eta",
    "negative_guidance",
    "crossover",
    "mutation",
    "retain_weight",
    "attack_steps",
    "warm_up",
    "preserve_scale",
    "des_seeds",
    "lambda_safe",
    "concept_guidance_scale",
    "concept_guidance_ratio",
}
WITHOUT_NUMBERS = {
    "scripts/download_checkpoint.py",
    "demo/table_inputs.py",
    "demo/gates.py",
    "datasets/download.py",
}


class Parsed(Exception):
    """Carries a script's parser out of it."""


def numeric_options(script, monkeypatch):
    """The options of a script whose values are numbers."""

    def stop(parser, *_):
        raise Parsed(parser)

    with monkeypatch.context() as patch, pytest.raises(Parsed) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [str(ROOT / script)])
        runpy.run_path(sys.argv[0], run_name="__main__")
    actions = caught.value.args[0]._actions
    return [each for each in actions if any(isinstance(value_of(each, text), (int, float)) for text in ("1", "0.5"))]


def value_of(action, text):
    """What argparse makes of an option's text; None where it refuses it, or where the option takes no value of a type."""
    try:
        value = action.type and action.type(text)
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return None
    return value if action.choices is None or value in action.choices else None


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_option_takes_a_number_that_makes_no_sense(call, monkeypatch, script):
    options = numeric_options(script, monkeypatch)
    assert bool(options) == (script not in WITHOUT_NUMBERS)
    for action in options:
        for text in ("-1", "-0.5", "nan", "inf", "-inf", "1e999", "x", "", "9" * 400, "1_0_", "½"):
            assert value_of(action, text) is None, (action.dest, text)
        assert (value_of(action, "0") is not None) == (action.dest in ZERO), action.dest
        done = call(script, f"{action.option_strings[0]}=nan")
        assert done.code == 2 and done.failed_in_one_sentence and action.option_strings[0] in done.err


@pytest.mark.parametrize("text", ["", "-1", "nan", "²", "9" * 400, "cuda:-1", "cuda:999", "meta", "cpu,0", "../x"])
def test_a_device_that_is_none_is_refused(call, text):
    done = call("clipscore.py", f"--device={text}", "--image_folder=x", "--csv_file=x")
    assert done.code == 2 and done.failed_in_one_sentence and "--device" in done.err


@pytest.mark.parametrize(("start", "end"), [(5, 3), (5, 5), (0, 0), (2, 9), (10**30, None)])
def test_ranges_without_rows_are_refused(call, working, tmp_path, start, end):
    before = snapshot(tmp_path)
    done = call("generate.py", *flags(**working["generate.py"] | {"start_idx": start, "end_idx": end}))
    assert done.failed_in_one_sentence and "_idx" in done.err
    assert snapshot(tmp_path) == before


def test_the_largest_seed_draws(call, working, tmp_path):
    options = {"seed": 2**63 - 1, "num_images_per_prompt": 2}
    done = call("generate.py", *flags(**working["generate.py"] | options))
    assert done.code == 0, done.err
    assert len(list((tmp_path / "results").rglob("*.png"))) == 4
