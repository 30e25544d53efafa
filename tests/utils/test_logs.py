"""Log files: each gets the lines of its script or training run, and no later ones."""

import logging

from des.utils.logs import logger, setup_logging
from des.utils.scripts import run_script

from conftest import training_line


def test_a_training_run_closes_its_log(call, codebook, tmp_path):
    """The log ends with the error, and lines that this process logs later are not in it."""
    done = call(*training_line(tmp_path, learning_rate="1e-30", num_epochs=1))
    log = next((tmp_path / "out").rglob("train.log"))
    before = log.read_text()
    assert done.failed_in_one_sentence and "error: training changed no weight" in before.splitlines()[-1]
    assert not [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
    logger.warning("another job")
    assert log.read_text() == before


def test_a_script_that_is_run_inside_another_leaves_its_log_open(monkeypatch, tmp_path):
    monkeypatch.setattr(logger, "handlers", [])
    setup_logging(tmp_path / "outer.log")
    run_script("datasets/download.py", "--list")
    logger.info("after the job")
    assert (tmp_path / "outer.log").read_text().endswith("after the job\n")
