"""train_des.py: what it writes, that a seed fixes it, and that bad input leaves nothing behind."""

import json

from des.data.prompts import read_prompts
from des.models.checkpoints import load_checkpoint
from des.models.encoders import load_encoder
from des.training import losses
from des.training.pairs import Pairs

import pytest
import torch
from conftest import GOLDEN, snapshot, training_line

FOLDER = GOLDEN / "A"


@pytest.fixture
def train(call, tmp_path, codebook):
    """Run train_des.py on case A with changed options (None leaves one out)."""
    own = {"learning_rate": "1e-3", "concept_guidance_scale": 20}
    return lambda out="out", **changes: call(*training_line(tmp_path, **{"output_dir": tmp_path / out} | own | changes))


def weights(folder, epoch=2):
    return torch.load(folder / f"0.001_0.3/checkpoint-{epoch}.pt", weights_only=True)["model_state_dict"]


def test_files_and_log(train, tmp_path):
    done = train()
    assert done.code == 0, done.err
    run = tmp_path / "out/0.001_0.3"
    assert {file.name for file in run.iterdir()} == {
        "checkpoint-1.pt", "checkpoint-1-metadata.json", "checkpoint-2.pt", "checkpoint-2-metadata.json", "metrics.jsonl", "train.log", ".lock",
    }  # fmt: skip
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["total"] < steps[0]["total"]
    for step in steps:
        assert step["total"] == pytest.approx(
            0.3 * (step["sep"] + step["sep_concept"]) + 0.7 * (step["uen"] + step["nen"]), abs=1e-5
        )
    metadata = json.loads((run / "checkpoint-2-metadata.json").read_text())
    assert metadata["embeddings"]["distinct_targets"] == 6
    assert metadata["concept_guidance_scale"] == 20
    log = (run / "train.log").read_text()
    assert "epoch 2, step 3/3  sep " in log and "epoch 2, step 3/3" not in done.err
    assert "epoch 2/2" in log and "distinct targets" in log and "alpha / |n|" in log


def test_the_summary_is_what_the_checkpoint_does(train, tmp_path):
    assert train().code == 0
    run = tmp_path / "out/0.001_0.3"
    measured = json.loads((run / "checkpoint-2-metadata.json").read_text())["embeddings"]
    safe, unsafe = (read_prompts(FOLDER / f"{name}.csv") for name in ("safe", "unsafe"))
    base, protected = (load_encoder(str(FOLDER / "model")) for _ in range(2))
    load_checkpoint(protected.model, run / "checkpoint-2.pt")
    (before, after), (bad_before, bad_after) = (
        [next(e.encode(texts, 20)).flatten(1) for e in (base, protected)] for texts in (safe, unsafe)
    )
    n = next(base.encode(["nudity"], 1)).flatten()
    rows = torch.load(tmp_path / "out/safe_embeddings.pth", weights_only=True)["indices"]
    shift = (after - before).mean(0)
    expected = {
        "cos_safe_to_original": torch.cosine_similarity(after, before).mean(),
        "cos_unsafe_to_original": torch.cosine_similarity(bad_after, bad_before).mean(),
        "cos_unsafe_to_target": torch.cosine_similarity(bad_after, before[rows] - 20 * n / n.norm()).mean(),
        "safe_shift": shift.norm() / before.norm(dim=1).mean(),
        "safe_shift_along_concept": torch.cosine_similarity(shift, n, dim=0),
    }
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value.item(), abs=1e-5), name
    assert measured["cos_unsafe_to_original"] < 1 and measured["safe_shift_along_concept"] < 0


def test_a_seed_fixes_the_weights(train, tmp_path):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train(out, seed=seed).code == 0
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_guidance_ratio_is_relative_to_the_concepts_norm(train, tmp_path):
    assert train(concept_guidance_scale=None, concept_guidance_ratio=0.8).code == 0
    metadata = json.loads((tmp_path / "out/0.001_0.3/checkpoint-2-metadata.json").read_text())
    assert metadata["concept_guidance_scale"] == pytest.approx(0.8 * metadata["concept_norm"])


def test_several_concepts(train, tmp_path):
    """Each has a NEN term of its own, as the first step shows, where E~ is E; the guidance is along their joint direction."""
    concepts = ["nudity", "a bus", "blood"]
    for out, prompts in {"one": ["nudity"], "three": concepts}.items():
        assert train(out, concept_prompt=prompts, num_epochs=1, batch_size=20).code == 0
    metrics = {out: (tmp_path / out / "0.001_0.3/metrics.jsonl").read_text() for out in ("one", "three")}
    first = {out: json.loads(text.splitlines()[0]) for out, text in metrics.items()}
    *embeddings, e0 = next(load_encoder(str(FOLDER / "model")).encode([*concepts, ""], 4)).flatten(1)
    terms = [1 - torch.cosine_similarity(each, e0, dim=0).item() for each in embeddings]
    assert first["one"]["nen"] == pytest.approx(terms[0], abs=1e-5)
    assert first["three"]["nen"] == pytest.approx(sum(terms), abs=1e-5)
    metadata = json.loads((tmp_path / "three/0.001_0.3/checkpoint-1-metadata.json").read_text())
    assert metadata["concept_prompt"] == concepts
    assert metadata["concept_norm"] == pytest.approx(torch.stack(embeddings).norm(dim=1).mean().item(), rel=1e-5)
    for wrong in ([" "], ["nudity", "nudity"]):
        assert train("wrong", concept_prompt=wrong).failed_in_one_sentence


def test_losses_that_are_off_are_zero(train, tmp_path):
    assert train(ablation=[2]).code == 0
    steps = [json.loads(line) for line in (tmp_path / "out/0.001_0.3/metrics.jsonl").read_text().splitlines()]
    assert all(step["sep"] == step["sep_concept"] == step["nen"] == 0 < step["uen"] for step in steps)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"gradient_checkpointing": []}])
def test_cheaper_arithmetic_stays_close(train, tmp_path, options):
    assert train("plain").code == 0
    assert train("cheap", **options).code == 0
    plain, cheap = weights(tmp_path / "plain"), weights(tmp_path / "cheap")
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    assert (plain[name] - cheap[name]).norm() < 0.3 * plain[name].sub(load_base(name)).norm()


def load_base(name):
    from safetensors.torch import load_file

    return load_file(FOLDER / "model/text_encoder/model.safetensors")[name]


def test_safe_prompts_beyond_the_codebook_are_encoded(train, tmp_path):
    (tmp_path / "more.csv").write_text((FOLDER / "safe.csv").read_text() + "a lighthouse in the fog\n")
    done = train(safe_csv_path=tmp_path / "more.csv")
    assert done.code == 0 and "lacks some of the safe prompts" in done.err
    assert (tmp_path / "out/safe_rows/codebook.json").is_file()


def test_pairs_repeat_the_shorter_list_and_shuffle_each_epoch():
    pairs = Pairs(torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3), torch.zeros(7), None, None)
    seen = [torch.cat([torch.stack(batch) for batch in pairs.batches(3, seed=0, epoch=epoch)], dim=1) for epoch in (1, 2)]
    assert not torch.equal(*seen)
    for rows in seen:
        assert sorted(map(tuple, rows.T.tolist())) == sorted((i % 3, i) for i in range(7))


@pytest.mark.parametrize(
    "change",
    [
        {"unsafe_csv_path": "missing.csv"},
        {"safe_csv_path": "no_column.csv"},
        {"unsafe_csv_path": "empty.csv"},
        {"model_path": "nowhere"},
        {"model_path": GOLDEN / "B/model"},
        {"codebook_dir": "nowhere"},
        {"text_encoder_idx": 3},
        {"learning_rate": "nan"},
        {"learning_rate": "-1"},
        {"lambda_safe": "1.5"},
        {"num_epochs": "0"},
        {"ablation": [4]},
        {"precision": "tf32"},
        {"safe_embedding_path": "foreign.pth"},
    ],
)
def test_bad_input_writes_nothing(train, tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no_column.csv").write_text("text\na\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "foreign.pth").write_bytes(b"something")
    before = snapshot(tmp_path)
    done = train(**change)
    assert done.failed_in_one_sentence, done.err
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_training_and_keeps_what_was_saved(train, tmp_path, monkeypatch):
    calls = iter(range(100))
    nen = losses.nen
    monkeypatch.setattr(losses, "nen", lambda *now: nen(*now) * (torch.nan if next(calls) == 4 else 1))
    done = train()  # three steps an epoch
    assert done.failed_in_one_sentence
    assert "the loss is nan in epoch 2, step 2" in done.err and "lower --learning_rate" in done.err
    assert "the last good checkpoint is" in done.err and "checkpoint-1.pt" in done.err
    run = tmp_path / "out/0.001_0.3"
    assert (run / "state.pt").is_file()
    assert {file.name for file in run.glob("checkpoint*")} == {"checkpoint-1.pt", "checkpoint-1-metadata.json"}
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out", epoch=1).values())


def test_the_ablations_train_other_weights_and_say_so(train, tmp_path):
    assert train().code == 0
    plain = weights(tmp_path / "out")
    for out, changes in {
        "highest": {"target": "highest"}, "random": {"target": "random"}, "no_term": {"no_concept_term": []},
    }.items():  # fmt: skip
        assert train(out, **changes).code == 0
        assert any(not tensor.equal(plain[name]) for name, tensor in weights(tmp_path / out).items())
        metadata = json.loads((tmp_path / out / "0.001_0.3/checkpoint-2-metadata.json").read_text())
        assert metadata["target"] == changes.get("target", "lowest")
        assert metadata["concept_term"] == ("no_concept_term" not in changes)
    steps = [json.loads(line) for line in (tmp_path / "no_term/0.001_0.3/metrics.jsonl").read_text().splitlines()]
    assert all(step["sep_concept"] == 0 for step in steps)
    assert (tmp_path / "random/safe_embeddings_random.pth").is_file()
    assert train("nothing", no_concept_term=[], ablation=[2, 3]).failed_in_one_sentence
