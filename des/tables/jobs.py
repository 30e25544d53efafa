"""Runs the project's scripts as jobs. A record of its inputs, outputs and duration keeps a finished job from running again."""

import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from des.data.run_record import read_json
from des.tables.inputs import identity
from des.utils.errors import UserError
from des.utils.files import write_json
from des.utils.logs import logger
from des.utils.scripts import run_script

_OUTPUT_OPTIONS = re.compile(r"--(output_dir|results_dir|output_path|save_dir|output_file)\b")


@dataclass(frozen=True)
class Job:
    """A script's command line, the files and folders that it reads and must write, and how much it does.

    That is a number of images, of training steps, or of attacked prompts (`rows`).
    """

    what: str
    script: str
    argv: tuple[str, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    images: int = 0
    steps: int = 0
    rows: int = 0


class JobRecords:
    """The records of finished jobs, one file `{what}.json` per job in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def record(self, job: Job) -> dict | None:
        """The record of a finished job: the same command with unchanged inputs and outputs; None if there is none.

        The index of the device may be another one.
        """
        try:
            record = json.loads(self._path(job).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        same = _without_index(record.get("argv", [])) == _without_index(job.argv) and record.get("script") == job.script
        return record if same and record.get("files") == _hashes((*job.inputs, *job.outputs)) else None

    def run(self, job: Job) -> None:
        """Do a job unless it is done. Raises UserError where it fails or does not leave what it should.

        A sentence of its script that advises another output folder names `--out`, where all of them are.
        """
        if self.record(job):
            return
        logger.info("%s", job.what)
        start, cpu_start = time.monotonic(), time.process_time()
        before = _hashes(job.inputs)
        try:
            run_script(job.script, *job.argv)
        except UserError as error:
            raise UserError(_OUTPUT_OPTIONS.sub("--out", str(error))) from None
        spent = {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - cpu_start}
        lost = [path for path, digest in _hashes((*job.inputs, *job.outputs)).items() if digest is None]
        if lost or _hashes(job.inputs) != before:
            raise UserError(
                f"{job.what}: {lost[0] if lost else 'one of its inputs'} is missing, or changed while the job ran; run this command again"
            )
        record = {"what": job.what, "script": job.script, "argv": job.argv, **spent, "images": job.images}
        write_json(
            self._path(job), record | {"steps": job.steps, "rows": job.rows, "files": _hashes((*job.inputs, *job.outputs))}
        )

    def result(self, job: Job) -> dict:
        """The JSON that is a job's first output, after `run`."""
        self.run(job)
        return read_json(job.outputs[0])

    def left(self, jobs: Iterable[Job]) -> list[Job]:
        """The jobs that are not finished, and those that read the outputs of such a job."""
        found: list[Job] = []
        remade: set[Path] = set()
        for job in jobs:
            if not remade.isdisjoint(job.inputs) or self.record(job) is None:
                found.append(job)
                remade |= {path for output in job.outputs for path in (output, output.parent)}
        return found

    def seconds_per(self, unit: str, script: str | None = None) -> float | None:
        """Mean seconds per image (`unit` images), training step (`steps`) or attacked prompt (`rows`) in the finished jobs of a script.

        Without `script`, in those of all scripts; None if there are none.
        """
        records = [json.loads(path.read_text(encoding="utf-8")) for path in self.folder.glob("*.json")]
        records = [record for record in records if record.get(unit) and script in (None, record["script"])]
        return sum(record["seconds"] for record in records) / sum(record[unit] for record in records) if records else None

    def _path(self, job: Job) -> Path:
        return self.folder / (re.sub(r"[^\w.+-]+", "-", job.what.lower()) + ".json")


def _without_index(argv: Sequence[str]) -> list[str]:
    """A command line that names a kind of device, `cuda` for `cuda:1`."""
    pairs = zip(["", *argv], argv, strict=False)
    return [part.split(":")[0] if option in ("--device", "--devices") else part for option, part in pairs]


def _hashes(paths: Iterable[Path]) -> dict[str, str | None]:
    return {str(path): identity(path) for path in paths}
