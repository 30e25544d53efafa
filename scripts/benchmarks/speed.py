"""Measure this code against the published procedure, on a text encoder of CLIP-L/14's size with random weights.

    python scripts/benchmarks/speed.py --out docs/benchmark.md         # about 15 minutes on two idle cores

The published procedure is reimplemented below: it encodes one prompt per call, ranks the whole codebook for one query at a time,
stores a full row for every unsafe prompt, keeps a second frozen encoder, and trains with separate forward passes and an unfused
optimiser. Both sides take turns within one process, and the machine's rate of matrix products is measured between them.
"""

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
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
    parser.add_argument("--out", type=cli.output_file, default=ROOT / "docs/benchmark.md", metavar="F", help="Markdown page to write")
    parser.add_argument("--repeats", type=cli.positive_int, default=3, metavar="N", help="timed steps of each side; the page shows medians")
    parser.add_argument("--memory_of", nargs=2, metavar=("WHAT", "DIR"), help=argparse.SUPPRESS)
    # fmt: on
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.models.checkpoints import fingerprint
from des.models.encoders import TextEncoder, load_encoder
from des.training import losses
from des.training.codebook import Codebook, write_codebook
from des.training.loop import Settings, train
from des.training.pairs import Pairs
from des.training.targets import find_targets
from des.utils import errors, logs
from des.utils.files import sha256_file, write_json, write_text
from des.utils.processes import Processes

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

TOKENIZER = ROOT / "tests/golden/A/model/tokenizer"
SIZES = (400, 800, 1600)
BATCHES = (8, 16)
PUBLISHED_QUERIES = 40  # each costs the published search the same
ALPHA = 200.0
FILES_NOTE = """Files on disk are for equal numbers of unsafe and safe prompts. The published side is assumed to keep the rows, a normalised copy of them as its
search index, and a full row for each unsafe prompt. This code keeps the rows (`save_codebook.py --dtype`, fp32 by default) and a row number for
each unsafe prompt."""


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logs.setup_logging()
    if args.memory_of:
        print(json.dumps(measure_memory(args.memory_of[0], Path(args.memory_of[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model")
        lines = [*heading(), *encoding_and_disk(work), *search(work), *training(work, args.repeats), *memory(work)]
    lines += ["", FILES_NOTE]
    write_text(args.out, "\n".join(lines) + "\n")
    print("\n".join(lines))


def make_model(folder: Path) -> None:
    """Save a text encoder of CLIP-L/14's size with random weights, and a tokenizer, as a pipeline's folder holds them."""
    torch.manual_seed(0)
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / "tokenizer")


def some_prompts(count: int, seed: int) -> list[str]:
    """Different prompts of 6 to 14 words."""
    rng = random.Random(seed)
    words = [
        "a", "red", "old", "small", "car", "dog", "street", "quiet", "river", "market", "light", "night", "rain", "stone", "forest",
        "cat", "paper", "boat", "kettle", "bridge",
    ]  # fmt: skip
    return [" ".join(rng.choices(words, k=rng.randint(6, 14))) + f" {i}" for i in range(count)]


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def matrix_rate(rows: int) -> float:
    """This machine's rate of fp32 matrix products now, in FLOP/s: [rows, 768] x [768, 3072], as in the encoder's MLP."""
    a, b = torch.randn(rows, 768), torch.randn(768, 3072)
    torch.mm(a, b)
    times = [seconds(lambda: [torch.mm(a, b) for _ in range(20)]) / 20 for _ in range(5)]
    return 2 * rows * 768 * 3072 / statistics.median(times)


def heading() -> list[str]:
    return [
        "# Benchmark",
        "",
        f"Made by `python scripts/benchmarks/speed.py` on {os.cpu_count()} cores ({platform.machine()}, no GPU), torch {torch.__version__}, fp32, "
        f"{torch.get_num_threads()} threads. Text encoder of CLIP-L/14's size (123M parameters, 77 tokens) with random weights. "
        "*Published* is the published procedure, reimplemented in that script; *here* is the code that this project's scripts run. Each ratio comes from one run.",
        "",
        "| what | published | here | ratio | goal |",
        "| --- | --- | --- | --- | --- |",
    ]


def row(what: str, published: str, here: str, ratio: float | None, goal: str = "") -> str:
    return f"| {what} | {published} | {here} | {'' if ratio is None else f'{ratio:.2f}'} | {goal} |"


# ---------------------------------------------------------------- encoding, search, files


def published_encode(model: CLIPTextModel, encoder: TextEncoder, prompts: list[str]) -> list[torch.Tensor]:
    """One prompt a call."""
    with torch.no_grad():
        return [model(encoder.tokenize([prompt])).last_hidden_state[0] for prompt in prompts]


def published_search(query: torch.Tensor, codebook: torch.Tensor) -> int:
    """One query ranks the whole codebook; the last of the ranking is taken."""
    similarity = F.cosine_similarity(query.reshape(1, -1), codebook.reshape(len(codebook), -1))
    return similarity.argsort(descending=True)[-1].item()


def encoding_and_disk(work: Path) -> list[str]:
    """Encode prompts both ways; write the codebooks that the search needs; compare bytes on disk."""
    encoder = load_encoder(str(work / "model"))
    prompts = some_prompts(SIZES[-1], seed=1)
    model = CLIPTextModel.from_pretrained(work / "model/text_encoder")
    theirs = statistics.median(seconds(lambda: published_encode(model, encoder, prompts[:24])) / 24 for _ in range(3))
    here = seconds(lambda: write_codebook(work / "codebook", encoder, prompts, batch_size=32)) / len(prompts)
    codebook = Codebook(work / "codebook")
    rows = codebook.rows(torch.arange(len(codebook)))
    for size in SIZES[:-1]:
        subset(work / "codebook", rows, size)
    lines = [
        row(
            "encoding, ms per prompt (here including hashing and writing)",
            f"{1e3 * theirs:.0f}",
            f"{1e3 * here:.0f}",
            theirs / here,
        )
    ]
    return lines + disk(work, encoder, rows[: SIZES[0]], prompts[: SIZES[0]])


def subset(folder: Path, rows: torch.Tensor, size: int) -> None:
    """The first `size` rows as a separate codebook, beside `folder`."""
    target = folder.with_name(f"codebook_{size}")
    target.mkdir()
    save_file({"embeddings": rows[:size].contiguous()}, target / "codebook.safetensors")
    facts = Codebook(folder).facts
    shard = {"file": "codebook.safetensors", "rows": size, "sha256": sha256_file(target / "codebook.safetensors")}
    facts |= {"prompts": facts["prompts"][:size], "rows": size, "shards": [shard]}
    write_json(target / "codebook.json", facts)


def disk(work: Path, encoder: TextEncoder, rows: torch.Tensor, prompts: list[str]) -> list[str]:
    """Bytes of both sides' files for as many unsafe as safe prompts."""
    torch.save({"embeddings": rows.clone(), "prompts": prompts}, work / "published_codebook.pt")
    torch.save(F.normalize(rows.flatten(1)), work / "published_index.pt")
    torch.save({i: rows[i].clone() for i in range(len(rows))}, work / "published_targets.pt")
    published = sum(file.stat().st_size for file in work.glob("published_*.pt"))
    lines = []
    for dtype, goal in (("fp32", ""), ("fp16", "at most 0.25")):
        folder = work / f"disk_{dtype}"
        write_codebook(folder, encoder, prompts, dtype, batch_size=32)
        torch.save({"indices": torch.zeros(len(rows), dtype=torch.long)}, folder / "safe_embeddings.pth")
        here = sum(file.stat().st_size for file in folder.iterdir())
        lines.append(row(f"files on disk, {dtype}, MB", f"{published / 1e6:.1f}", f"{here / 1e6:.1f}", here / published, goal))
    return lines


def search(work: Path) -> list[str]:
    """Time both searches, N unsafe against N safe prompts; the published one on some of its queries, which all cost the same."""
    lines, ours = [], {}
    for size in SIZES:
        codebook = Codebook(work / ("codebook" if size == SIZES[-1] else f"codebook_{size}"))
        rows = codebook.rows(torch.arange(len(codebook)))
        generator = torch.Generator().manual_seed(2)
        queries = rows + 0.5 * torch.randn(rows.shape, generator=generator)
        theirs = seconds(lambda: [published_search(query, rows) for query in queries[:PUBLISHED_QUERIES]])  # noqa: B023
        theirs *= size / PUBLISHED_QUERIES
        found: list[torch.Tensor] = []
        ours[size] = seconds(lambda: found.extend(codebook.farthest(part)[1] for part in queries.split(128)))  # noqa: B023
        sample = torch.cat(found)[:PUBLISHED_QUERIES].tolist()
        if sample != [published_search(query, rows) for query in queries[:PUBLISHED_QUERIES]]:
            raise errors.UserError("the two searches do not agree, so their times are not comparable")
        lines.append(row(f"search, N = {size}, s", f"{theirs:.1f}", f"{ours[size]:.2f}", theirs / ours[size], "at least 8"))
    growth = ", ".join(f"{ours[b] / ours[a]:.1f}" for a, b in itertools.pairwise(SIZES))
    return [*lines, row("growth of the search time when N doubles (4 is quadratic)", "", growth, None)]


# ---------------------------------------------------------------- training steps


def published_step(model, frozen, optimizer, unsafe, safe, concept_ids, target, concept: losses.Concept) -> None:
    """A second frozen encoder, separate forward passes, an unfused optimiser."""
    with torch.no_grad():
        original = frozen(safe).last_hidden_state
    optimizer.zero_grad()
    unsafe_now, safe_now, concept_now = (model(ids).last_hidden_state for ids in (unsafe, safe, concept_ids))
    losses.total(unsafe_now, safe_now, concept_now, target, original, concept)["total"].backward()
    optimizer.step()


def training(work: Path, repeats: int) -> list[str]:
    """Time training steps of both sides in turn, with the matrix-product rate measured between them."""
    lines = []
    codebook = Codebook(work / f"codebook_{SIZES[0]}")
    for batch, goal in zip(BATCHES, ("at least 1.3", "at least 1.2"), strict=True):
        theirs, ours, rates = [], [], []
        for _ in range(repeats):
            theirs.append(time_published(work, codebook, batch))
            rates.append(matrix_rate((2 * batch + 1) * 77))
            ours.append(time_here(work, codebook, batch))
        published, here, rate = map(statistics.median, (theirs, ours, rates))
        floor = 3 * forward_flops(2 * batch + 1) / rate
        lines.append(row(f"training step, batch {batch}, s", f"{published:.2f}", f"{here:.2f}", published / here, goal))
        what = f"step here relative to its lower bound, batch {batch} (3 forwards at {rate / 1e9:.0f} GFLOP/s = {floor:.2f} s)"
        lines.append(row(what, "", f"{here:.2f}", here / floor, "at most 1.2"))
    return lines


def forward_flops(sequences: int, tokens: int = 77, width: int = 768, layers: int = 12) -> float:
    """Multiply-adds of one forward pass, twice: the projections and MLP (12 width^2 a token and layer), and attention."""
    return 2 * sequences * layers * tokens * (12 * width**2 + 2 * tokens * width)


def time_published(work: Path, codebook: Codebook, batch: int, steps: int = 2) -> float:
    """Seconds of one step of the published procedure, after a first step that is not timed."""
    model, frozen = (CLIPTextModel.from_pretrained(work / "model/text_encoder") for _ in range(2))
    concept, concept_ids, ids = case(load_encoder(str(work / "model")), batch)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=False, fused=False)
    target = concept.target(codebook.rows(torch.arange(batch)))
    inputs = (model, frozen, optimizer, ids[:batch], ids[batch:], concept_ids, target, concept)
    published_step(*inputs)
    return seconds(lambda: [published_step(*inputs) for _ in range(steps)]) / steps


def time_here(work: Path, codebook: Codebook, batch: int, steps: int = 2) -> float:
    """Seconds of one step of `des.training.loop.train` after a first step that is not timed."""
    encoder = load_encoder(str(work / "model"))
    concept, concept_ids, ids = case(encoder, batch)
    rows = torch.arange(batch)
    pairs = Pairs(ids[:batch], ids[batch:], rows, rows, codebook, codebook)
    stamps: list[float] = []
    settings = Settings(num_epochs=steps + 1, batch_size=batch)
    processes = Processes(encoder.device)
    train(
        encoder, pairs, concept, concept_ids, settings, processes, lambda _: stamps.append(time.perf_counter()), lambda *_: None
    )
    return (stamps[-1] - stamps[0]) / steps


def case(encoder: TextEncoder, batch: int) -> tuple[losses.Concept, torch.Tensor, torch.Tensor]:
    n, e0 = next(encoder.encode(["stone", ""], 2)).clone()
    return losses.Concept(n, e0, ALPHA), encoder.tokenize(["stone"]), encoder.tokenize(some_prompts(2 * batch, seed=3))


# ---------------------------------------------------------------- memory


def memory(work: Path) -> list[str]:
    """Peak memory of the codebook and search stages beyond the model, each in a separate process."""
    lines = []
    for what in ("codebook", "search"):
        command = [sys.executable, __file__, "--memory_of", what, str(work)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        measured = json.loads(done.stdout.splitlines()[-1])
        size, peak = measured["codebook"] / 1e6, measured["peak"] / 1e6
        name = f"peak memory of the {what} stage beyond the model, MB (the codebook: {size:.0f})"
        lines.append(row(name, "", f"{peak:.0f}", peak / size, "at most 1.5"))
    return lines


def measure_memory(what: str, work: Path) -> dict[str, int]:
    """Run one stage and return its peak resident memory beyond that with the loaded model, and the codebook's size, in bytes."""
    encoder = load_encoder(str(work / "model"))
    next(encoder.encode(["warm up"], 1))
    fingerprint(encoder.model)  # touches every weight, so that all of the memory-mapped model is counted before
    prompts = some_prompts(SIZES[-1] if what == "codebook" else SIZES[0], seed=4)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the recorded peak
    if what == "codebook":
        write_codebook(work / "codebook_memory", encoder, prompts, batch_size=32)
        size = (work / "codebook_memory/codebook.safetensors").stat().st_size
    else:
        codebook = Codebook(work / "codebook")
        find_targets(work / "targets.pth", codebook, encoder, prompts)
        size = (codebook.folder / "codebook.safetensors").stat().st_size
    return {"peak": _status("VmHWM") - before, "codebook": size}


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    cli.run(main)
