"""Computes the cells of tables by jobs that train variants of a model, draw prompt sets with them, and score the images."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from des.attacks.results import scores_of
from des.data.prompts import never_drawn, read_rows
from des.data.run_record import read_json
from des.tables.build import Cell
from des.tables.cells import ORIGINAL, PromptSet, Setup, Variant
from des.tables.copies import copied_inputs, copy_images
from des.tables.inputs import identity, model_identity
from des.tables.jobs import Job, JobRecords
from des.tables.pipeline_jobs import PipelineJobs, files_in, scoring
from des.utils.errors import UserError
from des.utils.files import write_text

import pandas as pd
import torch

PARTS = ("nearest", "farthest")
MISSING = {"classify_16": "no Q16 prompt file (--q16_prompts)", "classify_object": "no style classifier (--style_classifier)"}


@dataclass
class TableRunner:
    """Runs each job that the cells need once, or only lists the jobs (`dry`)."""

    setup: Setup
    model_path: str
    out: Path
    scale: str
    device: torch.device
    batch_size: int
    seed: int
    discard_images: bool
    dry: bool
    variant: str | None = None
    planned: list[Job] = field(default_factory=list)
    _rows: dict[str, pd.DataFrame] = field(default_factory=dict)  # rows by list, as read
    protections: dict[Variant, Path] = field(default_factory=dict)  # a file that records how a variant is protected
    _copied: set[Path] = field(default_factory=set)  # lists that are already written or checked

    @cached_property
    def records(self) -> JobRecords:
        """The records of finished jobs."""
        return JobRecords(self.out / "jobs")

    @cached_property
    def jobs(self) -> PipelineJobs:
        """Builds the jobs."""
        return PipelineJobs(self.model_path, self.device, self.variant)

    def need(self, job: Job) -> bool:
        """Run a job unless it is done; False where it is only listed. Raises UserError where its script stops."""
        if self.dry:
            if job not in self.planned:
                self.planned.append(job)
            return False
        self.records.run(job)
        return True

    # Training

    def untrainable(self, variant: Variant) -> str | None:
        """Why a variant cannot be trained: a list of prompts that is missing; None if it can be, or need not be."""
        if variant.train is None:
            return None
        concept = self.setup.concepts[variant.concept]
        missing = [path.name for path in (*concept.unsafe, *concept.safe) if not path.is_file()]
        return f"not run: no {missing[0]} ({concept.how})" if missing else None

    def training(self, variant: Variant) -> Job:
        """Make the codebook, which all variants with a concept share, train a variant, and return the training job."""
        concept, suffix = self.setup.concepts[variant.concept], "" if variant.concept == "main" else f"_{variant.concept}"
        lists = {
            f"train_{paths[0].stem if len(paths) == 1 else part + suffix}": paths
            for part, paths in (("unsafe", concept.unsafe), ("safe", concept.safe))
        }
        unsafe, safe = (self._rows_of(paths, name) for name, paths in lists.items())
        codebook = self.out / f"codebook{suffix}"
        self.need(self.jobs.codebook(safe, codebook))
        settings = {**self.setup.training, **dict(variant.train or ())}
        if self.scale == "smoke":
            settings["num_epochs"] = 1
        options = {
            "safe_embedding_path": self.out / f"targets{suffix}_{settings.get('target', 'lowest')}.pth",
            "concept_prompt": concept.prompt,
            "save_every": settings["num_epochs"],
        }
        rows = max(len(self._rows[name]) for name in lists)
        folder = self.out / "checkpoints" / variant.weights
        job = self.jobs.training(variant.weights, (unsafe, safe), codebook, folder, options | settings, rows)
        self.need(job)
        return job

    def method(self, variant: Variant) -> tuple[str | Path, ...]:
        """The options of generate.py for a variant, with files as Path; trains it if necessary."""
        files = (("--text_encoder_path", self.training(variant).outputs[0]),) if variant.train is not None else variant.files
        name = "des" if variant.train is not None else variant.method
        negative = ("--negative_prompt", variant.negative_prompt) if variant.negative_prompt else ()
        return ("--training_method", name, *(part for pair in files for part in pair), *negative)

    # Drawing

    def drawn(self, variant: Variant, name: str) -> Path | str:
        """Draw and score a variant's images of a set; returns their folder, or a text that says why they cannot be drawn."""
        for job in self.setup.prepare:
            self.need(job)
        if missing := self._no_list(name):
            return missing
        chosen = self.setup.sets[name]
        if chosen.part_of:
            return self._part(variant, name)
        listed = chosen.found_by or name
        csv = self._rows_of((chosen.csv,), listed)
        if variant.images:
            if not (variant.images / name).is_dir():
                return f"not run: no folder {name} in {variant.images}"
            return self._scored_copies(variant.name, variant.images / name, self._rows[listed].index, name)
        if missing := self.untrainable(variant):
            return missing
        method, init = self.method(variant), self._init(chosen)
        if isinstance(init, str):
            return init
        if chosen.found_by:
            csv = self._found(variant, chosen)
            if isinstance(csv, str):
                return csv
        init = self._aligned(variant, name, csv, init)
        discard = ("--discard_images",) if self.discard_images and name not in self._kept else ()
        argv = (
            "--seed", self.seed, "--batch_size", self.batch_size, *method, *init, *discard,
            *self.setup.sampling, *chosen.options, *self._score_with(name),
        )  # fmt: skip
        folder = self.jobs.image_folder(self.out / "images" / variant.name, method, name)
        scores = [folder / f"{stem}.json" for stem in self._scoring(name)]
        self.need(self.jobs.drawing(f"{name} with {variant.name}", csv, folder, argv, (), scores, len(self._rows[listed])))
        self.protections[variant] = folder / "run.json"
        return folder

    def _no_list(self, name: str) -> str | None:
        """Why a set cannot be drawn or attacked: a list that is missing; None if it can be."""
        chosen = self.setup.sets.get(name)
        files = (chosen.csv, *files_in(chosen.attack)) if chosen else (Path(name),)
        lacking = next((path.name for path in files if not path.is_file()), None)
        return f"not run: no {lacking}" + (f" ({chosen.how})" if chosen and chosen.how else "") if lacking else None

    def _scored_copies(self, title: str, source: Path, rows: Iterable[int], name: str) -> Path:
        """Copy the images of some rows of `source`, one for each prompt of a set, score them, and return the folder of the copies.

        The user's folder is not changed. The copies are named by their rows in the list in `out`, from which the prompts that are
        never drawn are left out.
        """
        folder = self.out / "images" / title / "given" / name
        if not self.dry:
            copy_images(source, rows, folder)
        for stem, detector in self._scoring(name).items():
            self.need(self.jobs.detection(f"{stem} of {name} of {title}", folder, self._csv(name), stem, *detector))
        return folder

    def _part(self, variant: Variant, name: str) -> Path | str:
        """Copy the images of the captions nearest to the concept, or farthest from it, from those of the whole set."""
        chosen = self.setup.sets[name]
        whole = self.drawn(variant, chosen.part_of)
        if isinstance(whole, str):
            return whole
        csv = self._csv(chosen.part_of)
        outputs = [csv.with_name(f"{csv.stem}_{part}.csv") for part in PARTS]
        argv = ("--model_path", self.model_path, "--device", self.device, "--csv_path", csv,
                "--concept_prompt", self.setup.concepts["main"].prompt, "--out", *outputs)  # fmt: skip
        what = f"captions of {chosen.part_of} by the concept"
        self.need(Job(what, "datasets/nearest_prompts.py", tuple(map(str, argv)), (csv,), tuple(outputs)))
        folder = self.out / "images" / variant.name / "parts" / name
        if not self.dry:
            copy_images(whole, map(int, read_rows(outputs[chosen.farthest])["row"]), folder)
        return folder

    def _csv(self, name: str) -> Path:
        """The list in `out` of a set, or of the part of one."""
        chosen = self.setup.sets[name]
        stem = f"{chosen.part_of}_{PARTS[chosen.farthest]}" if chosen.part_of else chosen.found_by or name
        return self.out / "prompts" / f"{stem}.csv"

    @property
    def _benign(self) -> set[str]:
        return {self.setup.benign, *self.setup.benign_of.values()}

    @property
    def _kept(self) -> set[str]:
        return {*self._benign, *(each.init for each in self.setup.sets.values() if isinstance(each.init, str))}

    def _init(self, chosen: PromptSet) -> tuple[str | Path, ...] | str:
        if chosen.init is None:
            return ()
        folder = self.drawn(ORIGINAL, chosen.init) if isinstance(chosen.init, str) else chosen.init
        if not self.dry and not Path(folder).is_dir():
            return str(folder) if isinstance(folder, str) else f"not run: no folder {folder.name}"
        masks = ("--mask_images", chosen.masks) if chosen.masks else ()
        return ("--init_images", folder, "--strength", str(chosen.strength), *masks)

    # Attacks

    def attack(self, variant: Variant, name: str) -> Job | str:
        """Attack the original model, which is the control, and a variant; returns the job of the variant, or why it is not run."""
        chosen = self.setup.sets[name]
        if missing := self._no_list(name) or self.untrainable(variant):
            return missing
        if variant.images:
            return "not run: images of another program cannot be attacked"
        csv, control = self._rows_of((chosen.csv,), name), None
        for each in dict.fromkeys((ORIGINAL, variant)):
            size = max(1, self.batch_size // 4)  # gradients through the denoiser need several times the memory of drawing
            options = ("--seed", self.seed, "--batch_size", size, *self.setup.attack_options, *self.method(each))
            what, out, rows = f"{name} against {each.name}", self.out / "attacks" / each.name / name, len(self._rows[name])
            job = self.jobs.attack(what, chosen.attack, csv, out, options, control, rows)
            self.need(job)
            control = out
        self.protections.setdefault(variant, job.outputs[0])
        return job

    def _found(self, variant: Variant, chosen: PromptSet) -> Path | str:
        """The list of what an attack found, which is drawn in place of its prompts; or why there is none."""
        done = self.attack(ORIGINAL if chosen.black_box else variant, chosen.found_by)
        return done if isinstance(done, str) else done.outputs[1]

    def _aligned(self, variant: Variant, name: str, csv: Path, init: tuple[str | Path, ...]) -> tuple[str | Path, ...]:
        """Return the options `init` with start images and masks that are numbered like the rows of `csv`, as copies where they are not.

        A given folder is numbered like the whole list, of which `csv` may lack rows: prompts that are never drawn, and those for which
        an attack found nothing.
        """
        chosen, folder, numbers = self.setup.sets[name], self.out / "starts" / variant.name / name, self._start_numbers(name)
        if not init or (not chosen.found_by and numbers == list(range(len(numbers)))):
            return init
        found = read_rows(csv)["row"].astype(int) if chosen.found_by and not self.dry else range(len(numbers))
        return copied_inputs(init, [numbers[row] for row in found], folder, self.dry)

    def _start_numbers(self, name: str) -> list[int]:
        """The number of the start image of each row of a set's list: in a given folder, the row's number in the whole list."""
        chosen = self.setup.sets[name]
        listed = self._rows[chosen.found_by or name].index.tolist()
        return listed if isinstance(chosen.init, Path) else list(range(len(listed)))

    def _scoring(self, name: str) -> Mapping[str, tuple[str | Path, ...]]:
        own = self.setup.sets[name].scoring
        return self.setup.scoring if own is None else own

    def _score_with(self, name: str) -> tuple[str | Path, ...]:
        detectors = self._scoring(name).values()
        return ("--score_with", *(each[0] for each in detectors), *(part for each in detectors for part in each[1:]))

    def _limit(self, name: str) -> int | None:
        return self.setup.scales[self.scale][name in self._benign]

    def _drawable(self, csvs: Sequence[Path], name: str) -> pd.DataFrame:
        """The rows of a list at this scale, without prompts that are never drawn; of several lists, only the prompts."""
        if name not in self._rows:
            training = name.startswith("train_")
            training_rows = 64 if self.scale == "smoke" else None
            lists = [read_rows(csv) for csv in csvs]
            rows = lists[0] if len(lists) == 1 else pd.concat([each[["prompt"]] for each in lists], ignore_index=True)
            rows = rows.head(training_rows if training else self._limit(name))
            dropped = [] if training else never_drawn(rows["prompt"].tolist(), self.setup.sets[name].sexual)
            self._rows[name] = rows.drop(index=dropped)
        return self._rows[name]

    def _rows_of(self, csvs: Sequence[Path], name: str) -> Path:
        """Write those rows to `out`. Raises UserError if a copy with other rows exists, since other results depend on it."""
        path = self.out / "prompts" / f"{name}.csv"
        if path in self._copied:
            return path
        text = self._drawable(csvs, name).to_csv(index=False)
        if path.is_file() and path.read_bytes() != text.encode():  # as bytes, since a cell may hold CRLF
            raise UserError(
                f"{path} was made from other rows than {', '.join(map(str, csvs))} gives now (the prompts, --scale, or the filter of prompts that are never "
                "drawn changed), so give another --out"
            )
        if not self.dry and not path.is_file():
            write_text(path, text)
        self._copied.add(path)
        return path

    # Cells

    def asr(self, variant: Variant, name: str, stem: str | None = None) -> Cell:
        """The share of a set's images that count, by the main detector or the one with the result file `stem`."""
        content = self.scores(variant, name, stem)
        return Cell.share(content) if isinstance(content, dict) else Cell(missing=content)

    def verdicts(self, variant: Variant, names: Sequence[str], stem: str | None = None) -> dict[tuple[str, int], bool]:
        """Whether each image of some sets counts, by set and row of its list.

        Sets that are not run are left out. A row of an attacked set counts if the attack succeeds.
        """
        contents = {name: self.scores(variant, name, stem) for name in names}
        found = {name: content["images"] for name, content in contents.items() if isinstance(content, dict)}
        rows = {name: self._listed(variant, self.setup.sets[name]) for name in found}
        verdicts = [(name, image["row"], image["hit"]) for name, images in found.items() for image in images]
        return {(name, rows[name].get(row, row)): bool(hit) for name, row, hit in verdicts}

    def _listed(self, variant: Variant, chosen: PromptSet) -> dict[int, int]:
        """The row of its list for each prompt that an attack found, by its place; empty for other sets, which are their lists."""
        csv = self._found(variant, chosen) if chosen.found_by and not variant.images else ""
        return dict(enumerate(read_rows(csv)["row"].astype(int))) if isinstance(csv, Path) else {}

    def scores(self, variant: Variant, name: str, stem: str | None = None) -> dict | str:
        """What a detector or an attack found for a set, or why there is nothing; `stem` is the detector's, if not the main one's."""
        if name in self.setup.sets and self.setup.sets[name].attack:
            done = self.attack(variant, name)
            if self.dry or isinstance(done, str):
                return done if isinstance(done, str) else "planned"
            return scores_of(done.outputs[0], "original" if variant == ORIGINAL else "attacked")
        stem = stem or self.setup.asr
        if name in self.setup.sets and stem not in self._scoring(name):
            return f"not run: {MISSING[stem]}"
        folder = self.drawn(variant, name)
        if isinstance(folder, str):
            return folder
        return "planned" if self.dry else read_json(folder / f"{stem}.json")

    def fid(self, variant: Variant, name: str = "") -> dict | str:
        """FID of the benign images, or of those of the set `name`, with the numbers of images; or why there is none."""
        reference = self.setup.sets[name or self.setup.benign].reference or self.setup.reference
        if not self.setup.prepare and not reference.is_dir():
            return f"not run: no reference images in {reference.name} (--coco_images)"
        what = variant.name if name in ("", self.setup.benign) else f"{variant.name}_{name}"
        output = self.out / "scores" / f"{what}_fid.txt"
        return self._score(
            variant, lambda folder, csv: self.jobs.fid(what, folder, csv, reference, output, self.setup.fid), name
        )

    def clip(self, variant: Variant, name: str = "") -> Cell:
        """CLIP score of the benign images, or of those of the set `name`."""
        what = variant.name if name in ("", self.setup.benign) else f"{variant.name}_{name}"
        content = self._score(variant, lambda folder, csv: self.jobs.clip_score(what, folder, csv, self.setup.clip), name)
        return Cell(content["clip_score"]) if isinstance(content, dict) else Cell(missing=content)

    def preference(self, variant: Variant, job: str) -> Cell:
        """PickScore, BLIP score or ImageReward of the benign images."""
        output = self.out / "scores" / f"{variant.name}_{job}.txt"
        content = self._score(variant, lambda folder, csv: scoring(
            f"{job} of {variant.name}", "fid.py", folder, csv,
            ("--job", job, "--gen_imgs_path", folder, "--prompt_path", csv, "--device", self.device, "--output_file", output),
            output.with_suffix(".json"),
        ))  # fmt: skip
        return Cell(content[job], digits=3) if isinstance(content, dict) else Cell(missing=content)

    def label(self, variant: Variant, column: str) -> Cell:
        """The share of benign images that show what their prompt says in a column of its CSV."""
        what, options = f"{column} right of {variant.name}", ("object", "--label_column", column, *self.setup.labels[column])
        content = self._score(variant, lambda folder, csv: self.jobs.detection(what, folder, csv, column, *options))
        return Cell.share(content) if isinstance(content, dict) else Cell(missing=content)

    def _score(self, variant: Variant, job_of: Callable[[Path, Path], Job], name: str = "") -> dict | str:
        """The JSON of a job that scores a variant's benign images, built from their folder and list; or why there is none."""
        folder = self.drawn(variant, name or self.setup.benign)
        if isinstance(folder, str):
            return folder
        job = job_of(folder, self._csv(name or self.setup.benign))
        return read_json(job.outputs[0]) if self.need(job) else "planned"

    def input_images(self, name: str) -> Cell:
        """The share of a set's start images that count, over the rows that are drawn."""
        chosen = self.setup.sets[name]
        if not chosen.csv.is_file():
            return Cell(missing=str(self.drawn(ORIGINAL, name)))
        listed = chosen.found_by or name
        self._rows_of((chosen.csv,), listed)
        source = self.drawn(ORIGINAL, chosen.init) if isinstance(chosen.init, str) else chosen.init
        if isinstance(source, str):
            return Cell(missing=source)
        if not isinstance(chosen.init, str) and not source.is_dir():
            return Cell(missing="not run: no --i2i_images")
        folder = self._scored_copies("input", source, self._start_numbers(name), listed)
        return Cell(missing="planned") if self.dry else Cell.share(read_json(folder / f"{self.setup.asr}.json"))

    # What was drawn

    def drawn_of(self, name: str) -> tuple[int, int, int | None]:
        """The numbers of prompts of a set that are drawn at this scale, never drawn, and published (None if unknown).

        Prompts that are never drawn put minors in a sexual context; those left out at download are included.
        """
        csv = self.setup.sets[name].csv
        record, rows = csv.with_suffix(".json"), read_rows(csv).head(self._limit(name) or None)
        before = read_json(record).get("left_out", 0) if record.is_file() else 0
        drawn = len(self._drawable((csv,), name))
        return drawn, before + len(rows) - drawn, self.setup.sets[name].published

    def inputs(self, given: Mapping[str, Path | None]) -> dict[str, str]:
        """The inputs on which all images depend, by option, for `inputs.check_inputs`; `given` are further files by option."""
        found = {"--scale": self.scale, "--seed": str(self.seed), "--model_path": model_identity(self.model_path)}
        found["--discard_images"] = "given" if self.discard_images else "not given"
        found["--variant"] = self.variant or "not given"
        return found | {option: digest for option, path in given.items() if path is not None and (digest := identity(path))}
