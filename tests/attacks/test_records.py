"""What an attack records and which prompts and words it may use."""

import math
from argparse import Namespace

from des.attacks.cells import open_models
from des.attacks.objectives import Denoiser
from des.attacks.records import Found, Records, control_floor, lines_of, summary, write_csv
from des.attacks.words import concept_pairs, without_words
from des.generation.defences import ENCODER_OPTIONS
from des.models.learned_tokens import set_tokens
from des.models.pipelines import open_pipeline, text_encoder
from des.search.soft import embedding_table
from des.utils.errors import UserError

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file


def test_a_summary_counts_any_and_last_and_marks_a_weak_control(tmp_path):
    found = {
        0: Found("a", [1], 0.5, 3, [False, True], False, 2.0),
        1: Found("b", [2], 0.1, 3, [True, False], True, 4.0),
        4: Found("", [], math.nan),
    }
    cell = summary(found, {"training_method": "none", "concept_words": []})
    assert [cell[name]["k"] for name in ("before", "any", "last")] == [1, 2, 1] and cell["nothing_drawn"] == 1
    assert cell["cost"] == {"seconds": 6.0, "images": 4, "candidates": 6, "seconds_per_row": 2.0, "images_per_row": 4 / 3}
    lines = lines_of({"control": cell}, control_floor("mma", False))
    assert "2/3" in lines[0] and lines[1].startswith("TOO WEAK TO TELL") and "66.7%" in lines[1]
    assert len(lines_of({"control": cell}, 0.6)) == 1 and control_floor("mma", True) == pytest.approx(0.7393)
    table = pd.DataFrame({"prompt": list("vwxyz"), "seed": list("12345")})
    write_csv(tmp_path / "a.csv", table, [10, 11, 12, 13, 14], found)
    written = pd.read_csv(tmp_path / "a.csv")
    assert written[["prompt", "source_row", "success", "last_success", "seed"]].values.tolist() == [
        ["a", 10, 1, 1, 1],
        ["b", 11, 1, 0, 2],
    ]


def test_a_restart_that_draws_nothing_keeps_the_last_candidate_that_was_drawn():
    drawn = Found("a", [1], 0.5, 3, [False], True, 2.0)
    assert drawn.then(Found.nothing(4)) == Found("a", [1], 0.5, 7, [False], True, 2.0)
    assert drawn.then(Found("b", [2], 0.1, 1, [True], seconds=1.0)) == Found("b", [2], 0.1, 4, [False, True], True, 3.0)


def test_a_damaged_line_of_the_records_is_searched_again(tmp_path):
    records = Records(tmp_path, "attack", {"steps": 1})
    records.add(0, Found("a", [1], 0.5, 1, [True]))
    records.add(1, Found("b", [1], 0.5, 1, [False]))
    records.path.write_text(records.path.read_text().replace("[false]", "[true]"))
    assert list(Records(tmp_path, "attack", {"steps": 1}).found) == [0]


def test_records_of_other_settings_are_refused_once_they_have_rows(tmp_path):
    Records(tmp_path, "attack", {"steps": 1})  # ended by an error before its first row
    Records(tmp_path, "attack", {"steps": 2}).add(0, Found("a", [1], 0.5, 1, [True]))
    with pytest.raises(UserError, match=r"other settings \(steps\)"):
        Records(tmp_path, "attack", {"steps": 1})
    assert list(Records(tmp_path, "attack", {"steps": 2}).found) == [0]


def test_names_are_taken_out_as_whole_words():
    assert (
        without_words("A Mushroom, a mushroom and mushrooms", ["mushroom"], "<mushroom-0>") == "A <mushroom-0>, a and mushrooms"
    )
    assert (
        without_words("a porcini", ["mushroom"]) == "a porcini"
        and without_words("a cap on a stalk", ["a cap on a stalk"]) == ""
    )


def test_pairs_for_the_concepts_direction_are_filtered(tmp_path):
    path = tmp_path / "pairs.csv"
    pd.DataFrame(
        {
            "prompt": ["a nude man", "a nude child", "a girl, nude", "a boat"],
            "without": ["a man", "a child", "a girl", "a boat"],
        }
    ).to_csv(path)
    assert concept_pairs([path], None) == [("a nude man", "a man")] == concept_pairs([path], ["nude"])
    with pytest.raises(UserError, match="no pair of prompts"):
        concept_pairs([path], ["tree"])
    for name, prompts in {"with": ["a nude man", "a nude child"], "without": ["a man", "a child"], "short": ["a man"]}.items():
        pd.DataFrame({"prompt": prompts}).to_csv(tmp_path / f"{name}.csv")
    assert concept_pairs([tmp_path / "with.csv", tmp_path / "without.csv"], None) == [("a nude man", "a man")]
    with pytest.raises(UserError, match="do not form pairs: they have 2 and 1 rows"):
        concept_pairs([tmp_path / "with.csv", tmp_path / "short.csv"], None)


def test_a_defence_of_the_unet_changes_the_attacked_pipeline_only(tiny_pipeline, tmp_path):
    whole = {name: tensor + 0.02 for name, tensor in open_pipeline(str(tiny_pipeline), torch.float32).unet.state_dict().items()}
    save_file(whole, tmp_path / "unet.safetensors")
    options = dict.fromkeys(("dtype", "negative_prompt", "base_model_path", "adapter_path", "model_type", "scheduler", "max_sequence_length",
                             "num_inference_steps", "guidance_scale", "variant", *ENCODER_OPTIONS.values()))  # fmt: skip
    options |= {"model_path": str(tiny_pipeline), "training_method": "salun", "unet_path": tmp_path / "unet.safetensors"}
    models = open_models(Namespace(**options, device=torch.device("cpu")))
    assert torch.equal(models.attacked.unet.conv_in.weight, models.original.unet.conv_in.weight + 0.02)
    assert models.attacked.vae is models.original.vae and models.attacked.tokenizer is not models.original.tokenizer
    with torch.no_grad():
        models.attacked.text_encoder.final_layer_norm.weight.add_(1)
    assert not torch.equal(
        models.attacked.text_encoder.final_layer_norm.weight, models.original.text_encoder.final_layer_norm.weight
    )
    assert Denoiser(models.attacked).unet is models.attacked.unet


def test_a_learned_token_is_one_token_and_does_not_move_the_end_of_the_prompt(tiny_pipeline):
    pipe = open_pipeline(str(tiny_pipeline), torch.float32)
    pipe.text_encoder.eos_token_id = 2  # as in many published configurations; CLIP then takes the highest id for the end
    vector = torch.full((1, embedding_table(pipe.text_encoder).shape[1]), 0.5)
    ids = set_tokens(pipe, ["<learned-0-0>"], {"text_encoder": vector})["text_encoder"]
    assert torch.equal(embedding_table(pipe.text_encoder)[ids], vector)
    encoder = text_encoder(pipe, 1)
    rows = encoder.tokenize(["a <learned-0-0> boat"])
    assert (rows == ids[0]).sum() == 1
    output = encoder.model(input_ids=rows)
    end = rows[0].tolist().index(encoder.tokenizer.eos_token_id)
    assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, end])
    table = len(embedding_table(pipe.text_encoder))
    set_tokens(pipe, ["<learned-0-0>"], {"text_encoder": vector * 2})
    assert len(embedding_table(pipe.text_encoder)) == table and torch.equal(embedding_table(pipe.text_encoder)[ids], vector * 2)
