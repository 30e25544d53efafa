"""How far embeddings moved: weights that differ and do not protect are named by loading, generation, export and verify.py."""

import json
from types import SimpleNamespace

import generate
from des.export.formats import load_protected
from des.models.checkpoints import save_checkpoint
from des.models.encoders import load_encoder
from des.models.pipelines import open_pipeline, protect
from des.models.shift import NEUTRAL, Before, describe, doubt, is_unprotected, measure
from des.utils.errors import UserError

import pytest
import torch
from conftest import flags

CONCEPT = "a mushroom"
NAMES = {"one ulp", "unused row", "zeros", "noise"}


@pytest.fixture
def encoder(tiny_pipeline):
    return load_encoder(str(tiny_pipeline))


def changed(encoder, what):
    """The original's state with a change that protects from nothing."""
    state = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    if what == "one ulp":
        name = next(name for name in state if name.endswith("mlp.fc1.weight"))
        state[name][0, 0] = torch.nextafter(state[name][0, 0], torch.tensor(torch.inf))
    elif what == "unused row":
        name = next(name for name in state if name.endswith("token_embedding.weight"))
        used = {*encoder.tokenize([CONCEPT, "", *NEUTRAL]).flatten().tolist()}
        state[name][max(set(range(len(state[name]))) - used)] += 1
    elif what == "zeros":
        state = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    elif what == "noise":
        torch.manual_seed(0)
        state = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    if "shared.weight" in state:  # T5 has one tensor under two names
        state["encoder.embed_tokens.weight"] = state["shared.weight"].clone()
    return state


def saved(encoder, what, folder, **metadata):
    return save_checkpoint(folder / what.replace(" ", "-"), encoder.model, changed(encoder, what), metadata)


@pytest.mark.parametrize("what", sorted(NAMES))
@pytest.mark.parametrize("known", [True, False])
def test_other_weights_are_no_proof_of_protection(encoder, tmp_path, what, known):
    path = saved(encoder, what, tmp_path, **({"concept_prompt": [CONCEPT]} if known else {}))
    measured = measure(encoder, path, None)
    if what in ("zeros", "noise"):
        assert measured["doubt"] and "damaged" in measured["doubt"]
    else:
        assert measured["doubt"] and ("hardly moved" if known else "may be the original") in measured["doubt"]
        assert measured["shift"]["neutral"] > 0.99999
    assert (measured["shift"]["concept"] is not None) == known


def test_the_shift_is_the_mean_cosine_of_flattened_embeddings(encoder, tmp_path, protected_checkpoint):
    (tmp_path / "checkpoint-2-metadata.json").write_text(json.dumps({"concept_prompt": [CONCEPT, "a bus"]}))
    prompts = [CONCEPT, "a bus", *NEUTRAL]
    before = next(encoder.encode(prompts, 99)).flatten(1).clone()
    measured = measure(encoder, protected_checkpoint, None)["shift"]
    cosines = torch.cosine_similarity(next(encoder.encode(prompts, 99)).flatten(1), before)
    assert measured["concept"] == pytest.approx(cosines[:2].mean().item(), abs=1e-5)
    assert measured["neutral"] == pytest.approx(cosines[2:].mean().item(), abs=1e-5)
    assert measured["concept_prompts"] == [CONCEPT, "a bus"] and measured["neutral_prompts"] == len(NEUTRAL)


@pytest.mark.parametrize("embedding", ["last_hidden_state", "pipeline"])
@pytest.mark.parametrize(
    ("name", "index", "mode"), [("sdxl", 2, "image"), ("sd_v3", 3, "text"), ("flux", 1, "inpaint"), ("flux", 2, "text")]
)
def test_a_pipelines_encoders_are_read_as_they_were_trained(family, tmp_path, name, index, mode, embedding):
    encoder = load_encoder(str(family(name)), index, embedding=embedding)
    path, state = saved(encoder, "noise", tmp_path, concept_prompt=[CONCEPT], embedding=embedding), changed(encoder, "noise")
    measured = protect(open_pipeline(str(family(name)), torch.float32, mode=mode), {index: path})[index]["shift"]
    encoder.model.float()
    before = Before(encoder, [CONCEPT])
    encoder.model.load_state_dict(state)
    expected = before.shift(encoder)
    for figure in ("concept", "concept_to_empty", "neutral"):
        assert measured[figure] == pytest.approx(expected[figure], abs=1e-3)


@pytest.mark.parametrize(
    ("concept", "empty", "neutral", "says"),
    [
        (0.8, 0.8, 0.94, None),
        (0.95, 0.95, 0.99, None),  # this encoder's concept is close to E("") anyway
        (0.95, 0.3, 0.999, "hardly moved"),
        (0.4, 0.8, 0.4, "moved like the concept"),
        (float("nan"), 0.8, 0.9, "not finite"),
        (None, None, 0.95, None),
        (None, None, 1.0, "may be the original"),
        (None, None, 0.0, "damaged"),
    ],
)
def test_what_speaks_against_protection(concept, empty, neutral, says):
    shift = {"concept": concept, "concept_to_empty": empty, "neutral": neutral}
    assert (doubt(shift) is None) if says is None else (says in doubt(shift))


def test_a_concept_that_did_not_move_is_no_mean_of_others():
    prompts = {"concept_prompts": ["a bus", CONCEPT, "a cat"], "neutral_prompts": 6}
    shift = {"concept": 0.4, "concept_to_empty": 0.3, "neutral": 0.999, **prompts}
    assert doubt(shift) is None and not is_unprotected({"shift": shift})  # of an earlier version, which recorded the mean only
    shift |= {"each_concept": [0.1, 1.0, 0.1], "each_concept_to_empty": [0.3, 0.3, 0.3]}
    assert repr(CONCEPT) in doubt(shift) and is_unprotected({"shift": shift})
    assert "highest 1.0000" in describe(shift)
    shift |= {"each_concept": [0.1, 0.95, 0.1], "each_concept_to_empty": [0.3, 0.95, 0.3]}  # close to E("") anyway
    assert doubt(shift) is None


@pytest.mark.parametrize(("name", "index", "last"), [("sdxl", 1, "encoder.layers.2."), ("sd_v3", 2, "encoder.layers.2.")])
def test_what_the_denoiser_does_not_get_is_no_protection(family, tmp_path, name, index, last):
    encoder = load_encoder(str(family(name)), index)
    torch.manual_seed(0)
    state = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    state |= {name: torch.randn_like(tensor) for name, tensor in state.items() if last in name and tensor.ndim == 2}
    path = save_checkpoint(tmp_path / "last", encoder.model, state, {"concept_prompt": [CONCEPT]})
    measured = protect(open_pipeline(str(family(name)), torch.float32), {index: path})[index]
    assert measured["shift"]["concept"] < 0.99 and measured["shift_in_pipeline"]["concept"] > 0.99999
    assert "as the pipeline reads the encoder" in measured["doubt"] and is_unprotected(measured)
    with pytest.raises(UserError, match="not exported as protected: as the pipeline reads the encoder"):
        load_protected(str(family(name)), {index: path})


def test_generation_and_export_name_what_may_not_protect(call, encoder, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved(encoder, "one ulp", tmp_path, concept_prompt=[CONCEPT])

    def run(name):
        options = {
            "model_path": tiny_pipeline,
            "device": "cpu",
            "prompt": "a dog",
            "output_path": name,
            "num_inference_steps": 1,
        }
        done = call("generate.py", *flags(training_method="des", text_encoder_path=path, **options))
        record = json.loads((tmp_path / f"results/des/tiny-sd/{name}/run.json").read_text())
        return done, record["protection"]["1"]

    done, measured = run("t2i")
    assert done.code == 0 and "hardly moved" in done.err and "model protected by des" not in done.err
    assert measured["shift"]["concept"] > 0.99999 and len(measured["file_sha256"]) == 64
    exported = call(
        "scripts/export.py", "--model_path", tiny_pipeline, "--text_encoder_path", path, "--format", "hf", "--out", "e"
    )
    assert "hardly moved" in exported.err
    saved(encoder, "one ulp", tmp_path, concept_prompt=[CONCEPT], protects=False)
    done, measured = run("again")
    assert "does not protect" in done.err and measured["protects"] is False


@pytest.mark.parametrize(
    ("applied", "says"),
    [
        ({1: {"shift": {"concept": 0.1}, "doubt": None}, 2: {"shift": {"concept": 0.1}, "doubt": None}}, "protected by des"),
        ({1: {"shift": {"concept": 0.1}, "doubt": None}}, "with des, whose text encoder 2 is the original, NOT protected,"),
        ({1: {"shift": {"concept": None}, "doubt": None}, 2: {}}, "with des (whether it protects was not measured, because"),
        ({1: {"shift": {"concept": None}, "doubt": "x"}, 2: {}}, "with des, WHICH MAY NOT PROTECT IT (see the warning above),"),
        ({"unet": "u"}, "protected by des"),
    ],
)
def test_generations_last_line_says_what_is_known_about_protection(applied, says):
    assert generate.described("des", applied, SimpleNamespace(text_encoder=1, text_encoder_2=2)).startswith(f"the model {says}")


def test_verify_measures_a_checkpoint(call, encoder, tiny_pipeline, tmp_path, protected_checkpoint):
    def verify(path, *more):
        return call("scripts/verify.py", "--checkpoint", path, "--model_path", tiny_pipeline, "--device", "cpu", *more)

    unknown = verify(protected_checkpoint)
    assert unknown.failed_in_one_sentence and "pass --concept_prompt" in unknown.err and "neutral prompts" in unknown.out
    measured = measure(load_encoder(str(tiny_pipeline)), protected_checkpoint, None, [CONCEPT])
    known = verify(protected_checkpoint, "--concept_prompt", CONCEPT)
    assert f"concept {measured['shift']['concept']:.4f} (1)" in known.out and known.failed_in_one_sentence == bool(
        measured["doubt"]
    )
    same = verify(saved(encoder, "one ulp", tmp_path, concept_prompt=[CONCEPT]))
    assert same.failed_in_one_sentence and "hardly moved" in same.err and "concept 1.0000" in same.out
    other = verify(tmp_path / "one-ulp.pt", "--concept_prompt", "a bus")
    assert other.failed_in_one_sentence and "names the concept itself" in other.err
    for wrong in (("scripts/verify.py",), ("scripts/verify.py", "folder", "--checkpoint", protected_checkpoint)):
        assert call(*wrong).failed_in_one_sentence
    assert call("scripts/verify.py", "folder", "--concept_prompt", "x").failed_in_one_sentence
