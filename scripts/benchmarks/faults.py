"""Inject faults into every long script and count what is lost; write docs/reliability.md.

    python scripts/benchmarks/faults.py --kills 60          # some minutes on two idle cores; Linux or macOS

Each script runs on the demo's models in a child process. It is killed (SIGKILL) at random moments and started again with the same
command; the last run is left to finish, and its files must then equal those of an undisturbed run. A limit on the size of files
simulates a full disk. Damaged files have flipped bits or lack their second half.
"""

import argparse
import json
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from des.utils import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    # fmt: off
    parser.add_argument("--kills", type=cli.positive_int, default=60, metavar="N", help="number of kills, divided among the scripts")
    parser.add_argument("--damages", type=cli.natural, default=4, metavar="N", help="files of each script to damage, each in two ways")
    parser.add_argument("--seed", type=cli.natural, default=0, metavar="S", help="seeds the moments of the kills and the damaged bytes")
    parser.add_argument("--out", type=cli.output_file, default=ROOT / "docs/reliability.md", metavar="F", help="Markdown page to write; the counts go into a .json file beside it")
    parser.add_argument("--skip_hostile", action=cli.Removed, instead="leave it out; scripts/test.sh runs the tests of hostile input")
    # fmt: on
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

import clipscore
import fid
import generate
import save_codebook
import train_des
from des.data import manifest
from des.data.images import is_complete
from des.data.prompts import read_rows
from des.models.loading import read_pt
from des.utils.files import result_paths, sha256_file, write_json, write_text
from tasks import img_batch_classify

import torch
from diffusers import StableDiffusionPipeline

# Loaded once here, because the child processes are forked from this one: what the scripts import, and what they load by name
LOADED = (clipscore, fid, generate, img_batch_classify, save_codebook, train_des, StableDiffusionPipeline)
MODELS = ROOT / "demo/models"
IMAGES = 12
LOGS = ("run.json", "train.log", "metrics.jsonl", ".lock")  # endings of files that change no result, and are not damaged


@dataclass(frozen=True)
class LongScript:
    """A script to interrupt: its command line for a folder, and the files of that folder that are its results."""

    path: str
    argv: Callable[[Path], list[object]]
    results: tuple[str, ...]  # glob patterns


@dataclass
class Count:
    """How often one kind of fault was injected, survived, lost finished work, or led to a wrong result."""

    injected: int = 0
    survived: int = 0
    lost: int = 0
    wrong: int = 0
    notes: list[str] = field(default_factory=list)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    numbers = result_paths(args.out).json
    cli.check_outputs([args.out, numbers], [])
    rng = random.Random(args.seed)
    counts: dict[str, Count] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        inputs = make_inputs(work)
        for number, (name, script) in enumerate(scripts(inputs).items()):
            reference, seconds = undisturbed(script, work / f"{name}-reference")
            share = args.kills // 6 + (number < args.kills % 6)
            counts[f"kill -9, {name}"] = killed(script, work / f"{name}-killed", reference, seconds, share, rng)
            counts[f"full disk, {name}"] = full_disk(script, work / f"{name}-disk", reference)
            counts[f"damaged files, {name}"] = damaged(script, work / f"{name}-reference", reference, args.damages, rng)
    write_text(args.out, page(args, counts))
    write_json(numbers, {name: vars(count) for name, count in counts.items()})
    print(page(args, counts))
    if any(count.lost or count.wrong or count.survived < count.injected for count in counts.values()):
        sys.exit("error: a fault was not survived, or something was lost; see the notes")


def make_inputs(work: Path) -> Path:
    """Short prompt lists, a codebook and images for the scripts that start from them."""
    inputs = work / "inputs"
    inputs.mkdir()
    for name, rows in {"safe_train": 320, "unsafe_train": 64, "benign": IMAGES}.items():
        read_rows(ROOT / f"datasets/demo_{name}.csv").head(rows).to_csv(inputs / f"{name}.csv", index=False)
    for script, argv in (
        ("save_codebook.py", ["--save_dir", inputs / "codebook", "--csv_path", inputs / "safe_train.csv"]),
        ("generate.py", drawing(inputs, inputs)),
    ):
        code, output = run(script, [*model(), *argv])
        if code != 0:
            sys.exit(f"error: {script} failed without any fault: {output}")
    return inputs


def model() -> list[object]:
    return ["--model_path", MODELS / "pipeline", "--device", "cpu"]


def drawing(inputs: Path, folder: Path) -> list[object]:
    return ["--prompts_csv", inputs / "benign.csv", "--output_path", "t2i", "--results_dir", folder, "--num_inference_steps", 3,
            "--guidance_scale", 3, "--batch_size", 2]  # fmt: skip


def scripts(inputs: Path) -> dict[str, LongScript]:
    """The six long scripts. A scorer works on a copy of the images in its own folder."""
    images, drawn = Path("images"), inputs / "none/pipeline/t2i"

    def training(folder: Path) -> list[object]:
        return [*model(), "--codebook_dir", inputs / "codebook", "--unsafe_csv_path", inputs / "unsafe_train.csv",
                "--safe_csv_path", inputs / "safe_train.csv", "--sampling_ratio", 0.2, "--output_dir", folder, "--num_epochs", 2,
                "--batch_size", 16, "--learning_rate", 1e-3, "--concept_prompt", "mushroom", "--concept_guidance_ratio", 0.3, "--resume",
                "--save_every_steps", 2]  # fmt: skip

    def on_images(path: str, argv: Callable[[Path], list[object]], *results: str) -> LongScript:
        def with_copy(folder: Path) -> list[object]:
            if not (folder / images).exists():
                shutil.copytree(drawn, folder / images)
            return argv(folder / images)

        return LongScript(path, with_copy, results)

    return {
        "save_codebook": LongScript(
            "save_codebook.py",
            lambda folder: [*model(), "--csv_path", inputs / "safe_train.csv", "--save_dir", folder / "codebook", "--batch_size", 16],
            ("codebook/*.safetensors",),
        ),
        "train_des": LongScript("train_des.py", training, ("*/checkpoint-*.pt", "*/metrics.jsonl", "safe_embeddings.pth")),
        "generate": LongScript("generate.py", lambda folder: [*model(), *drawing(inputs, folder)], ("none/pipeline/t2i/*.png",)),
        "img_batch_classify": on_images(
            "tasks/img_batch_classify.py",
            lambda folder: ["--job", "nudity", "--folder_dir", folder, "--devices", "cpu", "--batch_size", 2, "--num_workers", 1],
            "images/classify.json",
        ),
        "clipscore": on_images(
            "clipscore.py",
            lambda folder: ["--image_folder", folder, "--csv_file", inputs / "benign.csv", "--clip_model", MODELS / "clip", "--device", "cpu",
                            "--batch_size", 2],
            "images/clipscore.json", "images/clipscore.csv",
        ),
        "fid": on_images(
            "fid.py",
            lambda folder: ["--gen_imgs_path", folder, "--coco_imgs_path", drawn, "--feature_extractor", MODELS / "classifier_object",
                            "--device", "cpu", "--batch_size", 2],
            "images_fid.json",
        ),
    }  # fmt: skip


def run(script: str, argv: list[object], kill_after: float | None = None, file_limit: int | None = None) -> tuple[int, str]:
    """Run a script in a child of this process; returns its exit code (negative if it was killed) and the end of its output."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            torch.set_num_threads(1)
            if file_limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
            sys.argv = [str(ROOT / script), *map(str, argv)]
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            os.write(2, f"{stop.code}\n".encode())
        except BaseException as error:
            os.write(2, f"Traceback {error!r}\n".encode())
        finally:
            os._exit(code)
    os.close(writing)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    output = b""
    with os.fdopen(reading, "rb") as pipe:
        while part := pipe.read(65536):
            output = (output + part)[-2000:]
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), output.decode(errors="replace")


def contents(script: LongScript, folder: Path) -> dict[str, str]:
    """The results in a folder: the `content` of each file by its name."""
    paths = [path for pattern in script.results for path in sorted(folder.glob(pattern))]
    return {str(path.relative_to(folder)): content(path) for path in paths if not path.name.endswith("-metadata.json")}


def content(path: Path) -> str:
    """What two files of equal results share: JSON without `made_by`, the sum and norm of each tensor, or the file's hash."""
    if path.suffix == ".json":
        try:
            facts = json.loads(path.read_bytes())
        except ValueError:
            return "damaged"
        return json.dumps({name: value for name, value in facts.items() if name != "made_by"}, sort_keys=True)
    if path.suffix not in (".pt", ".pth"):
        return sha256_file(path)
    state = read_pt(path)
    if state is None:
        return "damaged"
    tensors = sorted(state.get("model_state_dict", state).items())
    return str([(name, each.double().sum().item(), each.double().norm().item()) for name, each in tensors if isinstance(each, torch.Tensor)])  # fmt: skip


def undisturbed(script: LongScript, folder: Path) -> tuple[dict[str, str], float]:
    """The results without any fault, and how long they took."""
    folder.mkdir()
    argv, start = script.argv(folder), time.monotonic()
    code, output = run(script.path, argv)
    if code != 0:
        sys.exit(f"error: {script.path} failed without any fault: {output}")
    return contents(script, folder), time.monotonic() - start


def finished(folder: Path) -> set[str]:
    """The finished work in a folder: images, lines of unfinished scores, and .pt files, each with its content."""
    pieces = set()
    for path in folder.rglob("*"):
        if path.name.endswith(".part.jsonl"):
            text = path.read_text(encoding="utf-8", errors="replace")
            pieces |= {f"{path}:{line}" for line in text.split("\n")[:-1]}
        elif path.suffix in (".png", ".pt", ".pth") and path.name != "state.pt" and not path.name.startswith("."):
            pieces.add(f"{path}:{content(path)}")
    return pieces


def damage_in_sight(folder: Path) -> list[str]:
    """Files under their final names that are incomplete, and images that differ from their line in the manifest."""
    bad = []
    lines = {place: manifest.read(place) for place in {path.parent for path in folder.rglob("*.png")}}
    for path in folder.rglob("[!.]*"):
        if path.suffix == ".png":
            recorded = lines[path.parent].get(path.name, {}).get("sha256")
            bad += [] if is_complete(path) and recorded == sha256_file(path) else [str(path)]
        elif path.suffix == ".json" and content(path) == "damaged":
            bad.append(str(path))
    return bad


def record_fault(count: Count, folder: Path, before: set[str], what: str, clean: bool = True) -> None:
    """Count a fault, and what it lost of the finished work `before` or left damaged; `clean` says whether the script ended well."""
    gone = before - finished(folder)
    lost = [
        piece for piece in gone if Path(piece.split(":")[0]).exists() or ".part" not in piece
    ]  # a result replaces its .part file
    bad = damage_in_sight(folder)
    count.injected += 1
    count.lost += len(lost)
    count.wrong += len(bad)
    count.survived += clean and not lost and not bad
    if lost or bad or not clean:
        count.notes.append(f"{what}, lost {lost}, damaged {bad}")


def killed(
    script: LongScript, folder: Path, reference: dict[str, str], seconds: float, kills: int, rng: random.Random
) -> Count:
    """Kill a script again and again at random moments, then let it finish."""
    count = Count()
    folder.mkdir()
    argv = script.argv(folder)
    while count.injected < kills:
        before = finished(folder)
        code, output = run(script.path, argv, kill_after=rng.uniform(0.05, 1.0) * seconds)
        if code == 0 and contents(script, folder) == reference:  # it ended before the signal came: start from an empty folder
            shutil.rmtree(folder)
            folder.mkdir()
            argv = script.argv(folder)
            seconds *= 0.9
        else:
            record_fault(count, folder, before, f"{script.path} ended with {code} after a kill: {output[-200:]}", code < 0)
    return settle(count, script, argv, folder, reference)


def settle(count: Count, script: LongScript, argv: list[object], folder: Path, reference: dict[str, str]) -> Count:
    """Let a script finish without faults, and compare its results with the undisturbed ones."""
    (code, output), found = run(script.path, argv), contents(script, folder)
    if code != 0 or found != reference:
        count.wrong += 1
        count.survived = 0
        differ = sorted(name for name in reference.keys() | found.keys() if reference.get(name) != found.get(name))
        count.notes.append(f"{script.path} ended with {code}, other results in {differ}: {output[-300:]}")
    return count


def full_disk(script: LongScript, folder: Path, reference: dict[str, str]) -> Count:
    """Run a script with growing limits on the size of its files, as on a disk with that much room, then without a limit."""
    count = Count()
    folder.mkdir()
    argv = script.argv(folder)
    for limit in (0, 300, 1500, 20_000):
        before = finished(folder)
        code, output = run(script.path, argv, file_limit=limit)
        if code == 0:  # this script needs no larger file
            break
        clean = code == 1 and "Traceback" not in output
        record_fault(count, folder, before, f"{script.path} with files of {limit} bytes: code {code}, {output[-200:]}", clean)
    return settle(count, script, argv, folder, reference)


def damaged(script: LongScript, folder: Path, reference: dict[str, str], files: int, rng: random.Random) -> Count:
    """Truncate files of the finished run in `folder`, and flip a bit in them: the script must repair them, or it or their reader refuse them."""
    count = Count()
    argv = script.argv(folder)
    names = [
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size and not path.name.endswith(LOGS)
    ]
    for path in rng.sample(names, min(len(names), files)):
        whole = path.read_bytes()
        for broken in (whole[: len(whole) // 2], flipped(whole, rng)):
            path.write_bytes(broken)
            code, output = run(script.path, argv)
            count.injected += 1
            repaired = code == 0 and contents(script, folder) == reference
            refused = (
                "error: " in output and "Traceback" not in output if code else path.suffix == ".pt" and read_pt(path) is None
            )
            count.survived += repaired or refused
            if not (repaired or refused):
                count.wrong += code == 0
                count.notes.append(f"{script.path} with a damaged {path.name}: code {code}, {output[-200:]}")
            path.write_bytes(whole)
    return settle(count, script, argv, folder, reference)


def flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def page(args: argparse.Namespace, counts: dict[str, Count]) -> str:
    """The table of all faults."""
    lines = [
        "# Reliability", "", f"Made by `python scripts/benchmarks/faults.py --kills {args.kills} --seed {args.seed}` on the demo's models, on CPU.", "",
        "A fault counts as survived if nothing was lost, no damaged file was left under its final name, and a run that was left to finish had "
        "the results of an undisturbed run: images, weights, codebook rows and scores are compared by their bytes or values. A full disk or a "
        "damaged file also counts as survived if the script stopped with a one-sentence error.", "",
        "| fault | injected | survived | data lost | wrong results |", "| --- | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    totals: dict[str, Count] = {}
    for name, count in counts.items():
        total = totals.setdefault(name.split(",")[0], Count())
        for part in ("injected", "survived", "lost", "wrong"):
            setattr(total, part, getattr(total, part) + getattr(count, part))
        lines.append(f"| {name} | {count.injected} | {count.survived} | {count.lost} | {count.wrong} |")
    lines += [f"| **all: {name}** | {c.injected} | {c.survived} | {c.lost} | {c.wrong} |" for name, c in totals.items()]
    notes = [f"- {name}: {note}" for name, count in counts.items() for note in count.notes]
    return "\n".join([*lines, "", *notes]) + "\n"


if __name__ == "__main__":
    cli.run(main)
