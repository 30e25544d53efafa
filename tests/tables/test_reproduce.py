"""scripts/reproduce.py on the demo, at the smallest scale: the table, its figures, and that nothing is done twice."""

import csv
import json
import shutil
from functools import partial

from demo.evaluation import Sampling

import pytest
import torch
from conftest import ROOT, flags, published_form, snapshot
from scipy.stats import binomtest

PIPELINE = ROOT / "demo/models/pipeline"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint for the demo's pipeline with a perturbed encoder, so that other images are drawn."""
    path = published_form(PIPELINE, tmp_path_factory.mktemp("checkpoint") / "checkpoint-1.pt")
    state = torch.load(path, weights_only=True)
    noise = torch.Generator().manual_seed(0)
    state["model_state_dict"] = {
        name: tensor + 0.3 * tensor.std() * torch.randn(tensor.shape, generator=noise) if tensor.is_floating_point() else tensor
        for name, tensor in state["model_state_dict"].items()
    }
    torch.save(state, path)
    return path


@pytest.fixture
def reproduce(call, tmp_path, monkeypatch):
    """Run reproduce.py with changed options; the demo's tables have few reference images for FID, and 8 denoising steps."""
    monkeypatch.setattr("demo.evaluation.REFERENCE_IMAGES", 40)  # as a job draws them,
    monkeypatch.setattr("demo.tables.REFERENCE_IMAGES", 40)  # and as FID expects them
    monkeypatch.setattr("demo.tables.Sampling", partial(Sampling, num_inference_steps=8))

    def run(**changes):
        options = {"table": "T2", "model_path": PIPELINE, "scale": "smoke", "device": "cpu", "out": tmp_path / "out"} | changes
        return call("scripts/reproduce.py", *flags(**options))

    return run


def test_a_table_and_its_figures(reproduce, tmp_path, checkpoint):
    out = tmp_path / "out"
    plan = reproduce(checkpoint=checkpoint, dry_run=[], seconds_per_image=36)
    assert plan.code == 0 and "7 of 7 jobs to do: 24 images, 0 training steps" in plan.out and "about 0.2 hours" in plan.out
    assert not out.exists()
    done = reproduce(checkpoint=checkpoint)
    assert done.code == 0, done.err
    rows = {(row["method"], row["column"]): row for row in csv.DictReader((out / "T2.csv").open())}
    for variant, title in (("original/none", "demo, original"), ("des_given/des", "demo, DES")):
        for name, column in (("plain", "plain name"), ("synonyms", "held-out names"), ("indirect", "held-out phrases")):
            scores = json.loads((out / f"images/{variant}/pipeline/{name}/classify_object.json").read_text())
            row = rows[title, column]
            assert (int(row["k"]), int(row["n"])) == (scores["k"], 4)
            assert float(row["ours"]) == 100 * scores["k"] / 4 and float(row["low"]) == pytest.approx(100 * scores["low"])
    assert rows["DES", "avg"]["paper"] == "0.52" and rows["DES", "avg"]["ours"] == ""
    text = (out / "T2.md").read_text()
    assert mcnemar_by_hand(out) in text
    assert (
        "| DES, paper |" in text
        and "Scale smoke" in text
        and "put minors in a sexual context" in text
        and text.strip() in done.out
    )
    assert (out / "T2.tex").read_text().count("demo, DES, ours") == 1

    before = {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*") if path.is_file()}
    again = reproduce(checkpoint=checkpoint)
    assert again.code == 0 and "0 of 7 jobs are left" in again.err and again.out.startswith(text.strip())
    assert {path: path.stat().st_mtime_ns for path in before} == before
    changed = next(path for path in before if path.suffix == ".png" and "plain" in str(path) and "des" in str(path))
    changed.write_bytes(changed.read_bytes() + b"another end")
    plan = reproduce(checkpoint=checkpoint, dry_run=[])
    assert "1 of 7 jobs to do: 4 images" in plan.out and "s an image" in plan.out  # at the rate of those that are done

    before = snapshot(out)
    other = tmp_path / "other.pt"
    shutil.copy(checkpoint, other)
    torch.save(torch.load(other, weights_only=True) | {"epoch": 3}, other)
    for option, change in {
        "--scale": {"scale": "small"},
        "--seed": {"seed": 7},
        "--checkpoint 1": {"checkpoint": other},
    }.items():
        for dry in ({}, {"dry_run": []}):
            refused = reproduce(**{"checkpoint": checkpoint} | change | dry)
            assert refused.failed_in_one_sentence and option in refused.err and "give another --out" in refused.err, refused.err
    (out / "inputs.json").unlink()  # which earlier versions did not write
    for message, change in {"prompts": {"scale": "small"}, "--seed": {"seed": 7}}.items():
        refused = reproduce(**{"checkpoint": checkpoint} | change)
        assert refused.failed_in_one_sentence and message in refused.err and "give another --out" in refused.err, refused.err
    assert snapshot(out) == {name: content for name, content in before.items() if name != "inputs.json"}


def mcnemar_by_hand(out):
    """The note of T2's table about its two rows, from the files of verdicts."""
    pairs = []
    for name in ("plain", "synonyms", "indirect"):
        files = [
            out / f"images/{variant}/pipeline/{name}/classify_object.json" for variant in ("original/none", "des_given/des")
        ]
        hits = [{each["row"]: each["hit"] for each in json.loads(path.read_text())["images"]} for path in files]
        pairs += [(hits[0][row], hits[1][row]) for row in hits[1]]
    first, second = pairs.count((True, False)), pairs.count((False, True))
    p = binomtest(first, first + second).pvalue
    test = f"p = {p:.2g} ({first} images count only for demo, original, {second} only for demo, DES)"
    return f"Exact McNemar test against demo, DES, on the same {len(pairs)} prompts: demo, original {test}."


def test_an_ablation_trains_its_own_models(reproduce, tmp_path):
    done = reproduce(table="T18")
    assert done.code == 0, done.err
    out = tmp_path / "out"
    for name, term in (("des", True), ("no_concept_term", False)):
        metadata = json.loads((out / f"checkpoints/{name}/0.002_0.3/checkpoint-1-metadata.json").read_text())
        assert metadata["concept_term"] is term
    rows = {(row["method"], row["column"]): row for row in csv.DictReader((out / "T18.csv").open())}
    assert {method for method, _ in rows} == {"all three", "all three without SEP's second term"}
    for column, paper in (("ASR", "1.76"), ("FID", "15.65"), ("CLIP", "25.43")):
        row = rows["all three without SEP's second term", column]
        assert row["paper"] == paper and 0 <= float(row["ours"]) <= 100
    note = "against all three, on the same 12 prompts: all three without SEP's second term p = "
    assert note in (out / "T18.md").read_text()
    record = json.loads((out / "images/des/des/pipeline/plain/run.json").read_text())["protection"]["1"]
    assert (
        "does not protect" in record["doubt"]
        and f"- all three: text encoder 1: {record['doubt']}." in (out / "T18.md").read_text()
    )
    assert "- FID of 11 against 40 images. 11 images are fewer than the" in (out / "T18.md").read_text()

    reference, figures = out / "inputs/reference", (out / "T18.csv").read_text()
    before = snapshot(reference)
    for path in sorted(reference.iterdir())[20:]:
        path.unlink()
    shutil.copy(reference / "reference_0p.png", reference / "reference_1p.png")
    plan = reproduce(table="T18", dry_run=[])
    left = {line.removeprefix("to do  ") for line in plan.out.splitlines() if line.startswith("to do")}
    assert {"inputs of the demo's tables", "FID of des", "FID of no_concept_term"} <= left
    assert not any(line.startswith("train") for line in left)
    done = reproduce(table="T18")
    assert done.code == 0, done.err
    assert snapshot(reference) == before and (out / "T18.csv").read_text() == figures

    metadata = out / "checkpoints/des/0.002_0.3/checkpoint-1-metadata.json"
    content = json.loads(metadata.read_text())
    content["made_from"]["concept_prompt"] = "umbrella"
    metadata.write_text(json.dumps(content))
    weights = snapshot(metadata.parent)["checkpoint-1.pt"]
    (out / "jobs/train-des.json").unlink()
    refused = reproduce(table="T18")
    assert refused.failed_in_one_sentence and "another concept_prompt (umbrella, now mushroom)" in refused.err, refused.err
    assert "another --out," in refused.err and "--output_dir" not in refused.err
    assert snapshot(metadata.parent)["checkpoint-1.pt"] == weights


def test_the_plan_of_every_table(reproduce, tmp_path):
    plan = reproduce(table="all", scale="paper", dry_run=[], seconds_per_image=0.1, seconds_per_step=0.1)
    assert plan.code == 0, plan.err
    trained = [line.split("train ")[1] for line in plan.out.splitlines() if " train " in line]
    assert (
        len(trained) == len(set(trained)) == 26
    )  # two base models, 9 targets and alphas, 3 of losses, 6 lambdas, 6 alphas of the second
    assert "Left out: T9's rows of a prompt filter, because" in plan.out and "T11 to T14" in plan.out and "T20" in plan.out
    assert "18200 training steps" in plan.out
    assert not (tmp_path / "out").exists()


def test_the_papers_world_says_what_is_missing(reproduce, call, tmp_path, tiny_pipeline):
    """Without prompt sets, each of our cells says why it is missing, and nothing is drawn."""
    if any((ROOT / "datasets").glob("*_prompts.csv")):
        pytest.skip("the public sets are in datasets/")
    done = reproduce(model_path=tiny_pipeline, table=["T2", "T5"], checkpoint=ROOT / "README.md")
    assert done.code == 0, done.err
    text = (tmp_path / "out/T2.md").read_text()
    assert "**SD v1.5, ours** | not run: no sneaky_prompts.csv (python datasets/download.py sneaky_prompts)" in text
    assert "no Q16 prompt file" in (tmp_path / "out/T5.md").read_text()
    assert not (tmp_path / "out/images").exists()


def test_the_papers_tables_with_prompt_lists_of_the_user(reproduce, tmp_path, tiny_pipeline, protected_checkpoint):
    """The nudity detector on a tiny pipeline's images of noise; images of the concept are discarded."""
    given = []
    for name in ("sneaky", "mma", "rab", "p4d"):
        (tmp_path / f"{name}.csv").write_text("prompt\n" + "\n".join(f"a {name} kettle {i}" for i in range(6)) + "\n")
        given.append(f"{name}={tmp_path / name}.csv")
    (tmp_path / "p4d.csv").write_text("prompt\na child with a kettle\n" + (tmp_path / "p4d.csv").read_text().split("\n", 1)[1])
    done = reproduce(model_path=tiny_pipeline, checkpoint=protected_checkpoint, prompts=given, discard_images=[])
    assert done.code == 0, done.err
    rows = {(row["method"], row["column"]): row for row in csv.DictReader((tmp_path / "out/T2.csv").open())}
    for method in ("SD v1.5", "DES"):
        assert [rows[method, column]["k"] for column in ("Sneaky", "MMA", "RAB", "P4D")] == ["0"] * 4
        assert [rows[method, column]["n"] for column in ("Sneaky", "MMA", "RAB", "P4D")] == ["4", "4", "4", "3"]
        assert float(rows[method, "avg"]["ours"]) == 0 and float(rows[method, "avg"]["paper"]) > 0
    assert "child" not in (tmp_path / "out/prompts/p4d.csv").read_text()
    assert "never drawn: 1 of p4d." in (tmp_path / "out/T2.md").read_text()
    assert (
        "Prompts drawn: 4 of the published 124 of sneaky, 4 of the published 1,000 of mma"
        in (tmp_path / "out/T2.md").read_text()
    )
    counts = json.loads((tmp_path / "out/T2.json").read_text())["sets"]
    assert counts["p4d"] == {"drawn": 3, "never_drawn": 1, "published": 272}
    scores = json.loads((tmp_path / "out/images/des_given/des/tiny-sd/mma/classify.json").read_text())
    assert scores["detector"]["profile"] == "paper" and scores["n"] == 4
    assert not list((tmp_path / "out/images").rglob("*.png"))


@pytest.mark.parametrize(
    "change",
    [
        {"table": "T20"},
        {"checkpoint": "nowhere.pt"},
        {"baseline": "esd"},
        {"baseline": "magic=x"},
        {"prompts": "sneaky=x.csv"},
        {"q16_prompts": "x.pt"},
        {"model_path": "nowhere"},
    ],
)
def test_what_stops_it(reproduce, tmp_path, change):
    before = snapshot(tmp_path)
    done = reproduce(**change)
    assert done.failed_in_one_sentence, done.err
    assert snapshot(tmp_path) == before
