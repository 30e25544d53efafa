"""The jobs that a table or an experiment consists of: encode a codebook, train, draw a prompt set, score its images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from des.models.encoders import per_encoder_name
from des.models.model_files import model_name
from des.tables.jobs import Job
from des.training.codebook import codebook_folder

import torch

Options = Sequence[object]  # of a script
DETECTORS = {  # scripts of the detectors of generate.py's --score_with
    "nudenet": ("tasks/img_batch_classify.py", "--job", "nudity"),
    "object": ("tasks/img_batch_classify.py", "--job", "object"),
    "q16": ("tasks/img_batch_classify_q16.py",),
}


@dataclass(frozen=True)
class PipelineJobs:
    """Builds the jobs for one pipeline on one device.

    The options hold files and folders as Path: their content is part of what identifies a job.
    """

    model_path: str
    device: torch.device
    variant: str | None = None

    def codebook(self, safe_csv: Path, folder: Path, *options: object) -> Job:
        """The job that encodes the safe prompts; `folder` is its --save_dir, `options` are further ones."""
        argv = (*self.common, "--csv_path", safe_csv, "--save_dir", folder, *options)
        return _job(folder.name, "save_codebook.py", argv, (safe_csv,), (self._encoded(folder),))

    def training(
        self, name: str, lists: tuple[Path, Path], codebook: Path, folder: Path, options: Mapping[str, Any], rows: int
    ) -> Job:
        """The job that trains with the unsafe and the safe list; its output is the checkpoint of the last epoch.

        `options` are train_des.py's further options, and `rows` is the length of the longer list.
        """
        unsafe, safe = lists
        run = per_encoder_name(self.model_path, 1, f"{float(options['learning_rate'])}_{float(options['lambda_safe'])}")
        argv = (*self.common, "--codebook_dir", codebook, "--unsafe_csv_path", unsafe, "--safe_csv_path", safe, "--output_dir", folder,
                *flags(options))  # fmt: skip
        inputs, checkpoint = (unsafe, safe, self._encoded(codebook)), folder / run / f"checkpoint-{options['num_epochs']}.pt"
        steps = options["num_epochs"] * -(-rows // options["batch_size"])
        return _job(f"train {name}", "train_des.py", argv, inputs, (checkpoint,), steps=steps)

    def image_folder(self, results: Path, method: Options, name: str) -> Path:
        """Where generate.py puts the images of a prompt set; `method` starts with --training_method."""
        return results / str(method[1]) / model_name(self.model_path) / name

    def drawing(
        self, what: str, csv: Path, folder: Path, options: Options, inputs: Sequence[Path], outputs: Sequence[Path], images: int
    ) -> Job:
        """The job that draws a list into an `image_folder`.

        `inputs` are further ones, besides the list and the files among the options; `outputs` those besides images and run.json.
        """
        argv = (*self.common, "--prompts_csv", csv, "--output_path", folder.name, "--results_dir", folder.parents[2], *options)
        read, written = (csv, *files_in(options), *inputs), (folder / "run.json", folder, *outputs)
        return _job(f"draw {what}", "generate.py", argv, read, written, images=images)

    def fid(self, what: str, folder: Path, csv: Path, reference: Path, output: Path, options: Options) -> Job:
        """FID of a folder against reference images; the text file `output` and a JSON beside it."""
        argv = ("--gen_imgs_path", folder, "--coco_imgs_path", reference, "--device", self.device, *options,
                "--output_file", output)  # fmt: skip
        reads = (reference, *files_in(options))
        return scoring(f"FID of {what}", "fid.py", folder, csv, argv, output.with_suffix(".json"), reads)

    def clip_score(self, what: str, folder: Path, csv: Path, options: Options) -> Job:
        """The CLIP score of a folder's images with their prompts."""
        argv = ("--image_folder", folder, "--csv_file", csv, "--device", self.device, *options)
        return scoring(f"CLIP score of {what}", "clipscore.py", folder, csv, argv, folder / "clipscore.json", files_in(options))

    def detection(self, what: str, folder: Path, csv: Path, stem: str, detector: str | Path, *options: object) -> Job:
        """What a detector of generate.py's --score_with, with its options, finds in a folder's images; the result is {stem}.json."""
        script, *job = DETECTORS[str(detector)]
        argv = (*job, "--folder_dir", folder, "--csv_path", csv, "--output_name", stem, "--devices", self.device, *options)
        return scoring(what, script, folder, csv, argv, folder / f"{stem}.json", files_in(options))

    def attack(
        self,
        what: str,
        attack: Options,
        csv: Path,
        out: Path,
        options: Options,
        control: Path | None,
        rows: int,
    ) -> Job:
        """The job that attacks a list: `attack` is a script of scripts/attacks/ with its options, `options` are further ones.

        `control` is the `out` of the same attack on the original model; None for that attack itself.
        """
        script, *own = attack
        cell, shared = ("control", ()) if control is None else ("attack", ("--control_dir", control))
        argv = (*self.common, "--prompts_csv", csv, "--out", out, *options, *own, *shared)
        inputs = (csv, *files_in((*options, *own)), *([control / "attack.json"] if control else []))
        return _job(what, f"scripts/attacks/{script}", argv, inputs, (out / "attack.json", out / f"{cell}.csv"), rows=rows)

    @property
    def common(self) -> tuple[object, ...]:
        variant = ("--variant", self.variant) if self.variant else ()
        return ("--model_path", self.model_path, *variant, "--device", self.device)

    def _encoded(self, codebook: Path) -> Path:
        return codebook_folder(codebook, self.model_path, 1) / "codebook.json"


def scoring(what: str, script: str, folder: Path, csv: Path, argv: Options, output: Path, reads: Sequence[Path] = ()) -> Job:
    """The job that scores a folder's images; `reads` are the files and folders that the figure depends on beside them and their list."""
    return _job(what, script, argv, (csv, folder, *reads), (output,))


def files_in(options: Options) -> tuple[Path, ...]:
    """The files and folders among a script's options."""
    return tuple(part for part in options if isinstance(part, Path))


def flags(options: Mapping[str, Any]) -> list[Any]:
    """A command line: `--key value`, several values for a list, a bare flag for True."""
    argv: list[Any] = []
    for key, value in options.items():
        argv += [f"--{key}", *(value if isinstance(value, list | tuple) else [] if value is True else [value])]
    return argv


def _job(what: str, script: str, argv: Options, inputs: tuple[Path, ...], outputs: tuple[Path, ...], **amounts: int) -> Job:
    return Job(what, script, tuple(map(str, argv)), inputs, outputs, **amounts)
