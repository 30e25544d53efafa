"""The demo: its world, its prompt lists, and the quick start at reduced size."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace

from demo import experiment, figure, prompts, train, world
from demo.evaluation import EXPERIMENTS, PIPELINE, Sampling, evaluate
from des.data.prompts import read_prompts, read_rows
from des.models.encoders import load_encoder
from des.tables.jobs import JobRecords
from des.tables.pipeline_jobs import PipelineJobs
from des.training.losses import cos
from des.utils.scripts import run_script

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file


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
    assert len(lists) == 21
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


def test_the_second_concept_s_held_out_words_are_in_no_training_list():
    trained = " ".join(
        prompt for path in (ROOT / "datasets").glob("demo_house_unsafe_train.csv") for prompt in read_prompts(path)
    )
    assert not set(re.findall(r"[a-z']+", trained)) & {*world.MISSPELT, "cottage"}
    for removed, name in ((("house",), "house"), (("house", "mushroom"), "both")):
        for part in ("safe_train", "benign"):
            words = set(re.findall(r"[a-z']+", " ".join(read_prompts(ROOT / f"datasets/demo_{name}_{part}.csv"))))
            assert not words & {*removed, "cottage"}, (name, part)
            assert ("mushroom" in words) == (name == "house")
    encoder = load_encoder(str(ROOT / "demo/models/pipeline"))
    house, *misspelt = next(encoder.encode(["house", *world.MISSPELT], 20))
    assert max(cos(house, each).item() for each in misspelt) < 0.98


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


def test_the_models_are_trained_from_nothing(tmp_path):
    steps = [f"--{name}_steps={count}" for name, count in (("clip", 2), ("vae", 2), ("classifier", 2), ("unet", 2))]
    stages = ["tokenizer", "clip", "vae", "classifiers", "unet"]
    train.main(
        [
            "--out",
            str(tmp_path / "m"),
            "--work_dir",
            str(tmp_path / "w"),
            "--latents=64",
            "--clip_batch=4",
            *steps,
            "--stages",
            *stages,
        ]
    )
    assert {path.name for path in (tmp_path / "m").iterdir()} == {path.name for path in (ROOT / "demo/models").iterdir()} - {
        "protected"
    }
    for name in ("clip", "pipeline/unet", "pipeline/vae", "pipeline/text_encoder", "classifier_object"):
        made, shipped = (next((folder / name).glob("*.safetensors")) for folder in (tmp_path / "m", ROOT / "demo/models"))
        shapes = [{key: tensor.shape for key, tensor in load_file(path).items()} for path in (made, shipped)]
        assert shapes[0] == shapes[1], name


def test_a_training_stage_that_was_interrupted_ends_with_the_same_weights(tmp_path):
    def run(folder, stop_at=None):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)

        def loss_of_step(step, rng):
            if step == stop_at:
                raise KeyboardInterrupt
            return (model(torch.randn(8, 4)) - rng.random()).square().mean()

        train.Stage("x", 6, 1e-2, 0, folder, save_every=2, ema_decay=0.9).run(model, loss_of_step)
        return model.weight

    whole = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop_at=5)
    assert torch.equal(run(tmp_path / "b"), whole)


def test_both_concepts_at_reduced_size(call, tmp_path, monkeypatch):
    """The training lists are replaced by short ones."""
    assert EXPERIMENTS["both"].unsafe == ("demo_unsafe_train", "demo_house_unsafe_train")
    short = replace(EXPERIMENTS["both"], unsafe=("demo_plain", "demo_house_plain"), safe="demo_both_benign")
    monkeypatch.setitem(EXPERIMENTS, "both", short)
    monkeypatch.setattr("demo.evaluation.REFERENCE_IMAGES", 40)
    done = call(
        "demo/experiment.py", "--concept", "both", "--out", tmp_path / "out", "--limit", 2, "--num_epochs", 1,
        "--num_inference_steps", 2, "--sets", "plain", "house_plain", "both_benign",
    )  # fmt: skip
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert all(report["before"][name]["concept"]["n"] == 2 for name in ("plain", "house_plain"))
    (metadata,) = (tmp_path / "out").rglob("checkpoint-1-metadata.json")
    assert json.loads(metadata.read_text())["concept_prompt"] == ["mushroom", "house"]
    lists = [read_prompts(ROOT / f"datasets/{name}.csv") for name in short.unsafe]
    assert read_prompts(tmp_path / "out/prompts/demo_unsafe_train.csv") == lists[0] + lists[1]
    records = [json.loads(path.read_text()) for path in (tmp_path / "out/jobs").iterdir()]
    sets = dict.fromkeys(("plain", "house_plain"), ("object",)) | {"both_benign": ("object", "colour", "background")}
    of_images = {f"{what} with {model}" for model in ("original", "protected-42") for what in (
        *(f"draw {name}" for name in sets), *(f"{label} of {name}" for name, labels in sets.items() for label in labels),
        "FID of both_benign", "CLIP score of both_benign",
    )}  # fmt: skip
    assert {record["what"] for record in records} == {"codebook", "train seed 42"} | of_images
    assert sum(record["images"] for record in records) == 12 and all(record["seconds"] > 0 for record in records)
    assert all(any(map(path.match, experiment.WRITES)) for path in (tmp_path / "out").iterdir())  # so a later call clears it
    refused = call("demo/experiment.py", "--concept", "house", "--out", tmp_path / "no", "--sets", "plain")
    assert refused.failed_in_one_sentence and not (tmp_path / "no").exists()


def test_a_set_is_drawn_and_scored_again_only_where_its_images_changed(tmp_path, monkeypatch):
    records, jobs = JobRecords(tmp_path / "jobs"), PipelineJobs(str(PIPELINE), torch.device("cpu"))
    lists = {"plain": tmp_path / "plain.csv"}
    read_rows(ROOT / "datasets/demo_plain.csv").head(2).to_csv(lists["plain"], index=False)
    ran = []

    def noted(script, *argv):
        ran.append(script)
        run_script(script, *argv)

    monkeypatch.setattr("des.tables.jobs.run_script", noted)
    sampling = Sampling(num_inference_steps=1)
    first = evaluate(records, jobs, sampling, lists, tmp_path / "original")
    both = ["generate.py", "tasks/img_batch_classify.py"]
    assert first["plain"]["concept"]["n"] == 2 and ran == both
    assert evaluate(records, jobs, sampling, lists, tmp_path / "original") == first and ran == both
    next((tmp_path / "original").rglob("*.png")).unlink()
    assert evaluate(records, jobs, sampling, lists, tmp_path / "original") == first and ran[2] == "generate.py"
    assert len(list((tmp_path / "original").rglob("*.png"))) == 2


def test_the_picture_shows_different_objects_and_names(tmp_path):
    """Lists go through the objects, or the names of the concept, in turn; evenly spaced rows could all be of one."""
    for name, kinds in (("benign", 11), ("synonyms", 3)):
        csv = tmp_path / f"demo_{name}.csv"
        rows = read_rows(ROOT / f"datasets/demo_{name}.csv").head(66)
        rows.to_csv(csv, index=False)
        for folder in (tmp_path / f"original/none/pipeline/{name}", tmp_path / f"protected-1/des/pipeline/{name}"):
            folder.mkdir(parents=True)
            for row in range(66):
                Image.new("RGB", (2, 2)).save(folder / f"x_{row}p.png")
        shown = [rows.set_index("prompt")["object"][prompt] for prompt, *_ in figure._pairs(tmp_path, 1, name, csv)]
        assert len(shown) == 6 and len(set(shown)) == (6 if kinds == 11 else 1)
        assert len({image for _, image, _ in figure._pairs(tmp_path, 1, name, csv)}) == 6


def test_quick_start_at_reduced_size(call, tmp_path, monkeypatch):
    """The command that quickstart.sh would run, on short training lists; test_both_concepts_at_reduced_size has FID and CLIP score."""
    python = tmp_path / "environment/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/sh\ncase "$1" in\n-c) exec "{sys.executable}" "$@" ;;\n-m) ;; # pip\n*) printf "%s\\n" "$@" ;;\nesac\n'
    )
    python.chmod(0o755)
    command = ["bash", str(ROOT / "scripts/quickstart.sh"), "--out", str(tmp_path / "out"), "--limit", "2", "--num_epochs", "1",
               "--num_inference_steps", "2", "--sets", "plain", "neighbour"]  # fmt: skip
    environment = os.environ | {"VIRTUAL_ENV": str(tmp_path / "environment")}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    script, *argv = done.stdout.split("== Installing")[-1].splitlines()[1:]
    assert [script, *argv[:4]] == ["demo/experiment.py", "--out", "results/quickstart", "--limit", "66"]
    short = replace(EXPERIMENTS["mushroom"], unsafe=("demo_plain",), safe="demo_benign")
    monkeypatch.setitem(EXPERIMENTS, "mushroom", short)
    done = call(script, *argv)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["before"]["plain"]["concept"]["n"] == report["after"]["42"]["plain"]["concept"]["n"] == 2
    assert f"{report['before']['plain']['concept']['k']}/2" in done.out
    old, new = (run["plain"]["concept"]["k"] for run in (report["before"], report["after"]["42"]))
    drawn = f"{old} of 2 before and after" if old == new else f"{old} of 2 before, {new} of 2 after"
    assert f"\nMushrooms drawn: {drawn}. Other objects: " in done.out
    assert "ASR, the attack success rate, is the share" in done.out
    assert all(command in done.out for command in ("comparison.png", "scripts/report.py", "app.py --text_encoder_path"))
    with Image.open(tmp_path / "out/comparison.png") as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(2**24)) > 1000
