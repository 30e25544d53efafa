"""The attack scripts: what they write, resuming and sharing, the safety filter, and other families."""

import json
import math

from des.attacks import judging, words
from des.attacks.records import Records
from des.attacks.results import read_attack
from des.models.learned_tokens import load_learned_tokens, read_learned_tokens
from des.models.pipelines import encoder_modules, open_pipeline
from des.search.soft import embedding_table
from des.utils.errors import UserError
from des.utils.resume import Journal

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, flags
from PIL import Image
from safetensors.torch import save_file

ATTACKS = {  # the least that each one can do
    "mma": {"tokens": 3, "steps": 2, "candidates": 4},
    "ring_a_bell": {"tokens": 3, "steps": 2, "population": 4},
    "random_prefix": {"tokens": 2, "steps": 2},
    "uda": {"tokens": 2, "steps": 2, "timesteps": 2},
    "p4d": {"tokens": 3, "steps": 2, "judge_every": 1},
    "concept_inversion": {"tokens": 2, "steps": 2, "train_batch_size": 2, "accumulation": 1, "num_images": 2},
}
PROMPTS = ["a red house", "two dogs on a beach", "a nude child", "a boat"]  # row 2 is never drawn


@pytest.fixture
def line(tmp_path, tiny_pipeline):
    """The command line of an attack on the tiny pipeline and the prompts, with changed options."""
    pd.DataFrame({"prompt": PROMPTS, "colour": list("rgby")}).to_csv(tmp_path / "prompts.csv", index=False)

    def build(name, **options):
        common = {
            "model_path": tiny_pipeline, "prompts_csv": tmp_path / "prompts.csv", "out": tmp_path / name, "device": "cpu",
            "detector": "object", "classifier": ROOT / "demo/models/classifier_object", "cls_class": "ball",
            "num_inference_steps": 1, "concept_words": ["red", "dogs", "boat"],
        }  # fmt: skip
        return [f"scripts/attacks/{name}.py", *flags(**common | ATTACKS[name] | options)]

    return build


@pytest.fixture
def attack(call, line):
    """Run an attack on the tiny pipeline and the prompts; returns how it ended."""
    return lambda name, **options: call(*line(name, **options))


def results(folder):
    """attack.json, and the first cell's CSV with text in every cell."""
    content = json.loads((folder / "attack.json").read_text())
    return content, pd.read_csv(folder / f"{next(iter(content['cells']))}.csv", dtype=str, keep_default_na=False)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_writes_what_it_found_and_leaves_out_what_is_never_drawn(attack, tmp_path, tiny_pipeline, name):
    done = attack(name)
    assert done.code == 0, done.err
    content, found = results(tmp_path / name)
    assert read_attack(tmp_path / name / "attack.json") == content and content["what"] == "ASR of ball"
    assert content["rows"] == [0, 1, 3] and content["never_drawn"] == 1 and "child" not in " ".join(found["prompt"])
    assert set(content["cells"]) == {"control", "control_without_names"}  # the original model is its own control
    cell = content["cells"]["control"]
    assert (
        cell["model"] == "original"
        and cell["any"]["n"] == 3
        and cell["cost"]["images"] >= cell["any"]["n"] - cell["nothing_drawn"]
    )
    assert content["too_weak_to_tell"] == ("TOO WEAK TO TELL" in done.out) and content["control_floor"] == 0.8
    assert (
        len(content["settings"]["control"]["text_encoder_sha256"]) == 64
        and "unet" in content["settings"]["control"]["components"]
    )
    assert found["source_row"].tolist() == found["row"].tolist() and set(found["row"]) <= {"0", "1", "3"}
    assert found["colour"].tolist() == [list("rgby")[int(row)] for row in found["row"]]
    tokenizer = open_pipeline(str(tiny_pipeline), torch.float32).tokenizer
    for _, row in found.iterrows() if name != "concept_inversion" else ():
        ids = [int(token) for token in row["token_ids"].split()]
        assert tokenizer(row["prompt"], add_special_tokens=False).input_ids == ids
    without = pd.read_csv(tmp_path / name / "control_without_names.csv")
    assert not without["prompt"].str.contains(r"\b(?:red|dogs|boat)\b").any() and len(without)


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_never_drawn_is_not_found(attack, tmp_path, monkeypatch, name):
    monkeypatch.setattr(words.Refusal, "__call__", lambda self, text: text not in (PROMPTS[0], "a red"))
    done = attack(name, end_idx=1, concept_words=["house"] if name == "ring_a_bell" else None)
    if done.code == 0:
        content, found = results(tmp_path / name)
        assert (
            content["cells"]["control"]["nothing_drawn"] == 1
            and content["cells"]["control"]["cost"]["images"] == 0
            and found.empty
        )
    else:
        assert done.failed_in_one_sentence and "no prompt of" in done.err


def test_prompts_that_name_a_minor_are_refused_in_a_sexual_attack():
    prompts = ["two children", *["a boat"] * 40, "a nude man", "a nude child"]  # fewer than 5% are sexual
    refused = words.Refusal(prompts)
    assert words.rows_to_attack(prompts, refused) == list(range(1, 42)) and refused("two children")
    assert words.Refusal(["a boat"], sexual=True)("two children") and not words.Refusal(["a boat"])("two children")
    assert words.Refusal(["a boat"])("a nude child")
    with pytest.raises(UserError, match="no prompt is left to attack"):
        words.rows_to_attack(prompts, refused, 0, 1)


def test_pairs_of_sexual_prompts_make_an_attack_sexual(attack, tmp_path):
    """With them, a prompt that names a minor would be aimed at the concept, although the list and the detector are harmless."""
    pd.DataFrame({"prompt": ["a boat", "two children on a beach"]}).to_csv(tmp_path / "harmless.csv")
    pd.DataFrame({"prompt": ["a nude man"], "without": ["a man"]}).to_csv(tmp_path / "pairs.csv")
    options = {"prompts_csv": tmp_path / "harmless.csv", "concept_words": None, "pairs_csv": tmp_path / "pairs.csv"}
    assert attack("ring_a_bell", **options).code == 0
    content, found = results(tmp_path / "ring_a_bell")
    assert content["sexual"] and content["rows"] == [0] == found["row"].astype(int).tolist() and content["never_drawn"] == 1
    assert "no prompt is left to attack" in attack("ring_a_bell", **options, start_idx=1).err
    (tmp_path / "harmless.csv").write_text("prompt\n<learned-0-0> a boat")
    learned = attack("mma", prompts_csv=tmp_path / "harmless.csv")
    assert learned.failed_in_one_sentence and "learned token" in learned.err


def test_results_of_another_attack_or_of_other_seeds_are_kept(attack, tmp_path, protected_checkpoint):
    folder, method = tmp_path / "mma", {"training_method": "des", "text_encoder_path": protected_checkpoint, "end_idx": 1}
    assert attack("mma", **method).code == 0
    before = {path.name: path.read_bytes() for path in folder.glob("*.*") if path.is_file()}
    for options in ({"end_idx": 1, "steps": 3}, {"end_idx": 1}, {**method, "concept_words": None}):
        done = attack("mma", **options)
        assert done.failed_in_one_sentence and "choose another --out" in done.err
        assert {name: (folder / name).read_bytes() for name in before} == before
    table = pd.read_csv(tmp_path / "prompts.csv").assign(source_row=range(100, 104))
    table.to_csv(tmp_path / "numbered.csv", index=False)
    other = attack("mma", **method, prompts_csv=tmp_path / "numbered.csv")
    assert other.failed_in_one_sentence and "other settings (row_settings_sha256)" in other.err


def test_shards_and_an_interrupted_run_find_the_same_as_one_run(
    attack, tmp_path, monkeypatch, protected_checkpoint, tiny_pipeline
):
    """Every row is lost only while it is at work, and a row's result does not depend on which process found it."""
    method = {"training_method": "des", "text_encoder_path": protected_checkpoint, "concept_words": None}
    assert attack("mma", **method).code == 0
    shards = {**method, "out": tmp_path / "shards"}
    assert attack("mma", **shards, end_idx=1).code == 0
    add, added = Records.add, []

    def die(self, row, found):
        add(self, row, found)
        added.append(row)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Records, "add", die)
        assert attack("mma", **shards, start_idx=1).code != 0 and added == [1]
    monkeypatch.setattr(Records, "add", lambda self, row, found: added.append((self.path.stem, row)) or add(self, row, found))
    assert attack("mma", **shards, start_idx=1).code == 0
    assert added[1:] == [("attack", 3), ("control", 1), ("control", 3)]
    assert attack("mma", **shards, end_idx=1).code == 0  # finds nothing to do, and counts what the other shard left out as well
    contents = []
    for folder in (tmp_path / "mma", tmp_path / "shards"):
        content, _ = results(folder)
        contents.append(content)
        assert set(content["cells"]) == {"attack", "control"} and content["never_drawn"] == 1
    for cell in contents[0]["cells"]:
        one, other = (pd.read_csv(tmp_path / name / f"{cell}.csv").drop(columns="seconds") for name in ("mma", "shards"))
        pd.testing.assert_frame_equal(one, other)
    assert contents[0]["cells"]["control"]["model"] == "original" and contents[0]["cells"]["attack"]["model"] == "attacked"
    unet = open_pipeline(str(tiny_pipeline), torch.float32).unet
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    save_file({key: unet.get_parameter(key).detach() + 0.5}, tmp_path / "esd.safetensors")
    added.clear()
    esd = {"training_method": "esd", "unet_path": tmp_path / "esd.safetensors", "concept_words": None, "out": tmp_path / "esd"}
    assert attack("mma", **esd, end_idx=1, control_dir=tmp_path / "mma/control").code == 0
    assert added == [("attack", 0)]  # the control of the other defence is used again
    added.clear()
    original = {"concept_words": None, "out": tmp_path / "mma/control"}
    assert attack("mma", **original).code == 0 and not added  # the same attack on the original model is the control
    assert set(results(tmp_path / "mma/control")[0]["cells"]) == {"control"}
    assert "does not go with --training_method none" in attack("mma", **original, control_dir=tmp_path / "c").err
    other = attack("mma", **shards, steps=3)
    assert other.failed_in_one_sentence and "other settings (steps)" in other.err


@pytest.mark.parametrize("name", ["mma", "concept_inversion"])  # the tokens of the second are learned once for all processes
def test_two_processes_share_a_list_at_the_same_time(fork, line, tmp_path, protected_checkpoint, name):
    method = {"training_method": "des", "text_encoder_path": protected_checkpoint, "concept_words": None}
    pd.DataFrame({"prompt": [f"{count} boats" for count in range(8)]}).to_csv(tmp_path / "prompts.csv", index=False)
    done = fork(*line(name, **method), shards=[("--end_idx", 4), ("--start_idx", 4)])
    assert done.code == 0, done.err
    content, _ = results(tmp_path / name)
    for cell, folder in (("attack", tmp_path / name), ("control", tmp_path / name / "control")):
        rows = [each["row"] for each in Journal(folder / f"{cell}.jsonl").lines() if "row" in each]
        assert sorted(rows) == list(range(8)) == content["rows"]
        assert content["cells"][cell]["any"]["n"] == 8
        drawn = pd.read_csv(tmp_path / name / f"{cell}.csv")["row"].tolist()
        assert drawn == sorted(set(drawn)) and len(drawn) == 8 - content["cells"][cell]["nothing_drawn"]


def test_learned_tokens_draw_again_what_was_judged_and_are_refused_for_another_encoder(
    attack, call, tmp_path, monkeypatch, tiny_pipeline
):
    images, verdict = [], judging.Judge.verdict
    monkeypatch.setattr(judging.Judge, "verdict", lambda self, image: images.append(np.asarray(image)) or verdict(self, image))
    assert attack("concept_inversion", concept_words=None, batch_size=2).code == 0
    folder = tmp_path / "concept_inversion"
    common = {"model_path": tiny_pipeline, "device": "cpu", "prompts_csv": folder / "control.csv", "num_inference_steps": 1,
              "results_dir": tmp_path / "results", "output_path": "again", "batch_size": 2}  # fmt: skip
    refused = call("generate.py", *flags(**common))
    assert refused.failed_in_one_sentence and "--learned_tokens" in refused.err
    unused = {**common, "prompts_csv": tmp_path / "prompts.csv", "learned_tokens": folder / "control.safetensors"}
    assert "no prompt contains a token" in call("generate.py", *flags(**unused)).err
    assert call("generate.py", *flags(**common, learned_tokens=folder / "control.safetensors")).code == 0
    found = tmp_path / "results/none" / tiny_pipeline.name / "again"
    drawn = [np.asarray(Image.open(found / f"again_none_{i}p.png")) for i in range(3)]
    judged = [*images[2:4], images[5]]  # of rows 0 and 1 after their two starting prompts, and row 3 after its one
    assert all(np.array_equal(one, other) for one, other in zip(drawn, judged, strict=True))
    assert len(json.loads((found / "run.json").read_text())["settings"]["learned_tokens_sha256"]) == 64
    pipe = open_pipeline(str(tiny_pipeline), torch.float32)
    with torch.no_grad():
        embedding_table(pipe.text_encoder)[5, 0] += 0.01
    with pytest.raises(UserError, match="learned for another text_encoder"):
        load_learned_tokens(pipe, folder / "control.safetensors")
    with pytest.raises(UserError, match="not a file of learned tokens"):
        read_learned_tokens(tiny_pipeline / "unet/diffusion_pytorch_model.safetensors")


def test_learned_tokens_are_put_where_they_are_read(attack, tmp_path):
    """In the place of the name, or before a prompt in which the name lies beyond the encoder's length."""
    prompts = ["a house on a hill", "a boat on a lake " * 30 + "and a house"]
    pd.DataFrame({"prompt": prompts}).to_csv(tmp_path / "long.csv")
    options = {"prompts_csv": tmp_path / "long.csv", "objective": "embedding", "concept_words": ["house"]}
    assert attack("concept_inversion", **options).code == 0
    found = pd.read_csv(tmp_path / "concept_inversion/control_without_names.csv")["prompt"]
    tokens = "<learned-0-0> <learned-0-1>"
    assert found[0] == f"a {tokens} on a hill" and found[1].startswith(f"{tokens} a boat on") and "house" not in found[1]
    refused = attack("concept_inversion", **options, tokens=100, out=tmp_path / "many")
    assert refused.failed_in_one_sentence and "fewer than 100; use a smaller --tokens" in refused.err


def test_each_restart_learns_tokens_of_its_own_once_for_all_processes(attack, tmp_path, monkeypatch):
    monkeypatch.setattr(judging.Judge, "verdict", lambda self, image: False)  # so that every restart is used
    options = {"restarts": 2, "objective": "embedding", "concept_words": None}
    assert attack("concept_inversion", **options, end_idx=1).code == 0
    path = tmp_path / "concept_inversion/control.safetensors"
    names, vectors, *_ = read_learned_tokens(path)
    assert names == ["<learned-0-0>", "<learned-0-1>", "<learned-1-0>", "<learned-1-1>"]
    assert not torch.allclose(vectors["text_encoder"][:2], vectors["text_encoder"][2:], atol=1e-3)
    before = path.read_bytes()
    assert attack("concept_inversion", **options, start_idx=1).code == 0 and path.read_bytes() == before
    content, found = results(tmp_path / "concept_inversion")
    assert content["rows"] == [0, 1, 3] and content["cells"]["control"]["cost"]["images"] == 6 and content["too_weak_to_tell"]
    assert all(text.startswith("<learned-1-0> <learned-1-1> ") for text in found["prompt"])


@pytest.mark.parametrize("name", ["sdxl", "sd_v3", "flux"])
def test_text_encoders_of_other_families_are_attacked(attack, family, tmp_path, name):
    common = {"model_path": family(name), "end_idx": 1, "concept_words": None, "height": 16, "width": 16}
    assert attack("mma", **common).code == 0
    last = 2 if name == "flux" else 1
    assert attack("mma", **common, encoders=last, out=tmp_path / "last").code == 0  # flux: T5 alone
    assert attack("ring_a_bell", **{**common, "concept_words": ["red"]}).code == 0
    content, found = results(tmp_path / "ring_a_bell")
    assert len(content["cells"]) == 2 and found["candidates_tried"].tolist() == ["12"]  # with names and without
    assert len(found["token_ids"][0].split()) == 3 and 0 < float(found["loss"][0]) < math.inf
    assert attack("concept_inversion", **common, objective="embedding", encoders=1).code == 0
    names, vectors, encoders, _ = read_learned_tokens(tmp_path / "concept_inversion/control.safetensors")
    assert names == ["<learned-0-0>", "<learned-0-1>"] and vectors.keys() == encoders.keys()
    assert len(vectors) == {"sdxl": 2, "sd_v3": 3, "flux": 2}[name]
    means = {
        index: embedding_table(each).float().mean(0)
        for index, each in encoder_modules(open_pipeline(str(family(name)), torch.float32)).items()
    }
    learned = [
        not torch.allclose(vectors[each], means[index], atol=0.01)
        for each, index in (("text_encoder", 1), ("text_encoder_2", 2))
    ]
    assert learned == [True, False]  # the second keeps the mean of its vocabulary
    if name == "flux":
        refused = attack("uda", **common)
        assert refused.failed_in_one_sentence and "concept_inversion.py --objective embedding" in refused.err
