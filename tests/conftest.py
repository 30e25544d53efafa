"""What the tests share: running the scripts, and tiny models of the real classes."""

import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest
import torch
from forks import Forks
from loopback import Server
from tiny import build
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path.insert(0, str(ROOT))
FOLDERS = (ROOT, *(ROOT / name for name in ("tasks", "datasets", "scripts", "scripts/benchmarks", "scripts/attacks", "demo")))
SCRIPTS = [  # every program with a command line, by its path below ROOT
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in sorted(folder.glob("*.py"))
    if "\ndef parse_args(" in path.read_text(encoding="utf-8")
]


@dataclass
class Finished:
    """How a script ended."""

    code: int
    out: str
    err: str

    @property
    def failed_in_one_sentence(self) -> bool:
        """Whether it stopped with a non-zero code and one line that says why."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ") or ": error: " in line]
        return self.code != 0 and len(lines) == 1 and "Traceback" not in self.err


@pytest.fixture
def call(capfd, monkeypatch):
    """Run a script as `__main__` in this process, with its command line; returns how it ended."""

    def run(script: str, *argv: object) -> Finished:
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *map(str, argv)])
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        out, err = capfd.readouterr()
        return Finished(code, out, err)

    return run


@pytest.fixture
def codebook(call, tmp_path) -> Path:
    """The codebook of golden case A, in tmp_path/cb."""
    case = GOLDEN / "A"
    options = {"model_path": case / "model", "device": "cpu", "csv_path": case / "safe.csv", "save_dir": tmp_path / "cb"}
    done = call("save_codebook.py", *flags(**options))
    assert done.code == 0, done.err
    return tmp_path / "cb"


def drawn(done):
    """Return how generate.py ended; skip the test where it refuses FLUX and Chroma, because torch is older than 2.5."""
    if "needs torch 2.5" in done.err and torch.__version__.startswith("2.4."):
        assert done.failed_in_one_sentence
        pytest.skip(done.err)
    return done


def flags(**options: object) -> list[object]:
    """A command line: `--key value`, several values for a list, a bare flag for an empty one, nothing for None."""
    given = {key: value if isinstance(value, list) else [value] for key, value in options.items() if value is not None}
    return [part for key, values in given.items() for part in (f"--{key}", *values)]


def training_line(tmp_path: Path, **changes: object) -> list[object]:
    """train_des.py on golden case A with the `codebook` in `tmp_path`: two epochs of three steps, with changed options."""
    case = GOLDEN / "A"
    options = {
        "model_path": case / "model", "device": "cpu", "codebook_dir": tmp_path / "cb", "unsafe_csv_path": case / "unsafe.csv",
        "safe_csv_path": case / "safe.csv", "output_dir": tmp_path / "out", "num_epochs": 2, "batch_size": 5,
    } | changes  # fmt: skip
    return ["train_des.py", *flags(**options)]


def spawn(script: str, *argv: object, cwd: Path = ROOT) -> Finished:
    """Run a script in a separate process."""
    command = [sys.executable, str(ROOT / script), *map(str, argv)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ)
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs scripts in processes that need not import the libraries."""
    process = Forks()
    yield process
    process.close()


@pytest.fixture
def fork(forks, tmp_path) -> Callable[..., Finished]:
    """Run a script in a separate process, or in `count` processes as `accelerate launch` does; returns how they ended.

    `shards` holds further options for each of several processes, which run at the same time.
    """

    def run(script: str | Path, *argv: object, count: int = 1, shards: Sequence[Sequence[object]] = ()) -> Finished:
        output = Path(tempfile.mkdtemp(dir=tmp_path.parent)) / "fork"
        lines = [[str(ROOT / script), *map(str, (*argv, *shard))] for shard in shards or [()] * count]
        codes = forks.run(lines, tmp_path, output, launched=count > 1)
        out, err = (output.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
        return Finished(max(codes, key=abs), out, err)

    return run


def launch_and_halt(*argv: object, stop_when: Callable[[], bool], timeout: float = 120) -> subprocess.Popen:
    """Start Python with a command line, and halt it (SIGSTOP) as soon as `stop_when()` holds; the caller kills it."""
    process = subprocess.Popen(
        [sys.executable, *map(str, argv)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + timeout
    while not stop_when():
        assert process.poll() is None and time.monotonic() < until, "it ended, or took too long, before it could be halted"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGSTOP)
    return process


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium, driven by selenium; without it tests of pages are skipped, or fail under DES_NEEDS_BROWSER."""
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if not all(programs) and not os.environ.get("DES_NEEDS_BROWSER"):
        pytest.skip("Debian's chromium and chromium-driver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0] or "chromium"
    for switch in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
                   "disable-component-update", "disable-sync", "window-size=1280,900", "force-device-scale-factor=1",
                   f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):  # fmt: skip
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1] or "chromedriver"))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Put folders into a cache of the hub, as the revisions of a repository; HF_HUB_OFFLINE is set, so nothing else is read."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    from des.models import encoders, model_files

    encoders._hub_index.cache_clear()
    model_files._hub_names.cache_clear()

    def store(hub_id: str, revisions: dict[str, Path]) -> None:
        repository = tmp_path / "hub" / f"models--{hub_id.replace('/', '--')}"
        for i, (revision, folder) in enumerate(revisions.items()):
            commit = f"{i:040x}"
            (repository / "refs").mkdir(parents=True, exist_ok=True)
            (repository / "refs" / revision).write_text(commit)
            for file in folder.rglob("*.*"):
                link = repository / "snapshots" / commit / file.relative_to(folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file)

    return store


@contextmanager
def serving() -> Iterator[Server]:
    """Run a server on loopback inside the `with` block."""
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def loopback(monkeypatch):
    """A server on loopback, for downloads that try again at once."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("des.data.downloads.PAUSE", 0)
    with serving() as server:
        yield server


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its content, except locks and unfinished scores."""
    temporary = (".lock", ".part.jsonl")
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(temporary)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def family(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a family's tiny pipeline (tests/tiny.py), built once."""
    folder = tmp_path_factory.mktemp("families")
    return lambda name: folder / name if (folder / name).is_dir() else build(name, folder / name)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> Path:
    """A StableDiffusionPipeline with random weights and 16x16 images; its text encoder and tokenizer are those of golden case A."""
    return build("sd_v1", tmp_path_factory.mktemp("models") / "tiny-sd")


@pytest.fixture(scope="session")
def other_width(tmp_path_factory) -> Path:
    """A folder with a text encoder of another width and the same tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "other-width"
    shutil.copytree(GOLDEN / "A/model/tokenizer", folder / "tokenizer")
    config = CLIPTextConfig.from_pretrained(GOLDEN / "A/model/text_encoder")
    config.hidden_size = 64
    torch.manual_seed(1)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture
def protected_checkpoint(tiny_pipeline, tmp_path) -> Path:
    """A checkpoint in the published form whose weights differ from the tiny pipeline's."""
    state = torch.load(published_form(tiny_pipeline, tmp_path / "checkpoint-2.pt"), weights_only=True)
    state["model_state_dict"] = {name: tensor + 0.05 for name, tensor in state["model_state_dict"].items()}
    torch.save(state, tmp_path / "checkpoint-2.pt")
    return tmp_path / "checkpoint-2.pt"


def published_form(model: Path, path: Path) -> Path:
    """Write a model's own text encoder as transformers 4.x and the published checkpoints name it."""
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder")
    state = {f"text_model.{name.removeprefix('text_model.')}": tensor.clone() for name, tensor in encoder.state_dict().items()}
    torch.save({"model_state_dict": state, "epoch": 2}, path)
    return path
