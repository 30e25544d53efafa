"""Intervals, hashes and whole files."""

import json

from des.utils.files import replacing, sha256_tensors, sha256_texts, write_json
from des.utils.stats import proportion, show, wilson

import pytest
import torch
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


def test_hashes_tell_contents_apart():
    assert sha256_texts(["a", "b"]) != sha256_texts(["ab"]) != sha256_texts(["a b"])
    one = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)}
    assert sha256_tensors(one) == sha256_tensors(dict(reversed(one.items())))
    assert sha256_tensors(one) != sha256_tensors(one | {"w": one["w"].reshape(3, 2)})
    assert sha256_tensors(one) != sha256_tensors(one | {"b": one["b"].bfloat16()})
