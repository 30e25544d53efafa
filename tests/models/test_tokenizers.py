"""Tokenizers: their class, offline caches, missing lengths, and tokenizers that do not fit their encoder."""

import json
import shutil

from des.models.encoders import load_encoder
from des.models.pipelines import open_pipeline, text_encoder
from des.utils.errors import UserError

import pytest
import torch
from conftest import GOLDEN, flags, training_line
from huggingface_hub import constants
from transformers import CLIPTokenizerFast


def edited(source, folder, file, **changes):
    """A copy of a model's folder with changed entries of a JSON file; None removes an entry."""
    shutil.copytree(source, folder)
    content = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return folder


def test_scripts_run_offline_from_a_complete_cache(call, tmp_path, monkeypatch, tiny_pipeline):
    """A pipeline has no tokenizer/config.json, so a complete cache has none either."""
    cached = tmp_path / "hub/models--owner--tiny"
    shutil.copytree(tiny_pipeline, cached / f"snapshots/{'a' * 40}")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = {"model_path": "owner/tiny", "device": "cpu"}
    checkpoint = {"text_encoder_path": tmp_path / "out/0.01_0.3/checkpoint-2.pt"}
    for line in (
        ["save_codebook.py", *flags(csv_path=GOLDEN / "A/safe.csv", save_dir=tmp_path / "cb", **model)],
        training_line(tmp_path, model_path="owner/tiny", learning_rate="1e-2"),
        ["scripts/export.py", *flags(model_path="owner/tiny", format="pipeline", out=tmp_path / "exported", **checkpoint)],
        ["generate.py", *flags(prompt="a", output_path="a", results_dir=tmp_path, num_inference_steps=1, training_method="des", **model, **checkpoint)],
    ):  # fmt: skip
        done = call(*line)
        assert done.code == 0, done.err


@pytest.mark.parametrize(("case", "index", "tokenizer"), [("A", 1, "tokenizer"), ("C", 3, "tokenizer_3")])
def test_a_tokenizer_folder_may_name_no_class(tmp_path, case, index, tokenizer):
    source = GOLDEN / case / "model"
    folder = edited(source, tmp_path / "m", f"{tokenizer}/tokenizer_config.json", tokenizer_class=None)
    ours, named = (load_encoder(str(each), index, "meta") for each in (folder, source))
    assert type(ours.tokenizer) is type(named.tokenizer) and ours.identity == named.identity
    assert ours.tokenizer.is_fast  # transformers 4 has slow classes of these names, too, which read some prompts otherwise


def test_the_class_of_a_tokenizer_is_the_one_in_model_index(tmp_path, tiny_pipeline):
    folder = edited(tiny_pipeline, tmp_path / "m", "tokenizer/tokenizer_config.json", tokenizer_class="T5Tokenizer")
    assert type(load_encoder(str(folder), 1, "meta").tokenizer) is CLIPTokenizerFast  # in transformers 5, CLIPTokenizer itself
    edited(folder, tmp_path / "usual", "model_index.json", tokenizer=["transformers", "CLIPTokenizer"])
    assert type(open_pipeline(str(tmp_path / "usual"), torch.float32).tokenizer) is CLIPTokenizerFast
    edited(folder, tmp_path / "other", "model_index.json", tokenizer=["transformers", "CLIPTextModel"])
    with pytest.raises(UserError, match="transformers has no tokenizer class CLIPTextModel"):
        load_encoder(str(tmp_path / "other"), 1, "meta")


@pytest.mark.parametrize("stated", [None, 1e30, -5, 0, 2, float("nan"), "77"])
def test_a_missing_length_is_the_encoders_number_of_positions(tmp_path, tiny_pipeline, caplog, stated):
    file = "tokenizer/tokenizer_config.json"
    whole = load_encoder(str(tiny_pipeline), 1, "meta")
    folder = edited(tiny_pipeline, tmp_path / "m", file, model_max_length=stated)
    encoder = load_encoder(str(folder), 1, "meta")
    assert encoder.length == encoder.tokenizer.model_max_length == 77 and encoder.identity == whole.identity
    assert "no usable model_max_length" in caplog.text and "77 tokens, the encoder's number of positions" in caplog.text
    pipe = open_pipeline(str(folder), torch.float32)
    assert text_encoder(pipe, 1).length == 77 and pipe.encode_prompt("a", "cpu", 1, False)[0].shape == (1, 77, 32)


def test_a_shorter_length_is_kept(tmp_path):
    folder = edited(GOLDEN / "A/model", tmp_path / "m", "tokenizer/tokenizer_config.json", model_max_length=24)
    assert load_encoder(str(folder), 1, "meta").length == 24


@pytest.mark.parametrize("stated", [None, -5, "64"])
def test_t5_without_a_length_has_its_pipelines(family, tmp_path, stated):
    folder = edited(family("sd_v3"), tmp_path / "m", "tokenizer_3/tokenizer_config.json", model_max_length=stated)
    assert load_encoder(str(folder), 3, "meta").length == 256
    assert text_encoder(open_pipeline(str(folder), torch.float32), 3).length == 256
    (folder / "model_index.json").unlink()
    with pytest.raises(UserError, match="--max_sequence_length"):
        load_encoder(str(folder), 3, "meta")
    assert load_encoder(str(folder), 3, "meta", max_sequence_length=40).length == 40


MISFITS = {
    "added tokens": "has 1516 tokens, but the encoder has only 1514 embeddings",
    "longer prompts": "pads prompts to 248 tokens, but the encoder has only 77 positions",
    "few tokens": "has only 3 tokens, but the encoder has 1514 embeddings",
    "no files": "the folder tokenizer has none of the files vocab.json",
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_tokenizer_that_does_not_fit_its_encoder_is_refused(tmp_path, tiny_pipeline, misfit):
    folder = tmp_path / "m"
    shutil.copytree(tiny_pipeline, folder)
    shutil.rmtree(folder / "tokenizer")
    if misfit == "few tokens":
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer/vocab.json").write_text('{"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}')
        (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    elif misfit != "no files":
        tokenizer = load_encoder(str(tiny_pipeline), 1, "meta").tokenizer
        tokenizer.model_max_length = 248 if misfit == "longer prompts" else 77
        if misfit == "added tokens":
            tokenizer.add_tokens(["<one>", "<two>"])
        tokenizer.save_pretrained(folder / "tokenizer")
    for load in (lambda: load_encoder(str(folder)), lambda: open_pipeline(str(folder), torch.float32)):
        with pytest.raises(UserError, match=MISFITS[misfit]):
            load()
