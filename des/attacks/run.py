"""The driver of the attack scripts: opens the attacked and the original pipeline, runs a search on each cell, and writes the results."""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from des.attacks.judging import Judge
from des.attacks.records import CELLS, PAPER_CONTROLS, Found, Records, control_floor, lines_of, summary, too_weak, write_csv
from des.attacks.words import Refusal, read_forbidden, without_words
from des.data.prompts import never_drawn, read_rows, rows_to_draw
from des.data.run_record import Sampling
from des.evaluation.classify import stamp_of
from des.evaluation.detectors.base import Detector
from des.evaluation.detectors.options import open_detector
from des.generation.defences import Defence, open_defence
from des.generation.image_run import reserved, settings_of
from des.generation.options import open_dtype, open_guidance
from des.generation.sampler import Sampler, check_sizes, published_rows, row_settings
from des.models.encoders import TextEncoder
from des.models.loading import loading
from des.models.pipelines import encoder_modules, family_of, open_pipeline, place, text_encoder
from des.search.tokens import TokenPrompt, Vocabulary
from des.utils import cli, logs
from des.utils.errors import UserError
from des.utils.files import sha256_texts, write_json
from des.utils.locks import locked
from des.utils.logs import logger, progress
from des.utils.provenance import provenance

import pandas as pd
from diffusers import DiffusionPipeline
from torch import nn


@dataclass
class Cell:
    """A model under a condition. `starts` and `targets` are prompts by row; without names, the starts lack the concept's words."""

    name: str
    pipe: DiffusionPipeline  # that draws the candidates
    original: DiffusionPipeline
    targets: list[str]
    starts: list[str]
    words: list[str]  # that were taken out of the starts; empty with names
    forbidden: list[str]  # in found prompts
    judge: Judge
    images: Judge  # draws with the original pipeline
    records: Records
    seed: int
    folder: Path  # of the records
    never_drawn: set[int]  # rows

    def vocabulary(self, encoder: TextEncoder) -> Vocabulary:
        """The tokens that a search of this cell may use."""
        return Vocabulary(encoder, self.forbidden, self.judge.refused)

    def encoders(self, which: Sequence[int] | None, search_on: str = "attacked") -> tuple[list[TextEncoder], list[TextEncoder]]:
        """The text encoders to search on and the same ones of the original pipeline, as the pipeline reads them."""
        known = self.pipe if search_on == "attacked" else self.original
        has = list(encoder_modules(known))
        if lacking := set(which or ()) - set(has):
            raise UserError(f"--encoders {min(lacking)}: the pipeline has the text encoders {', '.join(map(str, has))}")
        return tuple([text_encoder(pipe, i, "pipeline") for i in which or has] for pipe in (known, self.original))

    def judged(self, rows: list[int], found: Sequence[TokenPrompt], tried: int) -> list[Found]:
        """Draw and judge what a search found for each row from `tried` candidates."""
        hits = self.judge.hits(rows, [each.text for each in found])
        return [Found(*each, tried, [hit] if hit is not None else []) for each, hit in zip(found, hits, strict=True)]


Search = Callable[[list[int], int], list[Found]]  # rows and restart -> what was found for each row


@dataclass
class Attack:
    """An attack on a list of prompts: its cells, and where its results go."""

    name: str
    out: Path
    cells: list[Cell]
    table: pd.DataFrame
    numbers: list[int]
    rows: list[int]
    detector: Detector
    batch_size: int
    restarts: int
    floor: float
    facts: dict[str, Any]

    def run(self, open_search: Callable[[Cell], Search]) -> None:
        """Attack all rows that no earlier run attacked, cell by cell, write the results, and print their summary.

        `open_search` prepares a search on a cell, and is called only for cells with rows to do.
        """
        for cell in self.cells:
            with reserved(cell.folder, self.rows):
                cell.records.read()
                todo = [row for row in self.rows if row not in cell.records.found]
                logger.info("%s: %d rows to attack, %d found done", cell.name, len(todo), len(self.rows) - len(todo))
                if todo:
                    self._attack(cell, open_search(cell), todo)
        print("\n".join(self.write()))

    def _attack(self, cell: Cell, search: Search, todo: list[int]) -> None:
        start = time.monotonic()
        with progress(None, desc=cell.name, total=len(todo), unit="row") as bar:
            for at in range(0, len(todo), self.batch_size):
                batch = todo[at : at + self.batch_size]
                for row, found in zip(batch, self._rows(cell, search, batch), strict=True):
                    cell.records.add(row, found)
                bar.update(len(batch))
                done, broken = at + len(batch), sum(any(each.hits) for each in cell.records.found.values())
                left = (time.monotonic() - start) / done * (len(todo) - done)
                logger.info(
                    "%s: row %d done, %d of %d broken, about %.0f s left",
                    cell.name,
                    batch[-1],
                    broken,
                    len(cell.records.found),
                    left,
                )

    def _rows(self, cell: Cell, search: Search, batch: list[int]) -> list[Found]:
        """Search each row until it is broken or the restarts are used up; the starting prompt is judged first."""
        before = cell.judge.hits(batch, [cell.starts[row] for row in batch])
        found: dict[int, Found] = {}
        for restart in range(self.restarts):
            rows = [row for row in batch if row not in found or not any(found[row].hits)]
            start = time.monotonic()
            for row, each in zip(rows, search(rows, restart) if rows else [], strict=True):
                each.seconds = (time.monotonic() - start) / len(rows)
                found[row] = found[row].then(each) if row in found else each
        for row, hit in zip(batch, before, strict=True):
            found[row].before = bool(hit)
        return [found[row] for row in batch]

    def write(self) -> list[str]:
        """Write attack.json and a CSV per cell over the rows that all cells have, those of other processes too; returns the summary."""
        with locked(self.out / ".attack.lock", "the results of an attack", wait=True):
            found = {cell.name: cell.records.read() for cell in self.cells}
            rows = sorted(set.intersection(*map(set, found.values())))
            cells = {}
            for name, each in found.items():
                mine = {row: each[row] for row in rows}
                write_csv(self.out / f"{name}.csv", self.table, self.numbers, mine)
                cells[name] = summary(mine)
            lines = lines_of(cells, self.floor)
            models = {cell.name: cell.records.settings for cell in self.cells}
            verdict = {"control_floor": self.floor, "too_weak_to_tell": bool(too_weak(cells, self.floor))}
            content = {"attack": self.name, "rows": rows, "cells": cells, **verdict, "settings": models, **self.facts}
            write_json(self.out / "attack.json", content)
            return lines


def open_attack(args: argparse.Namespace, name: str, own: Sequence[str]) -> Attack:
    """Open pipelines, detector and records of an attack; `own` names the script's options that decide what it finds."""
    logs.setup_logging(args.log_file)
    if args.deterministic:
        cli.make_deterministic()
    table = read_rows(args.prompts_csv)
    targets = table["prompt"].tolist()
    rows = rows_to_draw(targets, args.start_idx, args.end_idx)
    forbidden = read_forbidden(args.forbidden_tokens)
    dtype, detector, defence = open_dtype(args), open_detector(args), open_defence(args)
    base = defence.base_model_path or args.model_path
    original = open_pipeline(base, dtype, args.model_type, args.scheduler)
    open_guidance(args, original)
    attacked = (
        copied(original, base)
        if base == args.model_path
        else open_pipeline(args.model_path, dtype, args.model_type, args.scheduler)
    )
    applied = defence.apply(attacked)
    for pipe in (original, attacked):
        place(pipe, args.device)
        freeze(pipe)
    sampling = Sampling.of({"strength": None, "use_refiner": False, "high_noise_frac": None, **vars(args)})
    drawn_with = row_settings(sampling, original, table, args.prompts_csv)
    check_sizes(original, (drawn_with[row] for row in rows))
    refused, label = Refusal(targets), args.cls_class
    size = min(args.batch_size, len(targets))
    unprotected = Defence("none", base, None, {}, None, None)

    def judge(pipe: DiffusionPipeline, prompts: list[str]) -> Judge:
        return Judge(Sampler(pipe, None, sampling, list(prompts), drawn_with, {}, size), detector, label, refused)

    search = {key: getattr(args, key) for key in ("steps", "restarts", *own)} | {
        "attack": name,
        "forbidden": sha256_texts(forbidden),
    }
    search |= {"detector": stamp_of(detector), "cls_class": label}
    cells = []
    for cell in CELLS:
        control, without = cell.startswith("control"), cell.endswith("without_names")
        if (control and args.training_method == "none") or (without and not args.concept_words):
            continue
        pipe, by = (original, unprotected) if control else (attacked, defence)
        folder = args.control_dir if control else args.out
        words = args.concept_words if without else []
        starts = [without_words(prompt, words) for prompt in targets]
        each = judge(pipe, starts)
        settings = settings_of(each.sampler, by, None, {}, False) | search | {"concept_words": words}
        records = Records(folder, cell, settings)
        cells.append(
            Cell(
                cell,
                pipe,
                original,
                targets,
                starts,
                words,
                [*forbidden, *words],
                each,
                judge(original, targets),
                records,
                args.seed,
                folder,
                set(never_drawn(targets)),
            )
        )
    left_out = len(targets[args.start_idx : args.end_idx]) - len(rows)
    facts = {
        "never_drawn": left_out,
        "protection": applied,
        "detector": detector.facts,
        "paper_control": PAPER_CONTROLS.get(name),
        "made_by": provenance(args),
    }
    floor = control_floor(name, args.detector == "nudenet" and family_of(base).name == "sd_v1")
    numbers = published_rows(table, args.prompts_csv)
    return Attack(name, args.out, cells, table, numbers, rows, detector, args.batch_size, args.restarts, floor, facts)


def copied(pipe: DiffusionPipeline, model_path: str) -> DiffusionPipeline:
    """Return a copy of a pipeline whose text encoders, tokenizers and UNet may be changed; it shares all other components."""
    twin = copy.copy(pipe)
    for name, component in pipe.components.items():
        if component is not None and name.startswith(("text_encoder", "unet")):
            setattr(twin, name, copy.deepcopy(component))
        elif component is not None and name.startswith("tokenizer"):  # deepcopy would lose the decoder of a CLIPTokenizer
            with loading(f"the {name} of {model_path}"):
                setattr(twin, name, type(component).from_pretrained(model_path, subfolder=name))
    return twin


def freeze(pipe: DiffusionPipeline) -> None:
    """Put a pipeline's modules into eval mode, without gradients of their weights."""
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
