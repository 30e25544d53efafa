"""--report_to: what the trackers got is what metrics.jsonl says."""

import json
import sys

import pytest
from conftest import training_line
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture
def command(codebook, tmp_path):
    return lambda **changes: training_line(tmp_path, **changes)


@pytest.fixture
def train(call, command):
    return lambda **changes: call(*command(**changes))


def steps_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curves_of(run_dir):
    """Every curve of TensorBoard's files as (step, value), by name."""
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_has_every_loss_of_every_step(train, tmp_path):
    done = train(report_to=["tensorboard"])
    assert done.code == 0, done.err
    run_dir = tmp_path / "out/1e-05_0.3"
    steps, curves = steps_of(run_dir), curves_of(run_dir)
    assert set(curves) == {"epoch", "sep", "sep_concept", "uen", "nen", "total"}
    for name, points in curves.items():
        assert points == [(step["step"], pytest.approx(step[name], rel=1e-6)) for step in steps]


def test_a_resumed_run_continues_its_tensorboard_log(train, tmp_path, monkeypatch):
    """The steps after the last state, which are taken again, are there once."""
    with monkeypatch.context() as patch:
        patch.setattr("des.training.loop._check_weights", lambda model, where, at: at.done >= 5 and sys.exit("halted"))
        assert train(report_to=["tensorboard"], save_every_steps=1).code == 1
    assert train(report_to=["tensorboard"], save_every_steps=1, resume=[]).code == 0
    run_dir = tmp_path / "out/1e-05_0.3"
    assert (
        [step for step, _ in curves_of(run_dir)["total"]] == [step["step"] for step in steps_of(run_dir)] == [1, 2, 3, 4, 5, 6]
    )


def test_a_run_that_fails_before_its_first_step_keeps_the_curves(train, tmp_path, monkeypatch):
    assert train(report_to=["tensorboard"]).code == 0
    before = curves_of(tmp_path / "out/1e-05_0.3")
    monkeypatch.setattr("des.training.loop._losses", lambda *given: sys.exit("halted"))
    assert train(report_to=["tensorboard"]).code == 1
    assert curves_of(tmp_path / "out/1e-05_0.3") == before


def test_wandb_keeps_the_run_offline(fork, command, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = fork(*command(report_to=["wandb"], num_epochs=1))
    assert done.code == 0, done.err
    (record,) = (tmp_path / "out/1e-05_0.3/wandb").glob("offline-run-*/*.wandb")
    content = record.read_bytes()
    for name in steps_of(tmp_path / "out/1e-05_0.3")[0].keys() - {"step"}:
        assert content.count(name.encode()) >= 2, name  # of three steps; one may be cut by the end of a block


def test_without_an_account_wandb_stops_the_run_before_training(fork, command, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    done = fork(*command(report_to=["wandb"]))
    assert done.failed_in_one_sentence and "WANDB_MODE=offline" in done.err and "key" in done.err.split("WANDB_MODE")[0]
    assert not list((tmp_path / "out").rglob("checkpoint*"))


def test_a_tracker_that_is_not_installed(train, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = train(report_to=["tensorboard"])
    assert done.failed_in_one_sentence and "pip install tensorboard" in done.err
    assert not (tmp_path / "out").exists()
