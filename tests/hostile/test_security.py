"""What SECURITY.md promises: no code from files, no network, no secrets and no prompts in what is logged."""

import ast
import contextlib
import io
import json
import runpy
import socket
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from conftest import GOLDEN, ROOT, Finished, flags

MARKER = "zyzzyva"  # in every prompt
SECRET = "hf_" + "Secret" * 6
MODELS = ROOT / "demo/models"
FOLDER = "mit Leerzeichen/ünï 図"

# ---------------------------------------------------------------- the code


def dotted(node):
    """`a.b.c` of an expression that is one, else its last name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(source):
    """The lines of Python code that would start a shell, run code from a file or trust that of a model."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                if f"{node.module}.{name.name}" in {"torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "os.system", "numpy.load"}:  # fmt: skip
                    found.append(f"{node.lineno}: from {node.module} import {name.name}")
        if not isinstance(node, ast.Call):
            continue
        name, given = dotted(node.func), {word.arg: word.value for word in node.keywords}

        def is_constant(option, value, given=given):
            return isinstance(given.get(option), ast.Constant) and given[option].value is value

        runs = {"pickle.load", "pickle.loads", "pickle.Unpickler", "os.system", "os.popen", "eval", "exec", "marshal.loads", "joblib.load"}  # fmt: skip
        wrong = name in runs or (name in ("torch.load", "torch.jit.load") and not is_constant("weights_only", True))
        wrong |= any(
            option in given and not is_constant(option, False) for option in ("shell", "trust_remote_code", "allow_pickle")
        )
        if wrong:
            found.append(f"{node.lineno}: {name}({', '.join(map(str, given))})")
    return found


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)", "pickle.load(file)",
        "pickle.loads(data)", "pickle.Unpickler(file).load()", "subprocess.run(command, shell=True)", "eval(text)", "os.system(command)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)", "np.load(path, allow_pickle=True)", "from pickle import loads",
        "subprocess.run(command, shell=flag)", "from torch import load",
    ],
)  # fmt: skip
def test_the_check_finds_what_it_looks_for(line):
    assert len(faults(line)) == 1


def test_the_check_lets_pass_what_is_safe():
    lines = ["torch.load(path, weights_only=True)", "np.load(file, allow_pickle=False)", "subprocess.run(command, shell=False)"]
    assert not faults("\n".join([*lines, "model.eval()", "pickle.dumps(content)", "class A(pickle.Unpickler):\n    pass"]))


FILES = sorted(
    path for top in ("", "des", "tasks/", "scripts", "demo", "datasets", "tests") for path in (ROOT / top).glob("**/*.py" if top else "*.py")
)  # fmt: skip


def test_no_code_starts_a_shell_or_runs_what_a_file_holds():
    assert len(FILES) > 90
    found = {str(path.relative_to(ROOT)): faults(path.read_text(encoding="utf-8")) for path in FILES}
    assert not {path: lines for path, lines in found.items() if lines}


def test_the_only_unpickler_is_the_restricted_one():
    """des/evaluation/detectors/q16.py reads an old pickle of numbers by a class that refuses everything else (tests/evaluation/test_q16.py)."""
    users = [path for path in FILES if "tests" not in path.parts and "pickle" in imports(path)]
    assert users == [ROOT / "des/evaluation/detectors/q16.py"]


def imports(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {name.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for name in node.names}


# ---------------------------------------------------------------- a whole run


def run_script(script, **options):
    """Run a script as `__main__` in this process; returns how it ended."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = [str(ROOT / script), *map(str, flags(**options))]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", argv)
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as stop:
            print(stop.code, file=sys.stderr)
            code = 1
    return Finished(code, out.getvalue(), err.getvalue())


def write_prompts(path, count, long=False):
    prompts = [f"{MARKER} a red ball {row}" for row in range(count)] + [f"{MARKER} {'very ' * 100}long"] * long
    path.write_text("prompt,colour\n" + "".join(f'"{prompt}",red\n' for prompt in prompts))


def forbid_network(patch):
    """Let every connection and look-up of a name fail, with the libraries set to online mode; returns a list of attempts."""
    tries = []

    def refuse(*what, **_):
        tries.append(what)
        raise AssertionError("a script tried to reach the network")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo"), (socket, "create_connection")):  # fmt: skip
        patch.setattr(owner, name, refuse)
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    patch.setenv("HF_TOKEN", SECRET)
    return tries


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, tiny_pipeline):
    """Every script once, by relative paths in a folder with an odd name, without a network; returns the folder and how each ended."""
    folder = tmp_path_factory.mktemp("run") / FOLDER
    (folder / "here").mkdir(parents=True)
    for name, count in (("safe", 4), ("unsafe", 3), ("test", 3)):
        write_prompts(folder / f"{name} prömpts.csv", count, long=True)
    torch.manual_seed(0)
    torch.save(torch.randn(2, 64), folder / "q16.pt")
    lists = {"safe_csv_path": "../safe prömpts.csv", "unsafe_csv_path": "../unsafe prömpts.csv"}
    images, protected = "results/none/tiny-sd/t2i x", "results/des/tiny-sd/t2i x"
    test, cpu, scored = "../test prömpts.csv", {"device": "cpu"}, {"devices": "cpu", "folder_dir": images}
    drawing = {"model_path": tiny_pipeline, "output_path": "t2i x", "prompts_csv": test, "num_inference_steps": 1} | cpu
    des = {"training_method": "des", "text_encoder_path": "out/0.01_0.3/checkpoint-1.pt"}
    training = {"codebook_dir": "cb x", "output_dir": "out", "num_epochs": 1, "learning_rate": "1e-2", "batch_size": 4}
    classifying = {"classifier": MODELS / "classifier_object", "cls_class": "ball", "csv_path": test}
    q16 = {"clip_model": MODELS / "clip", "prompts_file": "../q16.pt"}
    steps = {
        "codebook": ("save_codebook.py", {"model_path": GOLDEN / "A/model", "csv_path": lists["safe_csv_path"], "save_dir": "cb x"} | cpu),
        "training": ("train_des.py", {"model_path": GOLDEN / "A/model"} | training | lists | cpu),
        "some images": ("generate.py", drawing | {"end_idx": 2}),
        "all images": ("generate.py", drawing | {"log_prompts": []}),
        "protected": ("generate.py", drawing | des),
        "classify": ("tasks/img_batch_classify.py", classifying | scored),
        "q16": ("tasks/img_batch_classify_q16.py", q16 | scored),
        "nudity": ("tasks/img_batch_classify.py", {"job": "nudity", "csv_path": test} | scored),
        "clipscore": ("clipscore.py", {"image_folder": images, "csv_file": test, "clip_model": MODELS / "clip"} | cpu),
        "fid": ("fid.py", {"gen_imgs_path": protected, "coco_imgs_path": images, "feature_extractor": MODELS / "classifier_object"} | cpu),
        "plan": ("scripts/reproduce.py", {"table": "T2", "model_path": MODELS / "pipeline", "scale": "smoke", "dry_run": [], "out": "tables"} | cpu),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "here")
        tries = forbid_network(patch)
        ended = {name: run_script(script, **options) for name, (script, options) in steps.items()}
    assert not tries
    return folder, ended


def test_every_script_works_without_a_network_in_a_folder_with_an_odd_name(whole_run):
    folder, ended = whole_run
    assert {name: done.err for name, done in ended.items() if done.code} == {}
    assert len(list((folder / "here").rglob("*.png"))) == 8
    for name in ("classify", "q16", "nudity"):
        assert "/4 = " in ended[name].out
    assert "4 images" in ended["clipscore"].out and "FID" in ended["fid"].out


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_id_needs_the_network_and_says_so_offline(tmp_path, monkeypatch, offline):
    """With HF_HUB_OFFLINE nothing is tried; without it the check above sees the try, so it is no empty one."""
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "p.csv", 1)
    tries = forbid_network(monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    options = {"model_path": "nobody/nothing", "csv_path": "p.csv", "save_dir": "cb", "device": "cpu"}
    if offline:
        done = run_script("save_codebook.py", **options)
        assert done.failed_in_one_sentence and "nobody/nothing" in done.err and not tries
    else:
        with contextlib.suppress(AssertionError):
            run_script("save_codebook.py", **options)
        assert tries


def test_prompts_are_in_no_log_unless_asked_for(whole_run):
    folder, ended = whole_run
    output = {name: done.out + done.err for name, done in ended.items()} | {
        str(path): path.read_text() for path in folder.rglob("*.log")
    }
    assert any(name.endswith("train.log") for name in output)
    assert [name for name, text in output.items() if MARKER in text] == ["all images"]


def test_log_prompts_tells_row_and_prompt_as_they_are_drawn(whole_run):
    folder, ended = whole_run
    lines = [line.split(" ", 1)[1] for line in ended["all images"].err.splitlines() if MARKER in line]
    assert lines == [f"row 2: {MARKER} a red ball 2", f"row 3: {MARKER} {'very ' * 100}long"]  # rows 0 and 1 were there
    record = json.loads((folder / "here/results/none/tiny-sd/t2i x/run.json").read_text())
    assert "log_prompts" not in record["settings"] and record["made_by"]["arguments"]["log_prompts"] is True


def test_a_token_is_neither_printed_nor_stored(whole_run):
    folder, ended = whole_run
    assert not [name for name, done in ended.items() if SECRET in done.out + done.err]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_security_md_says_what_it_must():
    text = (ROOT / "SECURITY.md").read_text()
    for part in ("does not protect", "weights", "private", "never drawn", "--log_prompts", "HF_HUB_OFFLINE"):
        assert part in text, part
    assert "@" not in text  # reports go through the repository, not to an address
    assert Path(ROOT / "docs/input.md").is_file()
