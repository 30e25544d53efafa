"""The reference cases through the real scripts, at their tolerances: A, B and D are CLIP, C is T5 as encoder 3 of SD3."""

import json

from des.models.checkpoints import load_checkpoint, published_names
from des.models.encoders import load_encoder
from des.training.codebook import Codebook
from des.training.losses import Concept

import pytest
import torch
from conftest import GOLDEN


def describe(tensor: torch.Tensor) -> dict[str, float]:
    """A tensor's sum, norm and dot product with cos(0), cos(1), … in float64, as the reference cases give them."""
    flat = tensor.detach().double().flatten()
    return {
        "sum": flat.sum().item(),
        "norm": flat.norm().item(),
        "cosdot": (flat * torch.arange(len(flat)).double().cos()).sum().item(),
    }


# Case C is plain AdamW on bf16 weights with an fp16 codebook.
T5 = {"index": 3, "suffix": "_encoder3", "run": "encoder3_", "codebook": ["--dtype", "fp16"], "train": ["--optimizer", "adamw"]}
CLIP = {"index": 1, "suffix": "", "run": "", "codebook": [], "train": []}


@pytest.mark.parametrize(("case", "form"), [("A", CLIP), ("B", CLIP), ("D", CLIP), ("C", T5)])
def test_reference_case(call, case, form, tmp_path):
    folder = GOLDEN / case
    settings, expected = (json.loads((folder / f"{name}.json").read_text()) for name in ("settings", "expected"))
    tolerance = settings["tolerance"]
    common = ["--model_path", folder / "model", "--device", "cpu"]
    made = call(
        "save_codebook.py", *common, "--csv_path", folder / "safe.csv", "--save_dir", tmp_path / "codebook", "--batch_size", 5,
        "--encoder_idx", form["index"], *form["codebook"],
    )  # fmt: skip
    assert made.code == 0, made.err
    trained = call(
        "train_des.py", *common, "--codebook_dir", tmp_path / "codebook", "--unsafe_csv_path", folder / "unsafe.csv",
        "--safe_csv_path", folder / "safe.csv", "--output_dir", tmp_path / "out", "--num_epochs", settings["num_epochs"],
        "--learning_rate", settings["learning_rate"], "--batch_size", settings["batch_size"], "--lambda_safe", settings["lambda_safe"],
        "--ablation", *settings["ablation"], "--concept_prompt", settings["concept_prompt"],
        "--concept_guidance_scale", settings["concept_guidance_scale"], "--text_encoder_idx", form["index"], *form["train"],
    )  # fmt: skip
    assert trained.code == 0, trained.err

    rows = torch.load(tmp_path / f"out/safe_embeddings{form['suffix']}.pth", weights_only=True)["indices"]
    compared = [i for i, margin in enumerate(expected["margin_to_next"]) if margin > settings["most_distant_min_margin"]]
    assert len(compared) >= 5
    assert [rows[i].item() for i in compared] == [expected["most_distant"][i] for i in compared]

    base = load_encoder(str(folder / "model"), form["index"])
    n, e0 = next(base.encode([settings["concept_prompt"], ""], 2))
    targets = Concept(n, e0, settings["concept_guidance_scale"]).target(
        Codebook(tmp_path / f"codebook{form['suffix']}").rows(rows)
    )
    for i in compared:
        assert describe(targets[i])["norm"] == pytest.approx(expected["targets"][i]["norm"], rel=tolerance["target_norm_rel"])

    run = tmp_path / "out" / f"{form['run']}{settings['learning_rate']}_{settings['lambda_safe']}"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {"sep": "safe", "sep_concept": "safe_plus_concept", "uen": "unsafe", "nen": "concept", "total": "total"}
    assert len(steps) == len(expected["losses"])
    for step, reference in zip(steps, expected["losses"], strict=True):
        for ours, theirs in names.items():
            assert step[ours] == pytest.approx(reference.get(theirs, 0), abs=tolerance["losses_abs"]), (step["step"], ours)

    state = torch.load(run / f"checkpoint-{settings['num_epochs']}.pt", weights_only=True)["model_state_dict"]
    before = published_names(base.model.state_dict())
    assert state.keys() == expected["params"].keys()
    for name, reference in expected["params"].items():
        if any(name.endswith(excluded) for excluded in settings["exclude_params"]):
            continue
        assert describe(state[name])["norm"] == pytest.approx(reference["norm"], rel=tolerance["param_norm_rel"]), name
        if "delta_norm_rel" in tolerance:
            change = (state[name].double() - before[name].double()).norm().item()
            assert change == pytest.approx(reference["delta_norm"], rel=tolerance["delta_norm_rel"]), name

    load_checkpoint(base.model, run / f"checkpoint-{settings['num_epochs']}.pt")
    for reference in expected["embeddings"]:
        ours = describe(next(base.encode([reference["prompt"]], 1)))
        assert ours["norm"] == pytest.approx(reference["norm"], rel=tolerance["embedding_norm_rel"])
        if "embedding_cosdot_abs" in tolerance:
            assert ours["cosdot"] == pytest.approx(reference["cosdot"], abs=tolerance["embedding_cosdot_abs"])
