"""Two processes never write into one place, and a dead one keeps nobody out."""

import errno
import fcntl
import os

from des.utils.errors import UserError
from des.utils.locks import locked

import pytest
from conftest import GOLDEN, ROOT, flags, launch_and_halt, snapshot

HOLD = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path

from des.utils.locks import locked

folder = Path({folder!r})
with locked(folder / ".lock", "a codebook"), locked(folder / "rows", "images", 10, 5):
    (folder / "ready").touch()
    time.sleep(100)
"""


def test_a_lock_keeps_other_processes_out_until_its_holder_dies(call, tmp_path):
    folder = tmp_path / "cb"
    folder.mkdir()
    program = HOLD.format(root=str(ROOT), folder=str(folder))
    process = launch_and_halt("-c", program, stop_when=(folder / "ready").exists)
    command = flags(model_path=GOLDEN / "A/model", device="cpu", csv_path=GOLDEN / "A/safe.csv", save_dir=folder)
    try:
        before = snapshot(tmp_path)
        done = call("save_codebook.py", *command)
        assert done.failed_in_one_sentence and f"another process is making a codebook in {folder}" in done.err
        with locked(folder / "rows", "images", 0, 10), locked(folder / "rows", "images", 15, 5):
            pass
        for start_byte, length in ((14, 1), (0, 11), (0, 0)):
            with (
                pytest.raises(UserError, match="another process is making images"),
                locked(folder / "rows", "images", start_byte, length),
            ):
                pass
        assert snapshot(tmp_path) == before
    finally:
        process.kill()
        process.communicate()
    assert call("save_codebook.py", *command).code == 0
    (folder / "rows").unlink()
    with locked(folder / "rows", "images"):
        assert (folder / "rows").exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, caplog, code):
    def refuse(*given):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with caplog.at_level("WARNING", logger="des"), locked(tmp_path / ".lock", "its scores"):
        pass
    assert str(tmp_path / ".lock") in caplog.text and "its scores" in caplog.text


def test_other_errors_of_a_lock_are_not_passed_over(tmp_path, monkeypatch):
    def refuse(*given):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path / ".lock", "its scores"):
        pass


def test_without_fcntl_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("des.utils.locks.fcntl", None)
    with pytest.raises(UserError, match="WSL"), locked(tmp_path / ".lock", "its scores"):
        pass
