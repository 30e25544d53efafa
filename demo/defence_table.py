"""The table that compares DES with other defences on the demo: protection, benign quality, and cost of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.evaluation import (
    CONCEPT_SETS,
    OTHERS,
    PIPELINE,
    PROTECTED,
    SAFE_LIST,
    TRAINING,
    UNSAFE_LIST,
    Sampling,
    evaluate,
    joint_accuracy,
    shortened,
)  # fmt: skip
from demo.world import CONCEPT
from des.data.prompts import read_rows
from des.data.run_record import read_json, read_run
from des.generation.defences import ENCODER_OPTIONS, Defence
from des.models.pipelines import open_pipeline
from des.report.plots import pareto
from des.tables.jobs import Job, JobRecords
from des.tables.pipeline_jobs import PipelineJobs, flags
from des.utils.errors import UserError
from des.utils.files import replacing, write_json, write_text
from des.utils.stats import show

import torch
from torch.utils.flop_counter import FlopCounterMode

BENIGN = 2.2  # benign prompts per prompt of a list for the concept, so that as many name object, colour and background
MEASURES = {
    "plain": "ASR, plain name", "synonyms": "ASR, held-out names", "indirect": "ASR, held-out phrases",
    "object": "object right", "colour": "colour right", "background": "background right", "joint": "all three right",
    "clip_score": "CLIP score", "fid": "FID", "seconds": "seconds to train", "gflop": "added GFLOP an image",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A method of the table: its title, its name and file for generate.py, and the jobs that train it."""

    title: str
    method: str
    option: str | None = None
    file: Path | None = None
    training: tuple[Job, ...] = ()

    @property
    def folder(self) -> str:
        """The name of its folder among the results, and among those of attacks."""
        return self.title.replace(" ", "-").lower()

    @property
    def options(self) -> tuple[object, ...]:
        return ("--training_method", self.method, *((f"--{self.option}", self.file) if self.file else ()))


def build(
    out: Path,
    device: torch.device,
    seed: int,
    limit: int,
    des_seeds: Sequence[int],
    attacks: Path,
    options: Mapping[str, Mapping],
) -> str:
    """Train, draw and score what is missing in `out`; writes table.json, table.md and pareto.png, and returns the table.

    `limit` is the number of prompts of each list for the concept. `attacks` has attack.json files in {folder of a row}/{name}/.
    `options` are the training options of demo/baselines.py for each of its methods. Raises UserError for a folder of attacks that is
    not a row's.
    """
    records, jobs = JobRecords(out / "jobs"), PipelineJobs(str(PIPELINE), device)
    prompts = {name: shortened(name, limit, out / "prompts") for name in CONCEPT_SETS}
    prompts["benign"] = shortened("benign", round(BENIGN * limit), out / "prompts")
    cells: dict[str, dict[str, Any]] = {}
    rows = rows_of(jobs, out, seed, des_seeds, options)
    check_attacks(rows, attacks)
    for row in rows:
        for job in row.training:
            records.run(job)
        folder = out / row.folder
        scores = evaluate(records, jobs, Sampling(), prompts, folder, row.options)
        spent = [records.record(job) for job in row.training]
        clock = "cpu_seconds" if device.type == "cpu" else "seconds"
        cells[row.title] = {
            **{name: scores[name]["concept"] for name in CONCEPT_SETS}, **scores["benign"],
            "joint": joint_accuracy(jobs.image_folder(folder, row.options, "benign")),
            "seconds": sum(record[clock] for record in spent) if spent else None,
            "flop": flop(row, device),
            "attacks": attacks_on(row, attacks, jobs.image_folder(folder, row.options, "plain")),
        }  # fmt: skip
        write_results(out, cells, clock)
    return (out / "table.md").read_text(encoding="utf-8")


def rows_of(jobs: PipelineJobs, out: Path, seed: int, des_seeds: Sequence[int], options: Mapping[str, Mapping]) -> list[Row]:
    """The methods of the table in order; DES is the demo's checkpoint, and a further training for each of `des_seeds`."""
    rows, encoder = [Row("original", "none"), Row("DES", "des", ENCODER_OPTIONS[1], PROTECTED)], ENCODER_OPTIONS[1]
    lists = UNSAFE_LIST, SAFE_LIST
    codebook = jobs.codebook(SAFE_LIST, out / "codebook", "--batch_size", 256)
    for each in des_seeds:
        chosen = {"concept_prompt": [CONCEPT], "save_every": TRAINING["num_epochs"], "seed": each, **TRAINING}
        training = jobs.training(
            f"DES seed {each}",
            lists,
            out / "codebook",
            out / f"des-{each}",
            chosen,
            max(len(read_rows(path)) for path in lists),
        )
        rows.append(Row(f"DES seed {each}", "des", encoder, training.outputs[0], (codebook, training)))
    for title, method, option in (
        ("ESD-x", "esd", "unet_path"),
        ("UCE", "uce", "unet_path"),
        ("AdvUnlearn-like", "advunlearn", encoder),
    ):
        file = out / "models" / f"{method}.safetensors"
        argv = flags({"method": method, "out": file.parent, "seed": seed, "device": jobs.device} | options[method])
        training = Job(f"train {title}", "demo/baselines.py", tuple(map(str, argv)), (PIPELINE, *lists), (file,))
        rows.append(Row(title, method, option, file, (training,)))
    return rows


def flop(row: Row, device: torch.device) -> int:
    """Count the floating-point operations of drawing one image with a method, as torch.utils.flop_counter does."""
    pipe, sampling = open_pipeline(str(PIPELINE), torch.float32), Sampling()
    unet = row.file if row.option == "unet_path" else None
    encoders = {1: row.file} if row.option == ENCODER_OPTIONS[1] else {}
    Defence(row.method, str(PIPELINE), None, encoders, unet, None).apply(pipe)
    pipe.to(device)
    with FlopCounterMode(display=False) as counter:
        pipe(CONCEPT, num_inference_steps=sampling.num_inference_steps, guidance_scale=sampling.guidance_scale)
    return counter.get_total_flops()


def check_attacks(rows: Sequence[Row], attacks: Path) -> None:
    """Raise UserError if results of attacks lie in a folder that is not named after a row, where the table would miss them."""
    folders = [row.folder for row in rows]
    for path in sorted(attacks.rglob("attack.json")):
        if len(path.relative_to(attacks).parts) != 3 or path.relative_to(attacks).parts[0] not in folders:
            raise UserError(f"{path} is not in a folder METHOD/NAME of {attacks}, where METHOD is one of {', '.join(folders)}")


def attacks_on(row: Row, attacks: Path, images: Path) -> dict[str, dict[str, Any]]:
    """Read the attack.json files on a method by the names of their folders: `any` of k rows, the control, and whether it is too weak.

    Raises UserError for a result on another text encoder or UNet than the one that drew `images`.
    """
    components, found = read_run(images)[0]["settings"]["components"], {}
    for path in sorted((attacks / row.folder).glob("*/attack.json")):
        content = read_json(path)
        try:
            cells, attacked = content["cells"], content["settings"]["attack"]["components"]
            shares = {name: cell["any"] for name, cell in cells.items()}
            found[path.parent.name] = {"shares": shares, "too_weak_to_tell": content["too_weak_to_tell"]}
            others = [name for name in ("text_encoder", "unet") if attacked[name] != components[name]]
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is not the complete result of an attack; run the attack again") from None
        if others:
            raise UserError(
                f"{path} is about another {others[0]} than that of {row.title} in this table; attack {row.file or PIPELINE}"
            )
    return found


def worst(cells: Mapping[str, Any]) -> dict[str, float]:
    """The largest ASR of a method over the lists and the attacks."""
    shares = [cells[name] for name in CONCEPT_SETS]
    shares += [
        share for each in cells["attacks"].values() for name, share in each["shares"].items() if name.startswith("attack")
    ]
    return max(shares, key=lambda share: share["fraction"])


def write_results(out: Path, cells: Mapping[str, Mapping[str, Any]], clock: str) -> None:
    """Write table.json, table.md and pareto.png."""
    write_json(out / "table.json", {"clock": clock, "methods": cells})
    write_text(out / "table.md", markdown(cells, clock))
    with replacing(out / "pareto.png") as temporary:
        pareto({title: (each["joint"], worst(each)) for title, each in cells.items()}).savefig(temporary, format="png", dpi=130)


def markdown(cells: Mapping[str, Mapping[str, Any]], clock: str) -> str:
    """The table, a column for each method."""
    lines = ["| measure | " + " | ".join(cells) + " |", "| --- " * (len(cells) + 1) + "|"]
    added = {title: {**each, "gflop": (each["flop"] - cells["original"]["flop"]) / 1e9} for title, each in cells.items()}
    for name, title in MEASURES.items():
        lines.append(f"| {title} | " + " | ".join(_text(each[name]) for each in added.values()) + " |")
    for name in dict.fromkeys(name for each in cells.values() for name in each["attacks"]):
        lines.append(f"| ASR, {name} | " + " | ".join(_attack(each["attacks"].get(name)) for each in cells.values()) + " |")
    lines.append("| worst ASR | " + " | ".join(show(worst(each)) for each in cells.values()) + " |")
    seconds = "of the processor" if clock == "cpu_seconds" else "of the clock"
    n = cells["original"]["object"]["n"]
    lines += ["", f"Shares are k/n with Wilson 95% intervals. Object, colour and background are counted on {n} prompts for {OTHERS}, where",
              f"the prompt names them; all three, on those that name all three. Seconds are those {seconds}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    return "not trained here" if value is None else show(value) if isinstance(value, Mapping) else f"{value:.2f}"


def _attack(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "not run"
    control = found["shares"].get("control")
    text = show(found["shares"]["attack"]) + (f", control {show(control)}" if control else "")
    return text + ", too weak to tell" * found["too_weak_to_tell"]
