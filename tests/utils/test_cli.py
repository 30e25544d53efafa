"""What every command line offers: help that can be worked by, a log, and progress bars on a terminal only."""

import argparse
import fcntl
import os
import pty
import re
import shlex
import struct
import sys
import termios
from pathlib import Path

from des.utils import cli

import pytest
from conftest import GOLDEN, ROOT, SCRIPTS, flags, training_line

FOLDER = GOLDEN / "A"
LOGGING = [
    "save_codebook.py", "train_des.py", "generate.py", "clipscore.py", "fid.py", "tasks/img_batch_classify.py",
    "tasks/img_batch_classify_q16.py", "scripts/export.py", "scripts/report.py", "scripts/reproduce.py",
]  # fmt: skip


def example_of(script):
    """The first command of a script's help, with the CPU for every device."""
    text = (ROOT / script).read_text().split('"""')[1]
    example = re.search(rf"python {re.escape(script)}((?:.*\\\\\n)*.*)", text)[1].replace("\\\\\n", " ")
    return shlex.split(re.sub("cuda:0|(?<=--devices )0", "cpu", example), comments=True)


class _Parsed(BaseException):
    """Carries a script's parser, and what it made of a command line, out of the script."""


@pytest.fixture
def parsed(call, monkeypatch):
    """The parser of a script and its reading of a command line, before anything else is done."""

    def run(script, argv):
        def parse(parser, given=None):
            raise _Parsed(parser, parser.parse_known_args(given))

        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse)
            with pytest.raises(_Parsed) as caught:
                call(script, *argv)
        return caught.value.args

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_example_of_the_help_is_a_whole_command_line(parsed, script):
    argv = example_of(script)
    parser, (_, unknown) = parsed(script, argv)
    assert unknown == []
    options = [action for action in parser._actions if action.dest != "help" and action.help != argparse.SUPPRESS]
    assert [action.dest for action in options if not action.help] == []
    shown = " ".join(parser.format_help().split())
    assert not re.search(r"\(['\"]|PosixPath|\[\]", shown)  # Python's spelling of a tuple, a path or an empty list
    for action in options:
        if action.option_strings and hasattr(action.type, "range"):
            assert re.search(rf"{action.option_strings[0]} [^()]*\(?.*?{re.escape(action.type.range)}", shown), action.dest
    ungrouped = [action.dest for action in parser._optionals._group_actions if action.dest != "help"]
    assert len(options) < 7 or not ungrouped


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("--lr 1e-4", "unrecognized arguments: --lr 1e-4 (did you mean --learning_rate instead of --lr?); see --help"),
        ("--learning-rate=1", "unrecognized arguments: --learning-rate=1 (did you mean --learning_rate instead of --learning-rate?); see --help"),
        ("--steps 5 --lr 1", "unrecognized arguments: --steps 5 --lr 1 (did you mean --num_inference_steps instead of --steps, --learning_rate instead of --lr?); see --help"),
        ("--removed", "--removed was removed; use --out; see --help"),
        ("--remove_d", "unrecognized arguments: --remove_d; see --help"),  # like an option that is not in the help
        ("--wings 2 --learn x", "argument --learning_rate: invalid float value: 'x'; see --help"),  # an abbreviation
        ("--out x --oit y", "unrecognized arguments: --oit y; see --help"),  # like an option that is given already
        ("--out --help_me", "argument --out: expected one argument (did you mean --help instead of --help_me?); see --help"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_ends_in_one_line(capsys, monkeypatch, given, line):
    monkeypatch.setattr(sys, "argv", ["x.py", *given.split()])
    parser = cli.Parser("A script.")
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--out")
    parser.add_argument("--removed", action=cli.Removed, instead="use --out")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args()
    assert stop.value.code == 2 and capsys.readouterr().err == f"x.py: error: {line}\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_option_of_any_script_ends_in_one_line(call, script):
    done = call(script, *example_of(script), "--no_such_option")
    assert done.code == 2 and done.err == f"{Path(script).name}: error: unrecognized arguments: --no_such_option; see --help\n"


@pytest.mark.parametrize("script", LOGGING)
def test_log_file_is_offered(parsed, script):
    _, (args, _) = parsed(script, [*example_of(script), "--log_file", "x.log"])
    assert str(args.log_file) == "x.log"


def codebook_line(tmp_path, **changes):
    options = {"model_path": FOLDER / "model", "csv_path": FOLDER / "safe.csv", "save_dir": tmp_path / "cb", "device": "cpu"}
    return ["save_codebook.py", *flags(**options | changes)]


def test_a_log_file_keeps_every_run_and_its_error(call, tmp_path):
    log = tmp_path / "logs/all.log"
    assert call(*codebook_line(tmp_path, log_file=log)).code == 0
    failed = call(*codebook_line(tmp_path, log_file=log, csv_path=tmp_path / "none.csv"))
    assert failed.failed_in_one_sentence
    lines = log.read_text().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert any("codebook of 12 safe prompts" in line for line in lines) and lines[-1].endswith(
        failed.err.strip().splitlines()[-1]
    )


def test_a_file_that_is_no_log_is_left_alone(call, tmp_path):
    precious = tmp_path / "prompts.csv"
    precious.write_text("prompt\na cat\n")
    assert call(*codebook_line(tmp_path, log_file=precious)).failed_in_one_sentence
    assert precious.read_text() == "prompt\na cat\n" and not (tmp_path / "cb").exists()


def test_bars_are_for_terminals(call, codebook, tmp_path, monkeypatch):
    """On a terminal a bar shows step, rate, time left and losses; in a pipe there is none."""
    train = training_line(tmp_path, num_epochs=1)
    piped = call(*train)
    assert piped.code == 0 and "step/s" not in piped.err and "\r" not in piped.err
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))  # lines and columns
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        assert call(*train).code == 0
        terminal.write("\nend\n")
        terminal.flush()
        shown = ""
        while not shown.endswith("end\r\n"):
            shown += os.read(ours, 4096).decode(errors="replace")
    os.close(ours)
    assert re.search(r"training:.*3/3 \[\d\d:\d\d<\d\d:\d\d,.*step.*nen=.*sep=.*total=.*uen=", shown.replace("\n", " "))
