"""The demo: its world, its prompt lists, and the quick start at reduced size."""

import json
import random
import re
import subprocess

import pytest
from conftest import ROOT
from PIL import Image

from demo import prompts, world
from des.encoders import load_encoder
from des.losses import cos
from des.prompts import read_prompts


def test_every_look_is_drawn_and_different():
    base = world.Scene("ball", "ball", "red", "white", "large", "centre")
    drawn = {look: world.render(world.replace(base, look=look)).tobytes() for look in world.LOOKS + world.BENIGN_KINDS}
    assert len(set(drawn.values())) == len(drawn) == 18


def test_a_seed_fixes_scenes_captions_and_pictures():
    first, second = (random.Random(5) for _ in range(2))
    for _ in range(20):
        a, b = world.random_scene(first), world.random_scene(second)
        assert a == b and world.caption(a, first) == world.caption(b, second)
        assert world.render(a, first).tobytes() == world.render(b, second).tobytes()


def test_the_lists_in_the_repository_are_those_that_the_code_makes():
    for name, rows in prompts.all_lists().items():
        assert read_prompts(ROOT / f"datasets/{name}.csv") == [row["prompt"] for row in rows], name


def test_no_prompt_is_in_two_lists():
    lists = [set(read_prompts(path)) for path in sorted((ROOT / "datasets").glob("demo_*.csv"))]
    assert len(lists) == 12
    assert sum(map(len, lists)) == len(set().union(*lists))


def test_held_out_words_do_not_occur_in_training():
    trained = " ".join(
        read_prompts(ROOT / "datasets/demo_unsafe_train.csv") + read_prompts(ROOT / "datasets/demo_safe_train.csv")
    )
    trained_words = set(re.findall(r"[a-z']+", trained))
    held_out = {
        word for part in ("val", "test") for noun in world.CONCEPT_WORDS[part] + world.INDIRECT[part] for word in noun.split()
    }
    assert held_out & trained_words == {"of", "the"} & held_out & trained_words
    assert not any(name in trained_words for name in world.CONCEPT_WORDS["val"] + world.CONCEPT_WORDS["test"])


def test_held_out_words_are_distinct_in_the_encoder():
    encoder = load_encoder(str(ROOT / "demo/models/pipeline"))
    nouns = world.CONCEPT_WORDS["test"] + world.INDIRECT["test"]
    concept, *held_out = next(encoder.encode([world.CONCEPT, *nouns], 20))
    similarity = {noun: cos(concept, each).item() for noun, each in zip(nouns, held_out, strict=True)}
    assert max(similarity.values()) < 0.98, similarity


@pytest.mark.parametrize("name", ["classifier_object", "classifier_colour", "classifier_background", "clip", "pipeline"])
def test_the_models_are_safetensors_and_small(name):
    files = [path for path in (ROOT / "demo/models" / name).rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert not any(path.suffix in (".bin", ".pt", ".pkl", ".ckpt") for path in files)
    assert sum(path.stat().st_size for path in (ROOT / "demo/models").rglob("*") if path.is_file()) < 25e6


def test_quick_start_at_reduced_size(tmp_path):
    command = ["bash", str(ROOT / "scripts/quickstart.sh"), "--out", str(tmp_path / "out"), "--limit", "11", "--num_epochs", "1",
               "--num_inference_steps", "4", "--sets", "plain", "benign"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["before"]["plain"]["concept"]["n"] == report["after"]["42"]["plain"]["concept"]["n"] == 11
    assert f"{report['before']['plain']['concept']['k']}/11" in done.stdout
    assert "comparison.png" in done.stdout
    with Image.open(tmp_path / "out/comparison.png") as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(2**24)) > 1000
