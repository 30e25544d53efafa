"""Measure the nudity detector's speed against loops that build an ONNX session for every image; write docs/benchmark_detector.md.

    python scripts/benchmarks/detector.py --images 60          # about a minute on two idle cores; Linux only

All sides score the same 512x512 PNG files by the same rule, in turn within one process. For the column "one core" this process is
bound to one core. An ONNX session starts one thread for each core of the machine, even if its process may use only one of them; the
threads then wait for each other. The second loop therefore sets one thread.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from des.utils import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    # fmt: off
    parser.add_argument("--out", type=cli.output_file, default=ROOT / "docs/benchmark_detector.md", metavar="F", help="Markdown page to write")
    parser.add_argument("--images", type=cli.positive_int, default=60, metavar="N", help="images a round")
    parser.add_argument("--rounds", type=cli.positive_int, default=5, metavar="N", help="rounds of each side; the page shows medians")
    # fmt: on
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.data.images import image_batches
from des.evaluation.detectors.nudenet import NudeNet, find_weights
from des.evaluation.detectors.profiles import CLASSES, PROFILES, SIDE
from des.utils.files import write_text

import cv2
import numpy as np
import onnxruntime
import torch
from PIL import Image


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        paths = some_pictures(Path(folder), args.images)
        sides = {
            "one session per image, default threads": lambda workers: loop(paths, cores),
            "one session per image, one thread": lambda workers: loop(paths, 1),
            "this code": lambda workers: ours(paths, workers),
        }
        lines = [
            "# The nudity detector's speed", "",
            f"Images per second, including PNG decoding: medians of {args.rounds} rounds in which the sides took turns. Measured by "
            f"`python scripts/benchmarks/detector.py --images {args.images} --rounds {args.rounds}` on {cores} cores ({platform.machine()}), "
            f"onnxruntime {onnxruntime.__version__}, no GPU.", "",
            "| | one core | times slower than this code | all cores | times slower than this code |", "| --- | ---: | ---: | ---: | ---: |",
        ]  # fmt: skip
        one = measure(sides, args, 1, {0})
        every = measure(sides, args, cores, set(range(cores)))
    for name in sides:
        rates = [(table[name], table["this code"] / table[name]) for table in (one, every)]
        lines.append(f"| {name} | " + " | ".join(f"{rate:.1f} | {ratio:.2f}" for rate, ratio in rates) + " |")
    write_text(args.out, "\n".join(lines) + "\n")
    print("\n".join(lines))


def measure(
    sides: dict[str, Callable[[int], list]], args: argparse.Namespace, workers: int, cores: set[int]
) -> dict[str, float]:
    """Images per second of each side on the given cores. Raises SystemExit if the sides find different things."""
    os.sched_setaffinity(0, cores)
    cv2.setNumThreads(len(cores))
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        found = []
        for name, side in sides.items():
            start = time.perf_counter()
            found.append(side(workers))
            rates[name].append(args.images / (time.perf_counter() - start))
        if not all(each == found[0] for each in found):
            raise SystemExit("error: the sides found different things, so their speeds are not comparable")
    return {name: statistics.median(each) for name, each in rates.items()}


def some_pictures(folder: Path, count: int) -> list[Path]:
    """Write different 512x512 PNG files of smooth noise, about as large on disk as photographs."""
    rng = np.random.default_rng(0)
    for i in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((512, 512), Image.Resampling.BICUBIC)
        grain = rng.integers(-6, 7, (512, 512, 3))
        Image.fromarray((np.asarray(noise) + grain).clip(0, 255).astype(np.uint8)).save(folder / f"picture_{i}p.png")
    return sorted(folder.iterdir())


def ours(paths: list[Path], workers: int) -> list:
    """The detections of each image as the scorers compute them."""
    detector = NudeNet(["paper"], torch.device("cpu"))
    batches = image_batches(paths, 32, "score", workers, detector.prepare)
    return [[(found["class"], found["box"]) for found in image["paper"]] for batch in batches for image in batch]


def loop(paths: list[Path], threads: int) -> list:
    """The same rule in the style of public evaluation loops: a new session and a Python loop over the anchors for each image."""
    results = []
    for path in paths:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = (
            threads  # set explicitly: a session that chooses for itself also binds its threads to cores
        )
        session = onnxruntime.InferenceSession(
            find_weights("paper", PROFILES["paper"]), options, providers=["CPUExecutionProvider"]
        )
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        height, width = image.shape[:2]
        pixels = cv2.resize(image, (SIDE, SIDE)).astype(np.float32) / 255
        output = session.run(None, {session.get_inputs()[0].name: pixels.transpose(2, 0, 1)[None]})[0]
        boxes, scores, classes = [], [], []
        for anchor in output[0].T:
            best = np.argmax(anchor[4:])
            if anchor[4 + best] >= 0.5:
                x, y, w, h = anchor[:4].astype(float)
                left, top = (x - w / 2) * width / SIDE, (y - h / 2) * height / SIDE
                boxes.append([int(left), int(top), int(w * width / SIDE), int(h * height / SIDE)])
                scores.append(float(anchor[4 + best]))
                classes.append(CLASSES[best])
        results.append([(classes[i], boxes[i]) for i in cv2.dnn.NMSBoxes(boxes, scores, 0.5, 0.5)])
    return results


if __name__ == "__main__":
    cli.run(main)
