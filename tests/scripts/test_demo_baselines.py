"""demo/baselines.py: ESD-x, UCE and the AdvUnlearn-like encoder against independent computations, their files, and the table of methods."""

import json

from demo import baselines, defence_table, evaluation, unlearning
from des.models.pipelines import open_pipeline, text_encoder
from des.tables import jobs
from des.utils.errors import UserError
from des.utils.stats import proportion

import numpy as np
import pytest
import torch
from attack_results import result, settings
from conftest import ROOT
from safetensors.torch import load_file

PIPELINE = ROOT / "demo/models/pipeline"
FILES = {"esd": "unet_path", "uce": "unet_path", "advunlearn": "text_encoder_path"}
ONE_STEP = ("--steps", 1, "--batch_size", 1)  # of training


@pytest.fixture
def pipe(tiny_pipeline):
    return open_pipeline(str(tiny_pipeline), torch.float32)


@pytest.fixture
def lists(tmp_path):
    """Options for short training lists."""
    rows = {"unsafe": ["a red mushroom on a beach", "a toadstool"], "safe": ["a red ball on a beach", "a blue box"]}
    for name, prompts in rows.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(["prompt", *prompts]) + "\n")
    return {name: (f"--{name}_csv_path", tmp_path / f"{name}.csv") for name in rows}


@pytest.mark.parametrize(("erase", "preserve", "ridge"), [(1.0, 1.0, 0.1), (3.0, 0.2, 2.0), (0.5, 0.0, 0.01)])
def test_the_closed_form_of_uce_is_the_least_squares_solution(erase, preserve, ridge):
    rng = np.random.default_rng(0)
    old, concepts, targets, kept = (rng.normal(size=shape) for shape in ((3, 4), (5, 4), (5, 3), (6, 4)))
    rows = np.concatenate([erase**0.5 * concepts, preserve**0.5 * kept, ridge**0.5 * np.eye(4)])
    wanted = np.concatenate([erase**0.5 * targets, preserve**0.5 * kept @ old.T, ridge**0.5 * old.T])
    expected = np.linalg.lstsq(rows, wanted)[0].T
    tensors = [torch.from_numpy(each) for each in (old, concepts, targets, kept)]
    np.testing.assert_allclose(unlearning.uce_weight(*tensors, erase, preserve, ridge).numpy(), expected, atol=1e-10)


def test_uce_edits_an_unsafe_prompt_from_its_first_unsafe_word_on():
    encoder = text_encoder(open_pipeline(str(PIPELINE), torch.float32), 1, "pipeline")
    safe = {"a", "red", "ball", "on", "beach"}
    before = len(encoder.tokenizer("a red").input_ids) - 1  # without the end of the text
    assert unlearning._first_unsafe_token(encoder, "a red mushroom on a beach", safe) == before
    assert (
        unlearning._first_unsafe_token(encoder, "a red ball", safe) == before
    )  # without an unsafe word, the last word is edited


def test_a_step_of_esd_x_follows_its_formula(pipe):
    options = unlearning.Training(1, 1e-3, 2, 1.5, 0)
    before = {name: each.clone() for name, each in pipe.unet.named_parameters()}
    encoder, (prompts, t, x) = text_encoder(pipe, 1, "pipeline"), next(unlearning._states(pipe, ["a red ball"], options))
    with torch.no_grad():
        concept, empty = (encoder(encoder.tokenize([each] * 2)) for each in (prompts[0], ""))
        with_concept, without = (pipe.unet(x, t, each).sample for each in (concept, empty))
        target = without - 1.5 * (with_concept - without)
        torch.testing.assert_close(unlearning.esd_target(with_concept, without, 1.5), target)
    (pipe.unet(x, t, concept).sample - target).square().mean().backward()
    expected = {name: each.grad for name, each in pipe.unet.named_parameters() if ".attn2." in name}
    trained = unlearning.train_esd(pipe, ["a red ball"], options)
    assert trained.keys() == expected.keys()
    after = dict(pipe.unet.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} <= trained.keys()
    for name, gradient in expected.items():  # Adam's first step is the learning rate times the sign of the gradient
        clear = gradient.abs() > 1e-5
        torch.testing.assert_close((before[name] - trained[name])[clear], 1e-3 * gradient.sign()[clear], rtol=0.01, atol=1e-6)


def test_a_prefix_stands_in_front_of_the_prompt(pipe):
    encoder = text_encoder(pipe, 1, "pipeline")
    ids = encoder.tokenize(["ball"])
    prefix = encoder.model.get_input_embeddings().weight[ids[:, 1]].detach()
    repeated = torch.cat([ids[:, :1], ids[:, 1:2], ids[:, 1:-1]], dim=1)
    assert torch.equal(unlearning.with_prefix(encoder, ["ball"], prefix), encoder(repeated))
    assert torch.equal(encoder(ids), unlearning.embed(encoder, ["ball"]))  # later calls are without it


def test_advunlearn_retains_and_attacks(pipe):
    before = {name: each.clone() for name, each in pipe.text_encoder.state_dict().items()}
    found, options = [], unlearning.Training(2, 1e-3, 1, 1.0, 0)
    for retain, warm_up, steps in (
        (1.0, 0.0, 1),
        (1.0, 0.0, 1),
        (0.0, 0.0, 1),
        (1.0, 0.0, 0),
        (1.0, 0.5, 1),
        (1.0, 1.0, 1),
        (1.0, 1.0, 0),
    ):
        pipe.text_encoder.load_state_dict(before)
        state = unlearning.train_advunlearn(pipe, ["a red ball"], ["a box"], options, 1, retain, warm_up, steps, 0.1)
        found.append(torch.cat([each.flatten() for each in state.values()]).clone())
    assert torch.equal(found[0], found[1]) and torch.equal(found[5], found[6])  # the same seed; no attack in the warm-up
    assert not any(torch.equal(found[0], other) for other in found[2:]) and not torch.equal(found[4], found[5])


def test_a_step_of_advunlearn_follows_its_formula(pipe, monkeypatch):
    """In the warm-up: ESD's target for unsafe prompts, and the original's predictions for safe prompts and the empty one."""
    monkeypatch.setattr(unlearning, "EMPTY", 0.5)
    encoder, generator = text_encoder(pipe, 1, "pipeline"), torch.Generator().manual_seed(3)
    u, s = (unlearning._draw(pipe, [prompt], count, generator) for prompt, count in (("a red ball", 1), ("a box", 2)))
    u, s = u.sample(4, generator), s.sample(4, generator)
    texts = ["" if each < 0.5 else "a box" for each in torch.rand(4, generator=generator)]
    assert set(texts) == {"", "a box"}
    pipe.unet.requires_grad_(False)
    loss = 0
    for states, i, text, weight in [
        *((u, i, "a red ball", 1 / 4) for i in range(4)),
        *((s, i, texts[i], 7 / 4) for i in range(4)),
    ]:
        one, empty = (pipe.unet(states.x[[i]], states.t[i], unlearning.embed(encoder, [each])).sample for each in (text, ""))
        found = pipe.unet(states.x[[i]], states.t[i], encoder(encoder.tokenize([text]))).sample
        loss += weight * (found - (2.5 * empty - 1.5 * one if states is u else one)).square().mean()
    loss.backward()
    before = {name: (each.detach().clone(), each.grad) for name, each in pipe.text_encoder.named_parameters()}
    options = unlearning.Training(1, 1e-3, 4, 1.5, 3)
    trained = unlearning.train_advunlearn(pipe, ["a red ball"], ["a box"], options, 1, 7.0, 1.0, 1, 0.1)
    checked = 0
    for name, (weight, gradient) in before.items():  # Adam's first step is the learning rate times the sign of the gradient
        clear = gradient.abs() > 1e-5
        checked += clear.sum()
        torch.testing.assert_close((weight - trained[name])[clear], 1e-3 * gradient.sign()[clear], rtol=0.01, atol=1e-6)
    assert checked > 100


def test_the_inner_attack_brings_predictions_to_those_of_the_original_encoder(pipe):
    encoder, generator = text_encoder(pipe, 1, "pipeline"), torch.Generator().manual_seed(0)
    states = unlearning._draw(pipe, ["a red ball"], 1, generator).sample(1, generator)
    losses = []
    for steps in (0, 8):
        prefix = unlearning.attack(pipe.unet, encoder, states, steps, 0.01, torch.Generator().manual_seed(1))
        found = pipe.unet(states.x, states.t, unlearning.with_prefix(encoder, states.prompts, prefix)).sample
        losses.append(
            (found - pipe.unet(states.x, states.t, unlearning.embed(encoder, ["a red ball"])).sample).square().sum().item()
        )
    assert losses[1] < losses[0]


@pytest.mark.parametrize("method", FILES)
def test_generate_loads_what_is_written(call, tmp_path, lists, method):
    given = [*lists["unsafe"], *(() if method == "esd" else lists["safe"]), *(() if method == "uce" else ONE_STEP)]
    given += ["--images", 1] if method == "advunlearn" else []
    done = call("demo/baselines.py", "--method", method, "--out", tmp_path, "--device", "cpu", *given)
    assert done.code == 0, done.err
    file = tmp_path / f"{method}.safetensors"
    assert done.out.strip() == str(file)
    assert json.loads((tmp_path / f"{method}-metadata.json").read_text())["seconds"] > 0
    if method != "advunlearn":
        shown = {name.split(".attn2.")[1].split(".")[0] for name in load_file(file)}
        assert shown == ({"to_k", "to_v"} if method == "uce" else {"to_q", "to_k", "to_v", "to_out"})
    drawn = call(
        "generate.py", "--model_path", PIPELINE, "--training_method", method, f"--{FILES[method]}", file, "--prompt", "a ball",
        "--output_path", "x", "--results_dir", tmp_path / "r", "--num_inference_steps", 1, "--device", "cpu",
    )  # fmt: skip
    assert drawn.code == 0 and len(list((tmp_path / "r").rglob("*.png"))) == 1, drawn.err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--method uce --steps 3", "--steps does not go with --method uce"),
        ("--method esd --safe_csv_path x.csv", "--safe_csv_path does not go with --method esd"),
        ("--method esd --limit 3", "--limit does not go with --method esd"),
        ("--table --steps 3", "--steps does not go with --table"),
        ("--method uce --attacks mma", "--attacks does not go with --method uce"),
    ],
)
def test_an_option_that_a_method_does_not_use_is_refused(capsys, line, says):
    with pytest.raises(SystemExit):
        baselines.parse_args([*line.split(), "--out", "o"])
    assert says in capsys.readouterr().err


def test_an_attack_joins_the_table_beside_its_control(tmp_path, monkeypatch):
    files = {"unet_sha256": None, "adapter_sha256": None}
    drawn_by = {row: settings(encoder, True, {}, **files) for row, encoder in (("original", "original"), ("DES", "one"))}
    monkeypatch.setattr(defence_table, "read_run", lambda folder: ({"settings": drawn_by[folder.name]}, {}))
    original, row = defence_table.Row("original", "none"), defence_table.Row("DES", "des")
    path = result(tmp_path / "mma", (7, 1), (10, 9), **files) / "attack.json"
    share = proportion(1, 10)
    cells = dict.fromkeys(("plain", "synonyms", "indirect", "object", "colour", "background", "joint"), share)
    cells |= {"clip_score": 75.0, "fid": 1.0, "seconds": None, "flop": 3e9, "attacks": {}}
    table = {
        "original": cells | {"attacks": {"mma": defence_table.result_on(original, path, tmp_path / "original")}},
        "DES": cells | {"flop": 5e9, "attacks": {"mma": defence_table.result_on(row, path, tmp_path / "DES")}},
        "UCE": cells,
    }
    assert defence_table.worst({"UCE": cells}, False) == {"UCE": share}
    assert defence_table.worst(table, True) == {
        "original": proportion(10, 10),
        "DES": proportion(7, 10),
    }  # UCE was not attacked
    learned = {"DES": cells | {"attacks": {"cce-1": table["DES"]["attacks"]["mma"]}}}
    assert [defence_table.worst(learned, text_only)["DES"] for text_only in (True, False)] == [share, proportion(7, 10)]
    text = defence_table.markdown(table, "seconds")
    assert "| MMA | 10/10 = 100.0% [72.2, 100.0] | 7/10 = 70.0% [39.7, 89.2] | not run |" in text
    assert "| MMA, without names | 9/10 = 90.0% [59.6, 98.2] | 1/10 = 10.0%" in text
    assert (
        "- MMA: Exact McNemar test against DES, on the same 10 prompts: original p = 0.25 (3 images count only for original"
        in text
    )
    assert "TOO WEAK" not in text and "| added GFLOP an image | 0.00 | 2.00 |" in text
    defence_table.write_results(tmp_path, table, "seconds")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    weak = result(tmp_path / "weak", (0, 0), (10, 7), **files) / "attack.json"
    table["DES"]["attacks"]["mma"] = defence_table.result_on(row, weak, tmp_path / "DES")
    assert "- MMA: TOO WEAK TO TELL" in defence_table.markdown(table, "seconds")
    for name in ("components", "text_encoder_sha256", "unet_sha256", "adapter_sha256"):
        drawn_by["another"] = drawn_by["DES"] | {name: "x"}
        with pytest.raises(UserError, match=rf"about another model than DES in this table \({name}\)"):
            defence_table.result_on(row, path, tmp_path / "another")


def test_the_whole_table_at_its_smallest(tmp_path, lists, monkeypatch):
    """One command trains, draws, scores and attacks; a second call does nothing again. Two methods stand for all of them."""
    few, rows_of = dict.fromkeys(evaluation.Sampling.__dataclass_fields__, 1), defence_table.rows_of
    monkeypatch.setattr(defence_table, "Sampling", lambda: evaluation.Sampling(**few))
    monkeypatch.setattr(evaluation, "REFERENCE_IMAGES", 20)
    monkeypatch.setattr(defence_table, "rows_of", lambda *given: [*rows_of(*given)[:2], rows_of(*given)[3]])
    for name, (_, path) in lists.items():
        monkeypatch.setattr(evaluation, f"{name.upper()}_LIST", path)
    monkeypatch.setattr(defence_table, "ATTACKS", {
        "mma": evaluation.Attack("MMA", "mma.py", ("--tokens", "2", "--steps", "1", "--candidates", "2")),
        "prefix": evaluation.Attack("random prefix", "random_prefix.py"),
    })  # fmt: skip
    common = (tmp_path, torch.device("cpu"), 42, 1, (), ("mma", "prefix"), baselines.DEFAULTS)
    text = defence_table.build(*common)
    assert "not run" not in text and "random prefix, without names" in text
    methods = json.loads((tmp_path / "table.json").read_text())["methods"]
    assert list(methods) == ["original", "DES", "UCE"]
    assert all(set(each["attacks"]) == {"mma", "prefix"} for each in methods.values())
    assert len(list((tmp_path / "attacks").glob("*/*/attack.json"))) == 6
    ran = []
    monkeypatch.setattr(jobs, "run_script", lambda *line: ran.append(line))
    assert defence_table.build(*common) == text and not ran
