"""Places where people run the scripts: notebooks, the current folder, machines without git, GPUs of others, or no internet."""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import generate
from des.evaluation.detectors.classifier import Classifier
from des.evaluation.results import check_place
from des.evaluation.scored_images import load_processor
from des.evaluation.text_image import JOBS
from des.models import encoders
from des.models.loading import loading
from des.training.codebook import codebook_folder
from des.utils import cli, hub
from des.utils.errors import UserError
from des.utils.files import write_json
from des.utils.provenance import provenance
from scripts import verify

import pytest
import torch
from conftest import GOLDEN
from huggingface_hub import constants, errors
from transformers import CLIPProcessor

NOWHERE = "nobody/no-model"


@pytest.fixture
def unreachable(monkeypatch):
    """A hub that refuses connections, as without internet; the number of times that it was asked is in the returned list."""
    from huggingface_hub.utils import get_session

    asked = []
    hub._ask_hub.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    head = get_session().head
    monkeypatch.setattr(
        "huggingface_hub.utils.get_session", lambda: argparse.Namespace(head=lambda *a, **k: (asked.append(a), head(*a, **k)))
    )
    yield asked
    hub._ask_hub.cache_clear()


@pytest.mark.parametrize(
    "load",
    [
        lambda: encoders.load_encoder(NOWHERE),
        lambda: load_processor(CLIPProcessor, NOWHERE),
        lambda: Classifier(NOWHERE, torch.device("cpu"), "objects", ["church"]),
        lambda: JOBS["imagereward"](None, {"processor": NOWHERE, "model": NOWHERE}, torch.device("cpu"), None),
    ],
    ids=["encoder", "processor", "classifier", "imagereward"],
)
def test_without_internet_the_hub_and_the_missing_model_are_named_within_seconds(unreachable, load):
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        load()
    assert time.monotonic() - started < 10
    for part in (
        NOWHERE,
        "the hub http://127.0.0.1:9 cannot be reached",
        "neither as a folder in the current folder, ",
        "nor in the cache",
    ):
        assert part in str(error.value)
    assert len(unreachable) == 1


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("GatedRepoError", "ask for it at http://127.0.0.1:9/owner/name, and set HF_TOKEN"),
        ("RepositoryNotFoundError", f"neither a folder in the current folder, {Path.cwd()}, nor a repository of the hub"),
        ("RevisionNotFoundError", "correct --revision"),
        ("EntryNotFoundError", "this file does not exist in the repository"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(unreachable, kind, advice):
    """In place of "401 Client Error.", the first line of the library's error."""
    refused = getattr(errors, kind)
    with pytest.raises(UserError) as error, loading("model_index.json of owner/name", "owner/name@v1"):
        raise refused.__new__(
            refused, "401 Client Error."
        )  # __init__ needs a response, of a class that differs between versions
    assert "401" not in str(error.value) and advice in str(error.value)


@pytest.mark.parametrize("source", ["./none", "/none", "demo/models/clp"])
def test_a_path_that_cannot_be_a_hub_id_asks_no_hub(unreachable, source):
    with pytest.raises(UserError, match=f"the model {re.escape(str(Path(source)))} does not exist"):
        load_processor(CLIPProcessor, source)
    assert not unreachable


def test_a_local_model_asks_no_hub(unreachable):
    encoders.load_encoder(str(GOLDEN / "A/model"))
    assert not unreachable and not hub.is_offline()


def test_a_script_drops_the_backend_of_a_notebook(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setenv("MPLBACKEND", "module://not_installed.backend_inline")
    cli.run(lambda: None)
    assert "MPLBACKEND" not in os.environ


def test_an_interruption_between_options_and_main_prints_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    cli.run(lambda: None)
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "interrupted; finished files are kept\n"
    sys.excepthook(ValueError, ValueError("other errors keep their traceback"), None)
    assert "ValueError: other errors" in capsys.readouterr().err


def test_the_current_folder_and_the_one_above_have_their_names(tmp_path, monkeypatch):
    (tmp_path / "runs/{a}").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs/{a}")
    for text, name in ((".", "{a}"), ("./", "{a}"), ("..", "runs"), ("../{a}/", "{a}"), ("../..", tmp_path.name), ("x/", "x")):
        assert cli.folder(text).name == cli.output_folder(text).name == Path(cli.model_source(text)).name == name
    for text in ("", " ", "/"):
        with pytest.raises(argparse.ArgumentTypeError):
            cli.folder(text)
    assert cli.model_source("owner/name") == "owner/name" and cli.model_source("") == ""


def test_braces_are_part_of_a_path(family):
    assert codebook_folder(Path("runs/{a}{i}{}"), str(family("flux")), 2) == Path("runs/{a}{i}{}_encoder2")


def test_without_git_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    args = argparse.Namespace(device=torch.device("cpu"))
    assert provenance(args)["git_commit"] == "unknown"


@pytest.mark.parametrize(
    ("launched", "asked", "used"),
    [
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "cuda:0", "cuda:1"),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, None, "cuda:1"),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "cpu", "cpu"),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "1"}, "cuda:0", "cuda:0"),
        ({}, "cuda:0", "cuda:0"),
    ],
)
def test_a_launched_process_touches_only_its_own_gpu(monkeypatch, launched, asked, used):
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    touched = []
    monkeypatch.setattr(torch, "empty", lambda *shape, device: touched.append(str(device)))
    args = cli.check_device(argparse.ArgumentParser(), argparse.Namespace(device=asked))
    assert touched == [used] == [str(args.device)]


def test_results_elsewhere_replace_only_those_of_the_same_images(tmp_path, monkeypatch):
    mine, out = tmp_path / "images", tmp_path / "out"
    result = out / "classify.json"
    check_place(out, mine, [result])
    write_json(result, {"made_by": {"arguments": {"folder_dir": mine}}})
    check_place(out, mine, [result])
    for content in ({"made_by": {"arguments": {"image_folder": tmp_path / "others"}}}, {"made_by": {"arguments": {}}}, [], {}):
        write_json(result, content)
        with pytest.raises(UserError, match="name another --output_dir"):
            check_place(out, mine, [result])
    check_place(None, out, [result])
    monkeypatch.setattr(os, "access", lambda path, mode: path != out)
    with pytest.raises(UserError, match=r"is read-only.*--output_dir"):
        check_place(None, out, [result])


@pytest.mark.parametrize("name", ["encoder_idx", "text_encoder_idx"])
def test_both_names_of_the_encoder_number_are_accepted(name):
    parser = argparse.ArgumentParser()
    cli.add_encoder_index(parser, name)
    assert "--encoder_idx" in parser.format_help() or name == "text_encoder_idx"
    for given in ("--encoder_idx", "--text_encoder_idx"):
        assert vars(parser.parse_args([given, "2"])) == {name: 2}
    assert vars(parser.parse_args([])) == {name: 1}


@pytest.mark.parametrize("prompt", ["-a cat", "--seed", "-1", "a cat"])
def test_verify_repeats_a_prompt_that_begins_with_a_dash(prompt):
    given = generate.parse_args([f"--prompt={prompt}", f"--negative_prompt={prompt}", "--output_path=x", "--device=cpu"])
    again = generate.parse_args([*verify.command(vars(given), {"row": 0}, keep_scoring=False), "--device=cpu"])
    assert (again.prompt, again.negative_prompt) == (prompt, prompt)
