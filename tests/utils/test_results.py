"""Intervals, hashes and whole files."""

import json
import os
import shutil

from des.utils.files import check_room, replacing, sha256_tensors, sha256_texts, write_json
from des.utils.stats import proportion, show, wilson

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from scipy.stats import binomtest


@pytest.mark.parametrize(("k", "n"), [(0, 60), (60, 60), (1, 1), (3, 60), (457, 931)])
def test_wilson_equals_scipy(k, n):
    reference = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((reference.low, reference.high), abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_what_is_no_proportion(k, n):
    with pytest.raises(ValueError):
        wilson(k, n)


def test_a_proportion_is_shown_with_its_interval():
    assert show(proportion(3, 60)) == "3/60 = 5.0% [1.7, 13.7]"


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_written_files_have_the_permissions_of_new_ones(tmp_path, mask, mode):
    """save_file of safetensors gives a file to its owner alone."""
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "file.safetensors") as temporary:
            save_file({"a": torch.zeros(1)}, temporary)
        with replacing(tmp_path / "folder") as temporary:
            (temporary / "below").mkdir(parents=True)
            save_file({"a": torch.zeros(1)}, temporary / "below/file.safetensors")
    finally:
        os.umask(before)
    files, folders = (
        [tmp_path / "file.safetensors", *tmp_path.rglob("below/*")],
        [tmp_path / "folder", tmp_path / "folder/below"],
    )
    assert {path.stat().st_mode & 0o777 for path in files} == {mode} and len(files) == 2
    assert {path.stat().st_mode & 0o777 for path in folders} == {mode | (mode & 0o444) >> 2}


FULL = {
    "an open file": OSError(28, "No space left on device"),
    "a quota": OSError(122, "Disk quota exceeded"),
    "copytree": shutil.Error(
        [("a", "b", "[Errno 28] No space left on device: 'b'"), ("c", "d", "[Errno 28] No space left on device")]
    ),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 640 vs 536"),
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_names_the_file_and_the_need(tmp_path, name):
    path = tmp_path / "big.safetensors"
    with pytest.raises(OSError, match="full") as error, replacing(path, size=2_500_000):
        raise FULL[name]
    assert (
        error.value.filename == str(path) and "2.5 MB are needed" in error.value.strerror and "are free" in error.value.strerror
    )
    assert not list(tmp_path.iterdir())


def test_a_need_beyond_the_free_space_stops_before_anything_is_written(tmp_path):
    path = tmp_path / "big"
    with pytest.raises(OSError, match="1,000,000,000,000") as error, replacing(path, size=10**18):
        pytest.fail("nothing is written where there is no room")
    assert error.value.filename == str(path)
    with pytest.raises(OSError, match="1,000,000,000,000") as error, replacing(path, size=1) as temporary:
        check_room(temporary, 10**18)
    assert error.value.filename == str(path)


def test_what_could_not_be_copied_is_one_sentence(tmp_path):
    with pytest.raises(OSError, match=r"x\.bin could not be copied, .*denied") as error, replacing(tmp_path / "out"):
        raise shutil.Error([("x.bin", "y", "[Errno 13] Permission denied: 'x.bin'")])
    assert isinstance(error.value.strerror, str)


def test_hashes_tell_contents_apart():
    assert sha256_texts(["a", "b"]) != sha256_texts(["ab"]) != sha256_texts(["a b"])
    one = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)}
    assert sha256_tensors(one) == sha256_tensors(dict(reversed(one.items())))
    assert sha256_tensors(one) != sha256_tensors(one | {"w": one["w"].reshape(3, 2)})
    assert sha256_tensors(one) != sha256_tensors(one | {"b": one["b"].bfloat16()})
