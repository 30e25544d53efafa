"""Trainings that would end in an unprotected encoder without an error: nothing trained, another concept, prompts that collide."""

import json
import re

from des.data.truncation import truncated_counts, truncated_rows
from des.models.encoders import load_encoder
from des.training.checks import check_concept, check_guidance, name_concept, refuse_equal_concepts
from des.utils.errors import UserError

import pytest
from conftest import GOLDEN, flags, training_line
from transformers import AutoTokenizer

FOLDER = GOLDEN / "A"


@pytest.fixture
def train(call, tmp_path, codebook):
    """Run train_des.py on case A with changed options (None leaves one out)."""
    own = {"learning_rate": "1e-3", "concept_guidance_scale": 20, "num_epochs": 1}
    return lambda out="out", **changes: call(*training_line(tmp_path, **{"output_dir": tmp_path / out} | own | changes))


def metadata(folder):
    return json.loads(next(folder.rglob("checkpoint-1-metadata.json")).read_text())


def lines(text):
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize(
    "options", [{"learning_rate": "1e-30"}, {"learning_rate": "1e-9", "precision": "bf16_weights", "optimizer": "adamw"}]
)
def test_training_that_changes_no_weight_is_an_error(train, tmp_path, options):
    done = train(**options)
    assert done.failed_in_one_sentence and "training changed no weight" in done.err and "higher --learning_rate" in done.err
    assert "protected encoder" not in done.err
    assert not list((tmp_path / "out").rglob("checkpoint-*"))


def test_an_encoder_that_hardly_moved_is_not_called_protected(train, call, tmp_path):
    slow = {"learning_rate": "1e-5"}
    done = train(**slow)
    assert done.code == 0
    assert "DOES NOT PROTECT" in lines(done.err)[-1] and "protected encoder in" not in done.err
    recorded = metadata(tmp_path / "out")
    assert recorded["protects"] is False and recorded["embeddings"]["cos_unsafe_to_original"] > 0.9
    again = train(**slow, resume=[])
    assert "nothing to do" in again.err and "DOES NOT PROTECT" in lines(again.err)[-1]
    checkpoint = next((tmp_path / "out").rglob("checkpoint-1.pt"))
    verified = call("scripts/verify.py", "--checkpoint", checkpoint, "--model_path", FOLDER / "model", "--device", "cpu")
    assert verified.failed_in_one_sentence and "does not protect" in verified.err


def test_an_encoder_that_moved_is_called_protected(train, call, tmp_path):
    done = train(learning_rate="1e-2", num_epochs=4, save_every=4)
    recorded = json.loads(next((tmp_path / "out").rglob("checkpoint-4-metadata.json")).read_text())
    assert recorded["embeddings"]["cos_unsafe_to_original"] < 0.9 and recorded["protects"] is True
    assert "protected encoder in" in lines(done.err)[-1] and "DOES NOT PROTECT" not in done.err
    checkpoint = next((tmp_path / "out").rglob("checkpoint-4.pt"))
    verified = call("scripts/verify.py", "--checkpoint", checkpoint, "--model_path", FOLDER / "model", "--device", "cpu")
    shift = recorded["embeddings"]["shift"]  # training's summary and verify.py have one measure
    assert f"concept {shift['concept']:.4f} (1), neutral prompts {shift['neutral']:.4f}" in verified.out
    assert recorded["base_sketch"]


def test_the_first_line_names_the_concept(train, tmp_path):
    assert 'the default concept "nudity"; --concept_prompt' in lines(train("default").err)[0]
    assert lines(train("given", concept_prompt="nudity").err)[0].endswith('the concept "nudity"')
    assert '2 concepts: "van", "gogh"' in lines(train("words", concept_prompt=["van", "gogh"]).err)[0]
    log = next((tmp_path / "given").rglob("train.log")).read_text()
    assert 'the concept "nudity"' in lines(log)[0]
    assert "default_concept" not in metadata(tmp_path / "given")["made_by"]["arguments"]


def test_several_concepts_are_counted():
    assert name_concept(["a b"], is_default=False).count("concept ") == 1
    assert name_concept(["a", "b", "c"], is_default=False).startswith("training against 3 concepts")


@pytest.mark.parametrize(
    ("concepts", "named"),
    [
        (["mushroom"], []),
        (["a photo of Mushrooms", "mushroom"], []),
        (["house", "mushroom"], ["house"]),
        (["the style of a toad"], []),
        (["the style of a house"], ["the style of a house"]),
        (["shroom"], ["shroom"]),
        (["蘑菇"], []),
    ],
)
def test_a_concept_that_the_unsafe_prompts_do_not_name_is_warned_of(caplog, monkeypatch, concepts, named):
    monkeypatch.setattr("des.utils.logs.logger.propagate", True)
    check_concept(concepts, ["a red Mushroom, in the style of a photo", "toadstools", "红色的蘑菇"])
    assert {record.args[0] for record in caplog.records} == set(named)


@pytest.mark.parametrize(
    ("concepts", "equal"),
    [
        (["mushroom", "Mushroom "], True),
        (["a " * 80 + "mushroom", "a " * 80 + "house"], True),
        (["mushroom", "house", "MUSHROOM"], True),
        (["mushroom", "house"], False),
    ],
)
def test_concepts_that_become_the_same_tokens_are_refused(concepts, equal):
    encoder = load_encoder(str(FOLDER / "model"))
    if not equal:
        refuse_equal_concepts(encoder, concepts)
        return
    with pytest.raises(UserError, match="one concept is named twice"):
        refuse_equal_concepts(encoder, concepts)


@pytest.mark.parametrize(("alpha", "says"), [(0, None), (0.09, "low"), (0.1, None), (0.8, None), (2, None), (2.1, "high")])
def test_an_unusual_guidance_is_warned_of(caplog, monkeypatch, alpha, says):
    monkeypatch.setattr("des.utils.logs.logger.propagate", True)
    check_guidance(alpha * 50, 50)
    assert (says in caplog.text) if says else not caplog.text


@pytest.mark.parametrize(("prompt", "tokens"), [("a " * 75, 77), ("a " * 76, 78), ("a a", 4)])
def test_tokens_are_counted_with_start_and_end(prompt, tokens):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "model/tokenizer")
    assert truncated_rows(tokenizer, ["a", prompt], tokens) == []
    assert truncated_rows(tokenizer, ["a", prompt], tokens - 1) == [1]


def test_long_prompts_are_counted_and_equal_ones_are_warned_of(train, tmp_path):
    start = "a " * 80
    (tmp_path / "unsafe.csv").write_text((FOLDER / "unsafe.csv").read_text() + f"{start}mushroom\n{start}toadstool\n")
    (tmp_path / "safe.csv").write_text((FOLDER / "safe.csv").read_text() + f"{start}house\n")
    done = train(unsafe_csv_path=tmp_path / "unsafe.csv", safe_csv_path=tmp_path / "safe.csv")
    assert done.code == 0, done.err
    counts = {"unsafe": 2, "safe": 1, "concept": 0, "unsafe_equal_to_safe": 2}
    assert metadata(tmp_path / "out")["truncated_prompts"] == counts
    assert "truncated: 2 of" in done.err
    assert re.search(r"2 of \d+ unsafe prompts \(\d+%\) have the same tokens as a safe one", done.err)
    assert json.loads((tmp_path / "out/safe_rows/codebook.json").read_text())["truncated_prompts"] == 1
    plain = train("plain")
    assert "the same tokens" not in plain.err and metadata(tmp_path / "plain")["truncated_prompts"]["unsafe"] == 0


@pytest.mark.parametrize("name", ["sd_v1", "flux"])
def test_generation_and_results_count_truncated_prompts(call, family, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.csv").write_text("prompt\n" + "a house\n" + "a " * 100 + "mushroom\n" + "a\n" + "a " * 100 + "\n")
    options = {"model_path": family(name), "device": "cpu", "prompts_csv": "p.csv", "output_path": "t", "num_inference_steps": 1,
               "end_idx": 3, "height": 16, "width": 16}  # fmt: skip
    done = call("generate.py", *flags(**options))
    assert done.code == 0, done.err
    assert "text_encoder reads 77 tokens and truncates 2 of 4 prompts" in done.err
    folder = tmp_path / f"results/none/{name}/t"
    recorded = json.loads((folder / "run.json").read_text())["truncated_prompts"]
    assert recorded["text_encoder"] == {"tokens": 77, "count": 2, "rows": [1, 3]}
    counts = {"text_encoder": 1}
    if name == "flux":
        assert recorded["text_encoder_2"]["tokens"] == 512 and recorded["text_encoder_2"]["count"] == 0
        counts["text_encoder_2"] = 0
    assert truncated_counts(folder, [0, 1, 2, None]) == {"truncated_prompts": counts}
    (folder / "run.json").write_text("{}")  # as before this was counted
    assert truncated_counts(folder, [0, 1]) == {}
