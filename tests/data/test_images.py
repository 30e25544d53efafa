"""Image files, their rows, and pairing with prompts."""

from des.data.image_folders import image_hashes, pair_with_prompts
from des.data.images import image_batches, image_name, is_complete, read_image, row_of
from des.utils.errors import UserError

import pytest
from PIL import Image, PngImagePlugin


def save(path, colour="red", size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,colour\nred,r\ngreen,g\nblue,b\n")
    for row, colour in enumerate(("red", "green", "blue")):
        save(tmp_path / "images" / image_name("t2i", "des", row), colour)
    return tmp_path / "images"


def test_names_and_rows():
    assert image_name("t2i_coco", "des", 12) == "t2i_coco_des_12p.png"
    from pathlib import Path

    assert [row_of(Path(name)) for name in ("a_none_0p.png", "a_10p.JPG", "cat.png", "a_p.png")] == [0, 10, None, None]


@pytest.mark.parametrize("what", ["zTXt", "iTXt", "iCCP", "long texts"])
def test_the_pixels_of_a_png_with_large_texts_or_a_large_profile_are_read(tmp_path, monkeypatch, what):
    """ComfyUI and A1111 write their workflows there. Its pixels must be complete."""
    path, large, mark = tmp_path / "x_0p.png", "x" * (2 << 20), PngImagePlugin.PngInfo()
    if what == "zTXt":
        mark.add_text("workflow", large, zip=True)
    elif what == "iTXt":
        mark.add_itxt("workflow", large, zip=True)
    elif what == "long texts":
        monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 1 << 20)
        mark.add_text("workflow", large)
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    image.save(path, pnginfo=mark, icc_profile=large.encode() if what == "iCCP" else None)
    with pytest.raises(ValueError, match="MAX_TEXT"):  # Pillow alone
        Image.open(path).load()
    assert read_image(path).tobytes() == image.tobytes()
    content = path.read_bytes()
    path.write_bytes(content[:-2000])
    assert not is_complete(path)
    mark.add_text("des", "blurred")
    image.save(path, pnginfo=mark, icc_profile=large.encode() if what == "iCCP" else None)
    with pytest.raises(UserError, match="blurred thumbnail"):
        read_image(path)


def test_images_that_are_left_out_by_their_suffix_are_counted_in_one_line(folder, caplog, monkeypatch):
    monkeypatch.setattr("des.utils.logs.logger.propagate", True)
    for name in ("a_3p.jfif", "a_4p.AVIF", "more/a_5p.avif", ".hidden.avif", "notes.txt", "run.csv"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    assert len(image_hashes(folder)) == 3
    message = f"{folder}: 3 files (.avif, .jfif) are not read and do not count; save them as PNG"
    assert {record.message for record in caplog.records} == {message}


def test_files_are_found_in_subfolders_in_the_order_of_rows(folder):
    save(folder / "more" / "t2i_des_10p.jpg")
    save(folder / "more" / "t2i_des_9p.webp")
    (folder / "notes.txt").write_text("not an image")
    assert [row_of(path) for path in image_hashes(folder)] == [0, 1, 2, 9, 10]


def test_pairs_follow_the_row_in_the_name(folder):
    pairs = pair_with_prompts(folder, folder.parent / "p.csv")
    assert [(row.prompt, row.colour, row.image.name) for row in pairs.itertuples()] == [
        ("red", "r", "t2i_des_0p.png"), ("green", "g", "t2i_des_1p.png"), ("blue", "b", "t2i_des_2p.png"),
    ]  # fmt: skip


def test_missing_surplus_and_duplicate_images_are_named(folder):
    csv = folder.parent / "p.csv"
    (folder / "t2i_des_1p.png").unlink()
    save(folder / "t2i_des_7p.png")
    save(folder / "again" / "t2i_des_2p.png")
    with pytest.raises(UserError) as error:
        pair_with_prompts(folder, csv)
    for part in ("no image for row 1", "beyond the list for row 7", "more than one image for row 2"):
        assert part in str(error.value)
    save(folder / "cat.png")
    with pytest.raises(UserError, match=r"cat\.png does not end"):
        pair_with_prompts(folder, csv)


def test_rows_that_are_never_drawn_need_no_image(tmp_path):
    (tmp_path / "p.csv").write_text('prompt\na house\n"kid, nsfw"\na tree\n')
    for row in (0, 2):
        save(tmp_path / "images" / image_name("x", "none", row))
    assert pair_with_prompts(tmp_path / "images", tmp_path / "p.csv").index.tolist() == [0, 2]


def test_empty_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="contains no images"):
        image_hashes(tmp_path)
    with pytest.raises(UserError, match="the image folder"):
        image_hashes(tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"no image", "truncated"])
def test_unreadable_images_are_named(tmp_path, content):
    path = tmp_path / "x_0p.png"
    if content == "truncated":
        save(path, size=(64, 64))
        content = path.read_bytes()[:-30]
    path.write_bytes(content)
    assert not is_complete(path)
    with pytest.raises(UserError, match=r"x_0p\.png is not a readable image"):
        read_image(path)


def test_other_modes_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "CMYK", "I;16"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new(mode, (3, 2)).save(tmp_path / f"x.{suffix}")
        assert read_image(tmp_path / f"x.{suffix}").mode == "RGB"


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_keep_the_order(folder, batch_size):
    batches = list(image_batches(list(image_hashes(folder)), batch_size, "test"))
    assert [image.getpixel((0, 0)) for batch in batches for image in batch] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    assert len(batches) == -(-3 // batch_size)
