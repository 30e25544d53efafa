"""Resumed runs end with the same bytes as uninterrupted ones."""

import json
import os
from pathlib import Path

from des.data.prompts import read_prompts
from des.models.encoders import TextEncoder, load_encoder
from des.training import loop as training
from des.training.codebook import Codebook, write_codebook
from des.training.targets import find_targets

import pytest
import torch
from conftest import GOLDEN, ROOT, flags, launch_and_halt, snapshot

CASE = GOLDEN / "A"


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(str(CASE / "model"))


@pytest.fixture(scope="module")
def codebook(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codebook") / "cb"
    write_codebook(folder, encoder, read_prompts(CASE / "safe.csv"))
    return folder


def options(codebook, out, **changes):
    """The command line of case A: twelve pairs, three steps an epoch."""
    return flags(
        **{
            "model_path": CASE / "model", "device": "cpu", "codebook_dir": codebook, "unsafe_csv_path": CASE / "unsafe.csv",
            "safe_csv_path": CASE / "safe.csv", "output_dir": out, "num_epochs": 2, "batch_size": 5, "learning_rate": "1e-3",
            "concept_guidance_scale": 20,
        } | changes
    )  # fmt: skip


@pytest.fixture
def train(call, codebook, tmp_path):
    return lambda out="out", **changes: call("train_des.py", *options(codebook, tmp_path / out, **changes))


@pytest.fixture(scope="module")
def whole(codebook, tmp_path_factory):
    """The run folder of a training that was not interrupted."""
    import train_des

    out = tmp_path_factory.mktemp("whole")
    train_des.main(list(map(str, options(codebook, out))))
    return out / "0.001_0.3"


def stop_after(monkeypatch, steps):
    """Interrupt the next training after some of its steps, as Ctrl-C does."""
    losses, calls = training._losses, iter(range(steps))

    def interrupted(*given):
        if next(calls, None) is None:
            monkeypatch.setattr(training, "_losses", losses)
            raise KeyboardInterrupt
        return losses(*given)

    monkeypatch.setattr(training, "_losses", interrupted)


def results(run):
    """What an interruption must not change: checkpoints, losses, the final summary, and each epoch's mean losses."""
    content = {path.name: path.read_bytes() for path in run.iterdir() if path.name not in ("train.log", "state.pt")}
    for name in [name for name in content if name.endswith("-metadata.json")]:
        content[name] = {key: value for key, value in json.loads(content[name]).items() if key != "made_by"}
    log = [line[9:] for line in (run / "train.log").read_text().splitlines()]
    return content | {
        "epochs": sorted({line for line in log if line.startswith("epoch ") and "/2  " in line and "step" not in line})
    }


@pytest.mark.parametrize(("steps", "every", "state"), [(2, 1, 2), (5, 2, 4), (3, None, 3), (5, None, 3)])
def test_resumed_training_ends_with_the_same_bytes(train, tmp_path, monkeypatch, whole, steps, every, state):
    stop_after(monkeypatch, steps)
    stopped = train(save_every_steps=every)
    assert stopped.code != 0 and "interrupted" in stopped.err
    run = tmp_path / "out/0.001_0.3"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == steps
    done = train(save_every_steps=every, resume=[])
    assert done.code == 0 and f"resuming after step {state}" in done.err, done.err
    assert results(run) == results(whole)
    assert not (run / "state.pt").exists()


@pytest.mark.parametrize("optimizer", ["adamw_bf16_sr", "adamw8bit"])
def test_dropout_and_stochastic_rounding_resume_identically(call, family, tmp_path, monkeypatch, optimizer):
    model = family("flux")
    write_codebook(tmp_path / "cb", load_encoder(str(model), 2), read_prompts(CASE / "safe.csv"))

    def train(out, **more):
        changes = {"model_path": model, "text_encoder_idx": 2, "optimizer": optimizer, "save_every_steps": 1} | more
        return call("train_des.py", *options(tmp_path / "cb", tmp_path / out, **changes))

    assert train("whole").code == 0
    stop_after(monkeypatch, 2)
    assert train("out").code != 0
    torch.manual_seed(0)
    done = train("out", resume=[])
    assert done.code == 0 and "resuming after step 2" in done.err, done.err
    whole, ours = (tmp_path / f"{out}/encoder2_0.001_0.3" for out in ("whole", "out"))
    assert results(ours) == results(whole)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_killed_run_resumes_and_locks_its_folder_until_then(train, codebook, tmp_path):
    many = {"num_epochs": 20, "save_every": 20, "save_every_steps": 4}
    assert train("whole", **many).code == 0
    run = tmp_path / "out/0.001_0.3"
    script = ROOT / "train_des.py", *options(codebook, tmp_path / "out", **many)
    process = launch_and_halt(*script, stop_when=lambda: lines(run / "metrics.jsonl") >= 10)
    try:
        before = snapshot(tmp_path)
        second = train(**many, resume=[])
        assert second.failed_in_one_sentence and f"another process is making a training run in {run}" in second.err
        assert snapshot(tmp_path) == before
    finally:
        process.kill()
        process.communicate()
    assert lines(run / "metrics.jsonl") < 60 and (run / "state.pt").exists()
    done = train(**many, resume=[])
    assert done.code == 0 and "resuming after step" in done.err, done.err
    assert results(run) == results(tmp_path / "whole/0.001_0.3")


def test_the_state_of_another_run_is_refused_by_name(train, tmp_path, monkeypatch):
    stop_after(monkeypatch, 5)
    train()
    state = (tmp_path / "out/0.001_0.3/state.pt").read_bytes()
    for changes, named in {
        "seed (42, now 7)": {"seed": 7}, "batch_size (5, now 4)": {"batch_size": 4},
        "concept_prompt (nudity, now a bus) and another concept": {"concept_prompt": "a bus", "concept_guidance_scale": 19},
        "targets": {"recompute_targets": [], "target": "highest"},
    }.items():  # fmt: skip
        done = train(**named, resume=[])
        assert done.failed_in_one_sentence and f"another {changes}" in done.err, done.err
    assert (tmp_path / "out/0.001_0.3/state.pt").read_bytes() == state


def test_a_damaged_state_is_refused(train, tmp_path, monkeypatch):
    stop_after(monkeypatch, 5)
    train()
    path = tmp_path / "out/0.001_0.3/state.pt"
    state = path.read_bytes()
    middle = len(state) // 2
    for damaged in (state[:-100], b"", state[:middle] + bytes([state[middle] ^ 1]) + state[middle + 1 :]):
        path.write_bytes(damaged)
        done = train(resume=[])
        assert done.failed_in_one_sentence and "is damaged" in done.err, done.err
    torch.save({"model_state_dict": {}}, path)
    assert "not a state that this version can read" in train(resume=[]).err


def test_one_command_line_can_be_repeated(train, tmp_path, monkeypatch, whole):
    stop_after(monkeypatch, 2)
    assert "starting from scratch" in train(resume=[]).err
    assert "starting from scratch" in train(resume=[]).err  # no state was due in two steps
    run = tmp_path / "out/0.001_0.3"
    assert results(run) == results(whole)
    before = {name: data for name, data in snapshot(run).items() if name != "train.log"}
    again = train(resume=[])
    assert again.code == 0 and "nothing to do" in again.err
    other = train(resume=[], seed=7)
    assert other.failed_in_one_sentence and "another seed (42, now 7)" in other.err
    assert {name: data for name, data in snapshot(run).items() if name != "train.log"} == before


def test_without_resume_training_starts_from_scratch_and_says_so(train, tmp_path, monkeypatch, whole):
    stop_after(monkeypatch, 2)  # before any checkpoint
    train(seed=7, save_every_steps=1)
    done = train()
    assert done.code == 0 and "starts from scratch" in done.err
    stop_after(monkeypatch, 5)
    train()
    assert (tmp_path / "out/0.001_0.3/state.pt").exists()
    done = train()
    assert done.code == 0 and "starts from scratch" in done.err
    assert results(tmp_path / "out/0.001_0.3") == results(whole)


def test_a_folder_with_another_runs_checkpoints_is_refused_and_kept(train, tmp_path):
    assert train(num_epochs=3).code == 0
    run = tmp_path / "out/0.001_0.3"
    before = {name: data for name, data in snapshot(run).items() if name != "train.log"}
    for changes, named in {
        "concept_prompt (nudity, now a bus)": {"concept_prompt": "a bus"},
        "num_epochs (3, now 2) and another seed (42, now 7)": {"num_epochs": 2, "seed": 7},
    }.items():
        for resume in (None, []):
            done = train(resume=resume, **{"num_epochs": 3} | named)
            assert done.failed_in_one_sentence and f"another {changes}" in done.err, done.err
            assert {name: data for name, data in snapshot(run).items() if name != "train.log"} == before
    assert train(num_epochs=3).code == 0  # the same run may be made again
    for path in run.glob("*-metadata.json"):
        path.unlink()
    done = train(num_epochs=3)
    assert done.failed_in_one_sentence and "which is not recorded" in done.err


def test_a_run_that_fails_before_its_first_step_leaves_everything(train, tmp_path, monkeypatch):
    stop_after(monkeypatch, 5)
    train()
    run = tmp_path / "out/0.001_0.3"
    before = {name: data for name, data in snapshot(run).items() if name != "train.log"}
    assert {"state.pt", "metrics.jsonl"} <= before.keys()
    stop_after(monkeypatch, 0)
    assert train().code != 0
    assert {name: data for name, data in snapshot(run).items() if name != "train.log"} == before


def test_the_largest_seeds_train(train, tmp_path):
    for seed in (2**50, 2**63 - 1):
        done = train(f"out-{seed}", seed=seed, num_epochs=1)
        assert done.code == 0, done.err


def test_weights_that_are_not_finite_reach_no_checkpoint(train, tmp_path, monkeypatch):
    """A finite loss with a gradient that is not, in the last step of epoch 2."""
    losses, calls = training._losses, iter(range(100))

    def poisoned(encoder, *given):
        parts = losses(encoder, *given)
        if next(calls) == 5:
            parts["total"].register_hook(lambda grad: grad * torch.nan)
        return parts

    monkeypatch.setattr(training, "_losses", poisoned)
    done = train()
    assert done.failed_in_one_sentence
    assert "not finite after epoch 2, step 3" in done.err and "checkpoint-1.pt" in done.err
    run = tmp_path / "out/0.001_0.3"
    assert (run / "state.pt").exists() and not (run / "checkpoint-2.pt").exists()


def test_deterministic_algorithms(train, tmp_path, monkeypatch, whole):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        assert train(deterministic=[]).code == 0
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    assert results(tmp_path / "out/0.001_0.3") == results(whole)


def test_sharded_weights_have_no_states(train, tmp_path, monkeypatch):
    monkeypatch.setattr("des.utils.processes.Processes.sharded", True)
    for option in ({"resume": []}, {"save_every_steps": 1}):
        done = train(**option)
        assert done.failed_in_one_sentence and "FSDP" in done.err
    stop_after(monkeypatch, 5)
    train()
    run = tmp_path / "out/0.001_0.3"
    assert (run / "checkpoint-1.pt").exists() and not (run / "state.pt").exists()


@pytest.fixture
def encoded(monkeypatch):
    """Counts the prompts that the codebook has encoded, and interrupts after some batches when asked to."""
    encode, state = TextEncoder.encode, {"prompts": 0, "stop": None}

    def counted(self, prompts, batch_size, desc=None):
        for number, batch in enumerate(encode(self, prompts, batch_size, desc)):
            if desc and number == state["stop"]:
                raise KeyboardInterrupt
            state["prompts"] += len(batch) if desc else 0
            yield batch

    monkeypatch.setattr(TextEncoder, "encode", counted)
    return state


@pytest.mark.parametrize(("a_shard", "kept"), [(100, 6), (4, 6), (2, 6)])
def test_a_codebook_resumes_after_its_last_batch(tmp_path, encoder, encoded, a_shard, kept):
    prompts = read_prompts(CASE / "safe.csv")
    size = {"batch_size": 3, "shard_bytes": a_shard * 77 * 32 * 4}
    write_codebook(tmp_path / "whole", encoder, prompts, **size)
    encoded["stop"] = kept // 3
    with pytest.raises(KeyboardInterrupt):
        write_codebook(tmp_path / "cb", encoder, prompts, **size)
    assert not (tmp_path / "cb/codebook.json").exists()
    with max((tmp_path / "cb").glob("*.part")).open("ab") as file:
        file.write(b"bytes that were written, but not recorded, when the process died")
    encoded.update(prompts=0, stop=None)
    write_codebook(tmp_path / "cb", encoder, prompts, **size)
    assert encoded["prompts"] == len(prompts) - kept
    assert snapshot(tmp_path / "cb") == snapshot(tmp_path / "whole")


@pytest.mark.parametrize("change", ["prompts", "batch size", "damaged", "lost", "the second lost"])
def test_rows_of_something_else_are_not_continued(tmp_path, encoder, encoded, caplog, monkeypatch, change):
    monkeypatch.setattr("des.utils.logs.logger.propagate", True)
    prompts, size = read_prompts(CASE / "safe.csv"), {"batch_size": 3, "shard_bytes": 4 * 77 * 32 * 4}
    encoded["stop"] = 3
    with pytest.raises(KeyboardInterrupt):
        write_codebook(tmp_path / "cb", encoder, prompts, **size)
    encoded.update(prompts=0, stop=None)
    first = tmp_path / "cb/codebook-00001-of-00003.safetensors.part"
    if change == "prompts":
        prompts = [*prompts[:-1], "another one"]
    elif change == "batch size":
        size["batch_size"] = 2
    elif change == "damaged":
        first.write_bytes(first.read_bytes()[:-1] + b"?")
    else:
        (first if change == "lost" else first.with_name(first.name.replace("00001", "00002"))).unlink()
    write_codebook(tmp_path / "cb", encoder, prompts, **size)
    assert encoded["prompts"] == len(prompts) - (
        3 if "second" in change else 0
    )  # four rows stay; the batch of the fourth is made again
    assert "lost" in change or change in caplog.text
    write_codebook(tmp_path / "whole", encoder, prompts, **size)
    assert snapshot(tmp_path / "cb") == snapshot(tmp_path / "whole")


def test_the_search_for_targets_resumes_after_its_last_group(tmp_path, encoder, codebook, monkeypatch):
    unsafe, book = read_prompts(CASE / "unsafe.csv"), Codebook(codebook)
    find_targets(tmp_path / "whole.pth", book, encoder, unsafe, batch_size=3)  # in one group
    monkeypatch.setattr("des.training.targets.query_bytes", lambda device: 0)  # in groups of one batch
    farthest, searched = Codebook.farthest, []

    def interrupted(self, queries, nearest=False):
        if len(searched) == 2:
            raise KeyboardInterrupt
        searched.append(len(queries))
        return farthest(self, queries, nearest)

    monkeypatch.setattr(Codebook, "farthest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_targets(tmp_path / "t.pth", book, encoder, unsafe, batch_size=3)
    assert not (tmp_path / "t.pth").exists()
    monkeypatch.setattr(Codebook, "farthest", lambda *given: searched.append(len(given[1])) or farthest(*given))
    find_targets(tmp_path / "t.pth", book, encoder, unsafe, batch_size=3)
    assert sum(searched) == len(unsafe)
    one, other = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("t", "whole"))
    assert one["indices"].equal(other["indices"]) and one["hashes"] == other["hashes"]
    assert {path.name for path in tmp_path.iterdir()} == {"t.pth", "whole.pth", ".t.pth.lock", ".whole.pth.lock"}


def test_a_state_without_the_configuration_is_resumed_and_another_configuration_is_refused(train, tmp_path, monkeypatch, whole):
    stop_after(monkeypatch, 5)
    train()
    path = tmp_path / "out/0.001_0.3/state.pt"
    state = torch.load(path, weights_only=True)
    configuration = state["made_from"].pop("encoder configuration")
    torch.save(state | {"made_from": state["made_from"] | {"encoder configuration": configuration[::-1]}}, path)
    done = train(resume=[])
    assert done.failed_in_one_sentence and "another encoder configuration" in done.err
    torch.save(state, path)  # as an earlier version wrote it
    assert train(resume=[]).code == 0
    assert results(path.parent) == results(whole)
