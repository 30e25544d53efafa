"""train.sh, generate.sh, evaluate.sh: every command that they would run is one that its script accepts."""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from des.data.prompts import read_prompts

import pytest
from conftest import ROOT

NAMES = {
    "sd15": ("sd15", ""),
    "sd35": ("sd35", ""),
    "flux": ("flux", ""),
    "multi": ("multi", ""),
    "vangogh": ("vangogh", ""),
    "demo": ("", "1"),
}


def commands(script: str, name: str) -> list[list[str]]:
    """The Python commands that a shell script prints with PRINT=1."""
    argument, demo = NAMES[name]
    environment = {**os.environ, "PRINT": "1", "DEMO": demo, "VIRTUAL_ENV": sys.prefix, "DEVICE": "cpu", "LIMIT": "5"}
    command = ["bash", str(ROOT / "scripts" / script), *([argument] if argument else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line)[1:] for line in done.stdout.splitlines() if line.startswith("python ")]


@pytest.fixture(scope="module")
def parsers():
    """`parse_args` of each script."""
    loaded = {}

    def parse(script: str, argv: list[str]):
        if script not in loaded:
            loaded[script] = runpy.run_path(str(ROOT / script))["parse_args"]
        return loaded[script](argv)

    return parse


@pytest.mark.parametrize("name", NAMES)
def test_each_command_is_accepted(parsers, name):
    paths = {}
    for script in ("train.sh", "generate.sh", "evaluate.sh"):
        found = commands(script, name)
        assert found
        for program, *argv in found:
            if program != "-c":
                args = parsers(program, argv)
                paths.setdefault(program, []).append(args)
    trained, drawn = paths["train_des.py"], paths["generate.py"]
    encoders = {"sd35": 3, "flux": 2}.get(name, 1)
    assert [args.text_encoder_idx for args in trained] == list(range(1, encoders + 1))
    assert {args.training_method for args in drawn} == {"none", "des"}
    last = f"checkpoint-{trained[0].num_epochs}.pt"
    folder = f"{trained[0].learning_rate}_{trained[0].lambda_safe}"
    protected = next(args for args in drawn if args.training_method == "des")
    given = [getattr(protected, option) for option in ("text_encoder_path", "text_encoder_2_path", "text_encoder_3_path")][
        :encoders
    ]
    expected = [
        args.output_dir / (folder if encoders == 1 else f"encoder{args.text_encoder_idx}_{folder}") / last for args in trained
    ]
    assert given == expected
    images = {args.results_dir / args.training_method / Path(args.model_path).name / args.output_path for args in drawn}
    scorers = ("tasks/img_batch_classify.py", "tasks/img_batch_classify_q16.py")
    scored = {args.folder_dir for scorer in scorers for args in paths.get(scorer, [])} | {
        args.image_folder for args in paths["clipscore.py"]
    }
    assert scored == images


def test_the_papers_settings(parsers):
    (args,) = [parsers(program, argv) for program, *argv in commands("train.sh", "sd15") if program == "train_des.py"]
    assert (args.num_epochs, args.learning_rate, args.batch_size, args.lambda_safe) == (2, 1e-5, 128, 0.3)
    assert (args.concept_prompt, args.concept_guidance_scale, args.ablation) == (["nudity"], 200.0, [1, 2, 3])


def test_other_concepts_in_the_papers_words(parsers):
    for name, concept in {"multi": "nudity, violence, illegal", "vangogh": "Van Gogh"}.items():
        (args,) = [parsers(program, argv) for program, *argv in commands("train.sh", name) if program == "train_des.py"]
        assert args.concept_prompt == [concept] and args.unsafe_csv_path.name == f"{name}_unsafe.csv"


def test_van_gogh_is_tested_on_the_published_prompts(parsers):
    """Its training lists leave the test list out, which is fetched, and the classifier's label is the one that it has."""
    trained, drawn, scored = (list(commands(f"{script}.sh", "vangogh")) for script in ("train", "generate", "evaluate"))
    assert all(words[words.index("--test") + 1] == "0" for words in trained if "datasets/style_prompts.py" in words)
    assert ["datasets/download.py", "vangogh_test"] in drawn or (ROOT / "datasets/vangogh_test.csv").exists()
    labels = [words[words.index("--cls_class") + 1] for words in scored if "--cls_class" in words]
    assert labels and set(labels) == {"vincent-van-gogh"}


def test_lists_are_joined_by_their_prompts(tmp_path):
    names = ["demo_plain", "demo_unsafe_train"]  # with other columns, and without
    lists = " ".join(f"datasets/{name}.csv" for name in names)
    command = ["bash", "-c", f"source scripts/settings.sh; join {tmp_path}/joined.csv {lists}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "VIRTUAL_ENV": sys.prefix})
    assert done.returncode == 0, done.stderr
    expected = [prompt for name in names for prompt in read_prompts(ROOT / f"datasets/{name}.csv")]
    assert read_prompts(tmp_path / "joined.csv") == expected


def test_an_unknown_model_is_refused():
    done = subprocess.run(["bash", str(ROOT / "scripts/train.sh"), "sd9"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: sd9 is none of")


def shell(*command: str, **environment: str) -> subprocess.CompletedProcess:
    given = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CDPATH")} | environment
    return subprocess.run(command, capture_output=True, text=True, env=given, cwd=ROOT)


@pytest.mark.parametrize("script", ["train.sh", "generate.sh", "evaluate.sh", "quickstart.sh", "test.sh"])
def test_help_and_sh_answer_in_one_step(script):
    """--help prints the comment at the script's top before anything is installed; another shell than bash is refused in one line."""
    done = shell("bash", f"scripts/{script}", "--help")
    assert done.returncode == 0 and not done.stderr
    assert (ROOT / "scripts" / script).read_text().splitlines()[1] == f"# {done.stdout.splitlines()[0]}"
    if shutil.which("dash"):
        done = shell("dash", f"scripts/{script}")
        assert done.returncode == 1 and done.stderr == f"error: this script needs bash; run: bash scripts/{script}\n"


def test_printing_installs_nothing():
    done = shell("bash", "scripts/train.sh", "sd15", PRINT="1", PATH="/usr/bin:/bin")
    assert done.returncode == 0 and "Installing" not in done.stdout + done.stderr and "train_des.py" in done.stdout


def test_two_epochs_of_the_demo_are_two():
    for given, epochs in ({"EPOCHS": "2"}, "2"), ({}, "20"):
        done = shell("bash", "scripts/train.sh", PRINT="1", DEMO="1", **given)
        assert f"--num_epochs {epochs} " in done.stdout


def test_cdpath_changes_no_folder(tmp_path):
    (tmp_path / "scripts").mkdir()
    done = shell("bash", "scripts/train.sh", PRINT="1", DEMO="1", CDPATH=str(tmp_path))
    assert done.returncode == 0 and done.stdout.startswith("python save_codebook.py")


def test_a_virtual_environment_that_is_gone_is_not_used(tmp_path):
    """The system's own Python is never installed into: a folder without an environment counts as none."""
    code = 'source scripts/env.sh; find_python() { fail "would make .venv"; }; rm() { :; }; use_environment requirements.txt'
    if (ROOT / ".venv").exists():
        pytest.skip("this checkout has an environment of its own")
    done = shell("bash", "-c", code, VIRTUAL_ENV=str(tmp_path / "gone"))
    assert done.returncode == 1 and "where no Python environment is" in done.stderr and "would make .venv" in done.stderr
