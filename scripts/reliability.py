"""Inject faults into every long script and count what is lost; writes docs/reliability.md.

    python scripts/reliability.py --kills 60          # some minutes on two idle cores; Linux or macOS

Each script runs on the demo's models in a child process and is killed (SIGKILL) at random moments, started again with the same
command, and at last left to finish; its files must then be those of an undisturbed run. Full disks are simulated by a limit on the
size of files; damaged files by flipped and cut bytes; hostile input by the cases of tests/hostile/test_hostile.py.
"""

import argparse
import json
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from des.data import manifest
from des.data.images import is_complete
from des.data.prompts import read_rows
from des.models.loading import read_pt
from des.utils import cli
from des.utils.files import result_paths, sha256_file, write_json, write_text

import cv2
import diffusers
import onnxruntime
import torch
import transformers

LOADED = (cv2, diffusers, onnxruntime, transformers)  # so that children need not load them again
MODELS = ROOT / "demo/models"
IMAGES = 24
LOGS = ("run.json", "train.log", "metrics.jsonl", ".lock")  # these decide nothing


@dataclass(frozen=True)
class Long:
    """A long script: its command line in a folder, and the files there that are its results."""

    script: str
    argv: Callable[[Path], list[object]]
    results: tuple[str, ...]  # patterns


@dataclass
class Count:
    """What one kind of fault did."""

    injected: int = 0
    survived: int = 0
    lost: int = 0
    wrong: int = 0
    notes: list[str] = field(default_factory=list)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--kills", type=cli.positive_int, default=60, metavar="N", help="over all scripts")
    parser.add_argument(
        "--damages", type=cli.natural, default=4, metavar="N", help="files of each script to cut and to flip a bit in"
    )
    parser.add_argument("--seed", type=cli.natural, default=0, metavar="S", help="of the moments and bytes")
    parser.add_argument(
        "--out", type=cli.output_file, default=ROOT / "docs/reliability.md", metavar="F", help="Markdown page to write"
    )
    parser.add_argument("--skip_hostile", action="store_true", help="leave out the cases of the test suite")
    args = parser.parse_args(argv)
    numbers = result_paths(args.out).json
    cli.check_outputs([args.out, numbers], [])
    rng = random.Random(args.seed)
    counts: dict[str, Count] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        inputs = make_inputs(work)
        for number, (name, long) in enumerate(scripts(inputs).items()):
            reference, seconds = undisturbed(long, work / f"{name}-reference")
            share = args.kills // 6 + (number < args.kills % 6)
            counts[f"kill -9, {name}"] = killed(long, work / f"{name}-killed", reference, seconds, share, rng)
            counts[f"full disk, {name}"] = full_disk(long, work / f"{name}-disk", reference)
            counts[f"damaged files, {name}"] = damaged(long, work / f"{name}-damaged", reference, args.damages, rng)
    if not args.skip_hostile:
        counts["hostile input"] = hostile()
    write_text(args.out, page(args, counts))
    write_json(numbers, {name: vars(count) for name, count in counts.items()})
    print(page(args, counts))
    if any(count.lost or count.wrong or count.survived < count.injected for count in counts.values()):
        sys.exit("error: a fault was not survived, or something was lost; see the notes")


def make_inputs(work: Path) -> Path:
    """Short prompt lists, a codebook and images for the scripts that start from them."""
    inputs = work / "inputs"
    inputs.mkdir()
    for name, rows in {"safe_train": 900, "unsafe_train": 128, "benign": IMAGES}.items():
        read_rows(ROOT / f"datasets/demo_{name}.csv").head(rows).to_csv(inputs / f"{name}.csv", index=False)
    for script, argv in (
        ("save_codebook.py", ["--save_dir", inputs / "codebook", "--csv_path", inputs / "safe_train.csv"]),
        ("generate.py", drawing(inputs, inputs)),
    ):
        code, said = run(script, [*model(), *argv])
        if code != 0:
            sys.exit(f"error: {script} failed without any fault: {said}")
    return inputs


def model() -> list[object]:
    return ["--model_path", MODELS / "pipeline", "--device", "cpu"]


def drawing(inputs: Path, folder: Path) -> list[object]:
    return ["--prompts_csv", inputs / "benign.csv", "--output_path", "t2i", "--results_dir", folder, "--num_inference_steps", 3,
            "--guidance_scale", 3, "--batch_size", 2]  # fmt: skip


def scripts(inputs: Path) -> dict[str, Long]:
    """The six long scripts. Scorers work on a copy of the images, which the folder of a run holds from the start."""
    images, drawn = Path("images"), inputs / "none/pipeline/t2i"

    def training(folder: Path) -> list[object]:
        return [*model(), "--codebook_dir", inputs / "codebook", "--unsafe_csv_path", inputs / "unsafe_train.csv",
                "--safe_csv_path", inputs / "safe_train.csv", "--sampling_ratio", 0.2, "--output_dir", folder, "--num_epochs", 2,
                "--batch_size", 16, "--learning_rate", 1e-3, "--concept_prompt", "mushroom", "--concept_guidance_ratio", 0.3, "--resume",
                "--save_every_steps", 2]  # fmt: skip

    def on_images(script: str, argv: Callable[[Path], list[object]], *results: str) -> Long:
        def with_copy(folder: Path) -> list[object]:
            if not (folder / images).exists():
                shutil.copytree(drawn, folder / images)
            return argv(folder / images)

        return Long(script, with_copy, results)

    return {
        "save_codebook": Long(
            "save_codebook.py",
            lambda folder: [*model(), "--csv_path", inputs / "safe_train.csv", "--save_dir", folder / "codebook", "--batch_size", 16],
            ("codebook/*.safetensors",),
        ),
        "train_des": Long("train_des.py", training, ("*/checkpoint-*.pt", "*/metrics.jsonl", "safe_embeddings.pth")),
        "generate": Long("generate.py", lambda folder: [*model(), *drawing(inputs, folder)], ("none/pipeline/t2i/*.png",)),
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
    """Run a script in a child of this process; its exit code (negative where it was killed), and what it said at last."""
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
    said = b""
    with os.fdopen(reading, "rb") as pipe:
        while part := pipe.read(65536):
            said = (said + part)[-2000:]
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said.decode(errors="replace")


def contents(long: Long, folder: Path) -> dict[str, str]:
    """The results in a folder, by name: hashes of files, of scores without what says when and where they were made."""
    found = {}
    for pattern in long.results:
        for path in sorted(folder.glob(pattern)):
            name = str(path.relative_to(folder))
            if path.name.endswith("-metadata.json"):
                continue
            if path.suffix == ".json":
                try:
                    content = json.loads(path.read_bytes())
                except ValueError:
                    found[name] = "damaged"
                    continue
                content.pop("made_by", None)
                found[name] = json.dumps(content, sort_keys=True)
            elif path.suffix == ".pt" or path.suffix == ".pth":
                found[name] = tensors_of(path)
            else:
                found[name] = sha256_file(path)
    return found


def tensors_of(path: Path) -> str:
    """A hash of what a .pt file holds."""
    state = read_pt(path)
    if state is None:
        return "damaged"
    tensors = state.get("model_state_dict", state)
    return str([(name, tensor.double().sum().item(), tensor.double().norm().item()) for name, tensor in sorted(tensors.items())
                if isinstance(tensor, torch.Tensor)])  # fmt: skip


def undisturbed(long: Long, folder: Path) -> tuple[dict[str, str], float]:
    """The results without any fault, and how long they took."""
    folder.mkdir()
    argv, start = long.argv(folder), time.monotonic()
    code, said = run(long.script, argv)
    if code != 0:
        sys.exit(f"error: {long.script} failed without any fault: {said}")
    return contents(long, folder), time.monotonic() - start


def finished(folder: Path) -> set[str]:
    """The finished pieces of work in a folder: images with their line, lines of partial scores, whole files of results."""
    pieces = set()
    for path in folder.rglob("*"):
        if path.name.endswith(".part.jsonl"):
            text = path.read_text(encoding="utf-8", errors="replace")
            pieces |= {f"{path}:{line}" for line in text.split("\n")[:-1]}
        elif path.suffix == ".png" and not path.name.startswith("."):
            pieces.add(f"{path}:{sha256_file(path)}")
        elif path.suffix in (".pt", ".pth") and path.name != "state.pt" and not path.name.startswith("."):
            pieces.add(f"{path}:{tensors_of(path)}")
    return pieces


def damage_in_sight(folder: Path) -> list[str]:
    """Files under their final names that are not whole; images that differ from their line in the manifest."""
    bad = []
    lines = {place: manifest.read(place) for place in {path.parent for path in folder.rglob("*.png")}}
    for path in folder.rglob("*"):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix == ".png" and (
            not is_complete(path) or lines[path.parent].get(path.name, {}).get("sha256") != sha256_file(path)
        ):
            bad.append(str(path))
        if path.suffix == ".json":
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                bad.append(str(path))
    return bad


def killed(long: Long, folder: Path, reference: dict[str, str], seconds: float, kills: int, rng: random.Random) -> Count:
    """Kill a script again and again at random moments, then let it finish."""
    count = Count()
    folder.mkdir()
    argv = long.argv(folder)
    while count.injected < kills:
        before = finished(folder)
        code, said = run(long.script, argv, kill_after=rng.uniform(0.05, 1.0) * seconds)
        if code >= 0:  # it was done before the signal came: begin anew
            if code == 0 and contents(long, folder) == reference:
                shutil.rmtree(folder)
                folder.mkdir()
                argv = long.argv(folder)
                seconds *= 0.9
                continue
            count.notes.append(f"{long.script} ended with {code} after a kill: {said[-200:]}")
            count.injected += 1
            continue
        count.injected += 1
        lost = {piece for piece in before - finished(folder) if Path(piece.split(":")[0]).exists() or ".part" not in piece}
        bad = damage_in_sight(folder)
        count.lost += len(lost)
        count.wrong += len(bad)
        count.survived += not lost and not bad
        count.notes += [f"lost {piece}" for piece in lost] + [f"damaged {piece}" for piece in bad]
    return settle(count, long, argv, folder, reference)


def settle(count: Count, long: Long, argv: list[object], folder: Path, reference: dict[str, str]) -> Count:
    """Let a script finish without faults, and compare its results with the undisturbed ones."""
    (code, said), found = run(long.script, argv), contents(long, folder)
    if code != 0 or found != reference:
        count.wrong += 1
        count.survived = 0
        differ = sorted(name for name in reference.keys() | found.keys() if reference.get(name) != found.get(name))
        count.notes.append(f"{long.script} ended with {code}, other results in {differ}: {said[-300:]}")
    return count


def full_disk(long: Long, folder: Path, reference: dict[str, str]) -> Count:
    """Run a script with ever larger limits on the size of its files, as on a disk with that much room, then without."""
    count = Count()
    folder.mkdir()
    argv = long.argv(folder)
    for limit in (0, 300, 1500, 20_000):
        before = finished(folder)
        code, said = run(long.script, argv, file_limit=limit)
        if code == 0:  # this script needs no larger file
            break
        count.injected += 1
        lost, bad = before - finished(folder), damage_in_sight(folder)
        clean = code == 1 and "Traceback" not in said
        count.lost += len(lost)
        count.wrong += len(bad)
        count.survived += clean and not lost and not bad
        if not clean or lost or bad:
            count.notes.append(
                f"{long.script} with files of {limit} bytes: code {code}, {said[-200:]}, lost {len(lost)}, damaged {bad}"
            )
    return settle(count, long, argv, folder, reference)


def damaged(long: Long, folder: Path, reference: dict[str, str], files: int, rng: random.Random) -> Count:
    """Cut some files that a run left, and flip a bit in them: they must be mended, or refused in one sentence or by their reader."""
    count = Count()
    folder.mkdir()
    argv = long.argv(folder)
    run(long.script, argv)
    names = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(LOGS)]
    for path in rng.sample(names, min(len(names), files)):
        whole = path.read_bytes()
        if not whole:
            continue
        for broken in (whole[: len(whole) // 2], flipped(whole, rng)):
            path.write_bytes(broken)
            code, said = run(long.script, argv)
            count.injected += 1
            mended = code == 0 and contents(long, folder) == reference
            refused = "error: " in said and "Traceback" not in said if code else path.suffix == ".pt" and read_pt(path) is None
            count.survived += mended or refused
            if not (mended or refused):
                count.wrong += code == 0
                count.notes.append(f"{long.script} with a damaged {path.name}: code {code}, {said[-200:]}")
            path.write_bytes(whole)
    return settle(count, long, argv, folder, reference)


def flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def hostile() -> Count:
    """The cases of tests/hostile/test_hostile.py, each a bad input that must end in a clear error or a documented handling."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests/hostile/test_hostile.py"), f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, capture_output=True)
        (suite,) = ET.parse(report).getroot().iter("testsuite")
    cases, failed = int(suite.get("tests", 0)), int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    return Count(cases, cases - failed, 0, failed)


def page(args: argparse.Namespace, counts: dict[str, Count]) -> str:
    """The table of all faults."""
    lines = [
        "# Reliability", "", f"Made by `python scripts/reliability.py --kills {args.kills} --seed {args.seed}` on the demo's models, on CPU. Survived: nothing "
        "lost, no damaged file in sight, and, where the script was let finish, the results of an undisturbed run (images, weights, codebook rows and scores are "
        "compared by their bytes or values); a full disk and a damaged file also count as survived where the script stops with one sentence.", "",
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
