"""Builds the report as one HTML page from page.html; style, script and images are inside, so the page loads nothing."""

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from des.data.prompts import read_prompts
from des.evaluation.results import Score
from des.models.checkpoints import checkpoint_path, load_checkpoint
from des.models.encoders import load_encoder
from des.report import figures
from des.report.attacks import CONDITIONS, AttackRow, attack_rows
from des.report.classes import ClassTable, class_tables
from des.report.collect import TrainingRun, collect, collect_attacks
from des.report.compare import LOWER_IS_BETTER, SHARES, Comparison, Measure, Spread, compare, headline, seed_columns
from des.report.embedding_map import EmbeddingMap, draw_map
from des.report.naming import attack_labels
from des.report.pictures import GalleryRow, gallery
from des.report.provenance import ProvenanceEntry, machine, of_attack, of_images, of_training, short_path
from des.utils.choices import CHECKPOINT_FORMATS as FORMATS
from des.utils.errors import UserError

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

GENERATOR = "DES report"
MARK = f'<meta name="generator" content="{GENERATOR}">'
_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Plot:
    """A figure with its caption."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class ModelReport:
    """The content of the page about one original model and the models protected from it."""

    name: str
    comparison: Comparison
    headline: list[str]
    summary: list[Plot]
    attacks: list[AttackRow]
    paretos: list[Plot]
    classes: list[tuple[ClassTable, Plot | None]]
    galleries: list[tuple[str, list[GalleryRow]]]


@dataclass(frozen=True)
class Options:
    """The options of scripts/report.py; with `prompts` None only prompts of the demo's lists are quoted, and none that attacks found."""

    benign_sets: Sequence[str] | None = None
    images: int = 12  # rows a set
    pictures: bool = True
    prompts: bool | None = None
    map: bool = True

    @property
    def flags(self) -> list[str]:
        """The options as a command line."""
        benign = [] if self.benign_sets is None else ["--benign_sets", *self.benign_sets]
        given = {"--no_images": not self.pictures, "--prompts": self.prompts, "--no_prompts": self.prompts is False}
        given["--no_map"] = not self.map
        return ["--images", str(self.images), *benign, *(flag for flag, on in given.items() if on)]


def build(run_dirs: Sequence[Path], out: str, options: Options, device: torch.device, made_by: Mapping[str, Any]) -> str:
    """Build the HTML of the report about the runs in `run_dirs`; raises UserError for a run that cannot be reported.

    `out` is the name of the page's file and `made_by` the provenance of this process; both are shown in the page.
    """
    runs, trainings = collect(run_dirs)
    attacks = collect_attacks(run_dirs)
    comparisons = compare(runs, options.benign_sets, attacks)
    others = [short_path(each.folder) for each in attacks if not any(each in comparison.attacks for comparison in comparisons)]
    reports = [_model_report(comparison, f"c{i}", options) for i, comparison in enumerate(comparisons)]
    titles = training_titles(trainings)
    losses, maps = [], []
    for i, (run, title) in enumerate(zip(trainings, titles, strict=True)):
        if run.steps:
            losses.append(Plot(figures.losses(run, f"losses{i}", title), title))
        if options.map:
            maps += [Plot(svg, title) for svg in figures.maps(map_of(run, device), f"map{i}", title)]
    line = ["python", "scripts/report.py", *map(short_path, run_dirs), "--out", out, *options.flags]
    entries = _provenance(comparisons, trainings, titles)
    named = list(zip(attacks, map(", ".join, attack_labels(attacks)), strict=True))
    entries += [(f"attack, {title}", [of_attack(each, title)]) for each, title in named]
    entries.append(("this page", [ProvenanceEntry("this page", machine({**made_by, "device": None}), shlex.join(line))]))
    return render(model_reports=reports, other_attacks=others, losses=losses, maps=maps, provenance_entries=entries)


def _model_report(comparison: Comparison, name: str, options: Options) -> ModelReport:
    summary = []
    for kinds, title, hint in (
        (("asr", "attacked"), "Attack success", "lower is better"),
        (("benign_hits",), "Detector hits on benign prompts", "lower is better"),
        (("accuracy",), "Benign accuracy", "higher is better"),
    ):
        measures = comparison.of_kind(*kinds)
        if measures:
            what = {measure.title for measure in measures}
            caption = f"{title}{f', {min(what)}' if len(what) == 1 else ''}; {hint}"
            summary.append(Plot(figures.shares(comparison, f"{name}-{kinds[0]}", title, measures), caption))
    paretos = [Plot(svg, sets) for svg, sets in figures.paretos(comparison, f"{name}-pareto")]
    tables = class_tables(comparison)
    drawn = [None if table.shares else _class_plot(comparison, f"{name}-classes{i}", table) for i, table in enumerate(tables)]
    galleries = []
    if options.pictures:
        galleries = [(each.title, gallery(comparison, each, options.images, options.prompts)) for each in comparison.sets]
    attacks, classes = attack_rows(comparison, bool(options.prompts)), list(zip(tables, drawn, strict=True))
    return ModelReport(comparison.base, comparison, headline(comparison), summary, attacks, paretos, classes, galleries)


def _class_plot(comparison: Comparison, name: str, table: ClassTable) -> Plot | None:
    """A bar plot of a table; None if every count is 0."""
    if not any(count for row in table.images.values() for count in row):
        return None
    caption = f"{table.set_name}, {table.title}: {table.what}"
    return Plot(figures.counts(comparison, name, f"{table.set_name}, {table.title}", table.images), caption)


def training_titles(trainings: Sequence[TrainingRun]) -> list[str]:
    """Titles of training runs from their settings, with the folder if these are equal."""
    titles = []
    for run in trainings:
        shown = (("learning rate", "learning_rate"), ("λ", "lambda_safe"), ("seed", "seed"))
        parts = [f"{words} {run.metadata[name]}" for words, name in shown if name in run.metadata]
        titles.append(", ".join([f"text encoder {run.metadata.get('encoder', 1)}", *parts]))
    return [
        title if titles.count(title) == 1 else f"{title} ({short_path(run.folder)})"
        for run, title in zip(trainings, titles, strict=True)
    ]


def map_of(run: TrainingRun, device: torch.device) -> EmbeddingMap:
    """Map the prompts of a training run by the original and the trained encoder; UserError if a file of the run is missing."""
    try:
        made_by = run.metadata["made_by"]["arguments"]
        files = [checkpoint_path(run.checkpoint, kind) for kind in FORMATS]
        trained = next((path for path in files if path.exists()), files[0])
        concept = made_by["concept_prompt"]
        groups = {
            "safe": read_prompts(Path(made_by["safe_csv_path"])), "unsafe": read_prompts(Path(made_by["unsafe_csv_path"])),
            "concept": concept if isinstance(concept, list) else [concept], "empty": [""],
        }  # fmt: skip
        how = made_by["model_path"], made_by["text_encoder_idx"], device, made_by["embedding"], made_by["max_sequence_length"]
        original, protected = (load_encoder(*how, variant=made_by.get("variant")) for _ in range(2))
        load_checkpoint(protected.model, trained)
    except UserError as error:
        raise UserError(f"the map of embeddings of {run.folder} cannot be drawn: {error}; --no_map leaves it out") from None
    except (KeyError, TypeError, AttributeError):
        reason = "its metadata lacks the model or the prompt lists of the training"
        raise UserError(f"the map of embeddings of {run.folder} cannot be drawn: {reason}; --no_map leaves it out") from None
    return draw_map(original, protected, groups)


def _provenance(
    comparisons: Sequence[Comparison], trainings: Sequence[TrainingRun], titles: Sequence[str]
) -> list[tuple[str, list[ProvenanceEntry]]]:
    """Provenance of the image runs, then of the training runs."""
    entries = []
    for comparison in comparisons:
        for images in comparison.sets:
            for i, run in images.runs.items():
                title = f"{images.name}, {comparison.models[i].label}"
                entries.append((title, of_images(run, title)))
    return [
        *entries,
        *((f"training, {title}", [of_training(run, title)]) for run, title in zip(trainings, titles, strict=True)),
    ]


def render(**content: Any) -> str:
    """Fill in page.html. Texts are escaped, and the page's content security policy forbids requests and other scripts."""
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "; ".join((
        "default-src 'none'", "img-src data:", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'",
        "base-uri 'none'", "form-action 'none'",
    ))  # fmt: skip
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {
        "show": show, "sort_key": sort_key, "spread_of": spread_of, "seed_columns": seed_columns, "shares": SHARES,
        "lower_is_better": LOWER_IS_BETTER, "in_words": in_words, "conditions": CONDITIONS, "counts_of": counts_of,
    }  # fmt: skip
    inside = {"mark": Markup(MARK), "policy": policy, "style": Markup(style), "script": Markup(script)}
    return environment.get_template("page.html").render(**inside, **content)


def show(score: Score) -> tuple[str, str]:
    """A score as two texts: the value, and its counts with the interval."""
    share = score.kind in SHARES
    digits = 1 if share else 4 if score.kind in ("kid", "lpips") else 2
    interval = f" [{score.low:.{digits}f}, {score.high:.{digits}f}]" if score.low is not None and score.high is not None else ""
    return f"{score.value:.{digits}f}{'%' if share else ''}", f"{score.counts}{interval}"


def counts_of(share: Mapping[str, float]) -> str:
    """The counts and the interval of a share of attack.json: `3/60 [1.7, 13.7]`, the interval in percent."""
    return f"{share['k']}/{share['n']} [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"


def in_words(title: str) -> str:
    """The title of a measure with a capital and with ASR spelt out."""
    title = title.replace("ASR of ", "attack success rate (ASR) of ")
    return title[:1].upper() + title[1:]


def sort_key(score: Score | None) -> str:
    """The key by which the page's tables sort scores; missing scores come last."""
    return "" if score is None else repr(score.value)


def spread_of(measure: Measure, models: Sequence[int]) -> Spread | None:
    """The mean and range of a measure over some models; None if one of them lacks it."""
    scores = [measure.scores[i] for i in models]
    return Spread.of([score.value for score in scores]) if all(scores) else None


def check_output(path: Path) -> None:
    """Raise UserError if the output exists and is not a report."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; --out names the page's file")
    if path.exists():
        head = path.read_bytes()[:4096].decode("utf-8", errors="replace")
        if MARK not in head:
            raise UserError(f"{path} exists and is not a report of this script, so it is not replaced; choose another --out")
