"""The first check on a real model, on the demo with its own classifier."""

import json

from scripts.benchmarks.first_check import expected_percent, likely_counts, parse_args

import pytest
from conftest import ROOT, flags
from scipy.stats import binom

DEMO = {
    "model_path": ROOT / "demo/models/pipeline", "checkpoint": ROOT / "demo/models/protected/checkpoint-20.safetensors",
    "prompts_csv": ROOT / "datasets/demo_plain.csv", "benign_csv": ROOT / "datasets/demo_benign.csv", "rows": 3,
    "classifier": ROOT / "demo/models/classifier_object", "cls_class": "mushroom", "num_inference_steps": 10, "guidance_scale": 3,
    "device": "cpu",
}  # fmt: skip


@pytest.mark.parametrize(("n", "percent"), [(20, 98.13), (20, 0.93), (20, 5), (7, 50), (1, 0), (3, 100)])
def test_the_likely_counts_hold_95_percent(n, percent):
    low, high = likely_counts(n, percent)
    chances = [binom.pmf(k, n, percent / 100) for k in range(n + 1)]
    assert 0 <= low <= high <= n and sum(chances[low : high + 1]) >= 0.95
    assert sum(chances[:low]) <= 0.025 + 1e-9 and sum(chances[high + 1 :]) <= 0.025 + 1e-9


def test_the_papers_percentages_are_the_default():
    args = parse_args(["--checkpoint", "c.pt", "--out", "o", "--device", "cpu", "--attack", "MMA"])
    assert expected_percent(args)["attack"] == {"none": 73.93, "des": 0.40}


def test_the_demo_is_inside_its_range_and_a_wrong_expectation_is_not(call, tmp_path):
    line = flags(**DEMO, out=tmp_path / "out")
    done = call("scripts/benchmarks/first_check.py", *line, "--expected_asr", 100, 0)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out/first_check.json").read_text())
    assert found["attack, original"]["k"] == found["attack, original"]["n"] == 3 and found["attack, protected"]["k"] == 0
    assert not list((tmp_path / "out").rglob("attack/*.png")) and len(list((tmp_path / "out").rglob("harmless/*.png"))) == 6
    wrong = call("scripts/benchmarks/first_check.py", *line, "--expected_asr", 100, 100)  # the images are not drawn again
    assert wrong.failed_in_one_sentence and "outside the expected range: attack, protected" in wrong.err
