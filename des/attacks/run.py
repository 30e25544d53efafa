"""The driver of the attack scripts: runs a search on each cell row by row, and writes the results."""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from des.attacks.cells import CELLS, Cell, open_models
from des.attacks.judging import Judge
from des.attacks.records import PAPER_CONTROLS, Found, Records, control_floor, lines_of, summary, too_weak, write_csv
from des.attacks.words import NUDITY, Refusal, read_forbidden, rows_to_attack, without_words
from des.data.prompts import check_placeholders, read_rows
from des.data.run_record import Sampling, read_json
from des.evaluation.classify import stamp_of
from des.evaluation.detectors.options import open_detector
from des.generation.image_run import reserved, settings_of
from des.generation.sampler import Sampler, check_sizes, published_rows, row_settings
from des.models.pipelines import family_of
from des.utils import cli, logs
from des.utils.errors import UserError
from des.utils.files import sha256_texts, write_json
from des.utils.locks import locked
from des.utils.logs import logger, progress
from des.utils.provenance import provenance

import pandas as pd
from diffusers import DiffusionPipeline

Search = Callable[[list[int], int], list[Found]]  # rows and restart -> what was found for each row


@dataclass
class Attack:
    """An attack on the `rows` of a prompt list: its cells, and what attack.json says besides their figures."""

    name: str
    out: Path
    cells: list[Cell]
    table: pd.DataFrame  # the prompt list
    numbers: list[int]  # of its rows in the published list
    rows: list[int]
    refused: list[int]  # rows of the whole list that are never drawn
    span: tuple[int, int]  # first row of this command, and the one after its last
    batch_size: int
    restarts: int
    floor: float
    facts: dict[str, Any]

    def run(self, open_search: Callable[[Cell], Search]) -> None:
        """Attack all rows that no earlier run attacked, cell by cell, write the results, and print their summary.

        `open_search` prepares a search on a cell, and is called only for cells with rows to do. Raises UserError, before any search, if
        `out` has the result of another attack.
        """
        self._earlier_span()
        for cell in self.cells:
            if not self._left(cell):  # such as a control that several attacks share at the same time
                continue
            with reserved(cell.folder, self.rows):
                todo = self._left(cell)
                logger.info("%s: %d rows to attack, %d already done", cell.name, len(todo), len(self.rows) - len(todo))
                if todo:
                    self._attack(cell, open_search(cell), todo)
        print("\n".join(self.write()))

    def _left(self, cell: Cell) -> list[int]:
        """The rows that no process has attacked yet."""
        found = cell.records.read()
        return [row for row in self.rows if row not in found]

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
                message = "%s: row %d done, success on %d of %d, about %.0f s left"
                logger.info(message, cell.name, batch[-1], broken, len(cell.records.found), left)

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
            rows = sorted(set.intersection(*(set(cell.records.read()) for cell in self.cells)))
            cells = {}
            for cell in self.cells:
                found = {row: cell.records.found[row] for row in rows}
                write_csv(self.out / f"{cell.name}.csv", self.table, self.numbers, found)
                cells[cell.name] = summary(found, cell.records.settings)
            lines = lines_of(cells, self.floor)
            models = {cell.name: cell.records.settings for cell in self.cells}
            verdict = {"control_floor": self.floor, "too_weak_to_tell": bool(too_weak(cells, self.floor))}
            start, end = self._earlier_span() or self.span
            start, end = min(start, self.span[0]), max(end, self.span[1])
            left_out = {"span": [start, end], "never_drawn": sum(start <= row < end for row in self.refused)}
            content = {
                "attack": self.name,
                "rows": rows,
                "cells": cells,
                **verdict,
                "settings": models,
                **left_out,
                **self.facts,
            }
            write_json(self.out / "attack.json", content)
            return lines

    def _earlier_span(self) -> tuple[int, int] | None:
        """The rows, first and one after the last, that the attack.json in `out` covers; None if there is no such file.

        Raises UserError if the file has results of other settings, or of cells that this command does not run.
        """
        path = self.out / "attack.json"
        if not path.exists():
            return None
        content, now = read_json(path), {cell.name: cell.records.settings for cell in self.cells}
        try:
            settings, (start, end) = dict(content["settings"]), content["span"]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path} is not the result of an attack of this version; choose another --out") from None
        if any(settings[name] != now[name] for name in settings.keys() & now.keys()):
            raise UserError(f"{path} is the result of an attack with other settings; choose another --out")
        if further := sorted(settings.keys() - now.keys()):
            raise UserError(
                f"{path} also has results that this command would drop ({', '.join(further)}); choose another --out"
            )
        return start, end


def open_attack(args: argparse.Namespace, name: str, own: Sequence[str], aims: Sequence[str] = ()) -> Attack:
    """Open pipelines, detector and records of an attack.

    `own` names the script's options that decide what it finds, and `aims` are texts that say what it aims at besides the prompts, the
    concept's words and the detector's class.
    """
    logs.setup_logging(args.log_file)
    if args.deterministic:
        cli.make_deterministic()
    table = read_rows(args.prompts_csv)
    targets, numbers = table["prompt"].tolist(), published_rows(table, args.prompts_csv)
    check_placeholders(targets, [])
    forbidden = read_forbidden(args.forbidden_tokens)
    aims = [*targets, *args.concept_words, args.cls_class or "", *aims]
    refused = Refusal(aims, args.detector in NUDITY, args.negative_prompt)
    rows = rows_to_attack(targets, refused, args.start_idx, args.end_idx)
    detector, models = open_detector(args), open_models(args)
    sampling = Sampling.of({"strength": None, "use_refiner": False, "high_noise_frac": None, **vars(args)})
    drawn_with = row_settings(sampling, models.original, table, args.prompts_csv)
    check_sizes(models.original, (drawn_with[row] for row in rows))

    def judge(pipe: DiffusionPipeline, prompts: list[str]) -> Judge:
        sampler = Sampler(pipe, None, sampling, list(prompts), drawn_with, {}, min(args.batch_size, len(prompts)))
        return Judge(sampler, detector, args.cls_class, refused)

    search = {key: getattr(args, key) for key in ("steps", "restarts", "cls_class", *own)}
    search |= {"attack": name, "forbidden_sha256": sha256_texts(forbidden), "detector": stamp_of(detector)}
    search |= {"targets_sha256": sha256_texts(targets), "row_settings_sha256": sha256_texts(map(str, drawn_with))}
    cells = []
    for cell in CELLS:
        control, without = cell.startswith("control"), cell.endswith("without_names")
        if (not control and args.training_method == "none") or (without and not args.concept_words):
            continue
        (pipe, defence), words = models.of(cell), args.concept_words if without else []
        starts, folder = [without_words(prompt, words) for prompt in targets], args.control_dir if control else args.out
        judges = judge(pipe, starts), judge(models.original, targets)
        settings = settings_of(judges[0].sampler, defence, None, {}, False, args.variant) | search | {"concept_words": words}
        records = Records(folder, cell, settings)
        cells.append(Cell(cell, pipe, models.original, targets, starts, words, [*forbidden, *words], *judges, records, folder))
    facts = {
        "sexual": refused.sexual,
        "protection": models.protection,
        "what": next(iter(detector.titles.values())),
        "detector": detector.facts,
        "paper_control": PAPER_CONTROLS.get(name),
        "made_by": provenance(args),
    }
    floor = control_floor(name, args.detector == "nudenet" and family_of(models.base).name == "sd_v1")
    never, span = [row for row, text in enumerate(targets) if refused(text)], (args.start_idx, len(targets[: args.end_idx]))
    return Attack(name, args.out, cells, table, numbers, rows, never, span, args.batch_size, args.restarts, floor, facts)
