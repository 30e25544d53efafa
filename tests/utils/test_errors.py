"""Errors about inputs that are missing."""

from pathlib import Path

from des.data.run_record import read_run
from des.utils import cli
from des.utils.errors import UserError, not_found

import pytest


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "run/checkpoint-2.pt",
            "does not exist in the current folder, {here} ({here}/run has checkpoint-20.pt, other.pt); try x",
        ),
        ("{here}/run/checkpoint-2.pt", "does not exist ({here}/run has checkpoint-20.pt, other.pt); try x"),
        ("runs/deep/checkpoint-2.pt", "does not exist in the current folder, {here} ({here} has run); try x"),
        ("unlike/checkpoint-2.pt", "does not exist in the current folder, {here}; try x"),
        ("run/checkpoint-20.pt/a.csv", "does not exist in the current folder, {here}; try x"),
        ("run", "is a folder, but a file is needed; try x"),
        ("run/other.pt", "is a file, but a folder is needed; try x"),
    ],
)
def test_a_missing_input_is_named_with_what_it_is_relative_to_and_what_lies_beside_it(tmp_path, monkeypatch, path, message):
    (tmp_path / "run").mkdir()
    for name in ("checkpoint-20.pt", "other.pt", "checkpoint-2.json", ".checkpoint-2.pt"):
        (tmp_path / "run" / name).touch()
    monkeypatch.chdir(tmp_path)
    path = path.format(here=tmp_path)
    assert str(not_found("the checkpoint", Path(path), "try x")) == f"the checkpoint {path} {message.format(here=tmp_path)}"


def test_a_missing_file_that_no_reader_expects_is_named_like_others(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.excepthook", None)
    (tmp_path / "reference.npz").touch()
    with pytest.raises(SystemExit) as stop:
        cli.run((tmp_path / "referense.npz").read_bytes)
    assert stop.value.code == f"error: the file {tmp_path}/referense.npz does not exist ({tmp_path} has reference.npz)"


def test_a_folder_of_runs_names_them(tmp_path):
    for name in ("run.json", "b/run.json"):
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "a" / name).touch()
    for folder, message in (
        (tmp_path, f"name one run, such as {tmp_path}/a, {tmp_path}/a/b"),
        (tmp_path / "aa", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            read_run(folder)
