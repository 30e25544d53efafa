"""Identities of files and folders, which any change of content changes, and the record of an output folder's inputs."""

import json
import os
import shutil

from des.tables.inputs import check_inputs, identity, model_identity, record_inputs
from des.utils.errors import UserError

import pytest
from conftest import GOLDEN


def rewrite(path, content):
    """Change a file's content, but neither its size nor its modification time."""
    status = path.stat()
    assert len(content) == status.st_size
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns


def test_a_file_changed_under_its_own_size_and_time(tmp_path):
    path = tmp_path / "prompts.pt"
    path.write_bytes(b"one")
    before = identity(path)
    assert identity(path) == before
    rewrite(path, b"two")
    assert identity(path) not in (before, None)
    rewrite(path, b"one")
    assert identity(path) == before
    assert identity(tmp_path / "nowhere") is None


def test_a_folder_of_images(tmp_path):
    folder = tmp_path / "reference"
    (folder / "more").mkdir(parents=True)
    for name in ("0.png", "1.PNG", "more/2.jpg"):
        (folder / name).write_bytes(name.encode())
    before = identity(folder)
    for name in ("classify.json", ".hidden.png", "notes.txt"):
        (folder / name).write_text("no image that counts")
    (folder / ".ipynb_checkpoints").mkdir()
    shutil.copy(folder / "0.png", folder / ".ipynb_checkpoints")
    assert identity(folder) == before
    rewrite(folder / "more/2.jpg", b"more/3.jpg")
    assert identity(folder) != before
    rewrite(folder / "more/2.jpg", b"more/2.jpg")
    assert identity(folder) == before
    (folder / "0.png").rename(folder / "3.png")
    assert identity(folder) != before
    (folder / "3.png").unlink()
    assert identity(folder) not in (before, None)


def test_a_models_folder_counts_its_configuration_and_labels(tmp_path):
    model = shutil.copytree(GOLDEN / "A/model", tmp_path / "model")
    (model / "model_index.json").write_text("{}")
    before = model_identity(str(model))
    config = model / "text_encoder/config.json"
    config.write_text(config.read_text().replace("quick_gelu", "gelu"))
    assert model_identity(str(model)) not in (before, "")
    assert model_identity("owner/no-such-model") == "owner/no-such-model"


def test_a_folders_inputs_may_be_added_to_and_not_changed(tmp_path):
    check_inputs(tmp_path, {"--scale": "smoke", "--seed": "42"})
    record_inputs(tmp_path, {"--scale": "smoke", "--seed": "42"})
    check_inputs(tmp_path, {"--scale": "smoke", "--checkpoint 1": "a" * 64})
    record_inputs(tmp_path, {"--scale": "smoke", "--checkpoint 1": "a" * 64})
    for changed, message in (
        ({"--seed": "7"}, "--seed was 42 and is now 7"),
        ({"--checkpoint 1": "b" * 64}, "is now bbbbbbbbbbbb"),
    ):
        with pytest.raises(UserError, match=message):
            check_inputs(tmp_path, {"--scale": "smoke"} | changed)


def test_the_seed_of_a_folder_of_an_earlier_version(tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/draw-plain-with-original.json").write_text(json.dumps({"argv": ["--seed", "42", "--batch_size", "4"]}))
    check_inputs(tmp_path, {"--scale": "small", "--seed": "42"})
    with pytest.raises(UserError, match="--seed was 42 and is now 43"):
        check_inputs(tmp_path, {"--scale": "small", "--seed": "43"})
