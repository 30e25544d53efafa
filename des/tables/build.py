"""Tables of our results beside the paper's, as Markdown, CSV and LaTeX."""

import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from des.utils.stats import Paired, proportion, show_p, stratified

import pandas as pd


@dataclass(frozen=True)
class Cell:
    """One of our values (shares in percent), with k of n and interval if it has them; `missing` says why there is no value."""

    value: float | None = None
    digits: int = 2
    k: int | None = None
    n: int | None = None
    low: float | None = None
    high: float | None = None
    missing: str = "not run"

    @classmethod
    def share(cls, result: Mapping[str, Any]) -> "Cell":
        """The percentage of a scorer's `{"k", "n", "fraction", "low", "high"}`."""
        low, high = 100 * result["low"], 100 * result["high"]
        return cls(100 * result["fraction"], k=result["k"], n=result["n"], low=low, high=high)

    @classmethod
    def mean(cls, cells: Sequence["Cell"]) -> "Cell":
        """The mean of several cells, with equal weights; missing if one of them is.

        If all shares have the same n, the mean has k of n and a Wilson interval; otherwise it has a stratified interval.
        """
        values = [cell.value for cell in cells]
        if None in values:
            return cls(missing=cells[values.index(None)].missing)
        if not all(cell.n for cell in cells):
            return cls(statistics.fmean(values))
        if len({cell.n for cell in cells}) == 1:
            return cls.share(proportion(sum(cell.k for cell in cells), sum(cell.n for cell in cells)))
        mean, low, high = (100 * each for each in stratified([(cell.k, cell.n) for cell in cells]))
        return cls(mean, low=low, high=high)

    @classmethod
    def spread(cls, cells: Sequence["Cell"]) -> "Cell":
        """The standard deviation of several cells (n - 1 in the denominator, as in the paper)."""
        values = [cell.value for cell in cells]
        return cls(missing=cells[values.index(None)].missing) if None in values else cls(statistics.stdev(values))

    def without_interval(self) -> "Cell":
        """This value where an interval would be wrong, such as a mean over sets that are not independent."""
        return replace(self, low=None, high=None)

    def __str__(self) -> str:
        if self.value is None:
            return self.missing
        text = f"{self.value:.{self.digits}f}"
        if self.k is not None:
            text = f"{text} ({self.k}/{self.n})"
        return text if self.low is None else f"{text} [{self.low:.1f}, {self.high:.1f}]"


@dataclass
class Table:
    """One of the paper's tables: its columns, the paper's rows, and our rows, both by the title of the paper's row."""

    name: str
    title: str
    columns: list[str]
    paper: dict[str, dict[str, str]]
    ours: dict[str, dict[str, Cell]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, list[str]]]:
        """All rows as title and cells: the paper's row of each method, followed by ours if there is one."""
        lines = []
        for method in dict.fromkeys([*self.paper, *self.ours]):
            if method in self.paper:
                lines.append((f"{method}, paper", [self.paper[method].get(column, "") for column in self.columns]))
            if method in self.ours:
                lines.append((f"{method}, ours", [str(self.ours[method].get(column, "")) for column in self.columns]))
        return lines

    def markdown(self) -> str:
        """The table in Markdown, with its notes below."""
        lines = [f"### {self.name}: {self.title}", "", _line(["", *self.columns]), _line(["---"] * (1 + len(self.columns)))]
        lines += [_line([f"**{title}**" if title.endswith(", ours") else title, *cells]) for title, cells in self.rows()]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)]) + "\n"

    def latex(self) -> str:
        """The table in LaTeX (booktabs), with its notes below."""
        lines = [r"\begin{tabular}{l" + "r" * len(self.columns) + "}", r"\toprule", _row(["", *self.columns]), r"\midrule"]
        lines += [_row([title, *cells]) for title, cells in self.rows()]
        lines += [r"\bottomrule", r"\end{tabular}", "", *(rf"\par\footnotesize {_tex(note)}" for note in self.notes)]
        return f"% {self.name}: {self.title}\n" + "\n".join(lines) + "\n"

    def csv(self) -> str:
        """The table as CSV, one line per value: table, method, column, paper, ours, k, n, low, high."""
        lines = []
        for method in dict.fromkeys([*self.paper, *self.ours]):
            for column in self.columns:
                cell, theirs = self.ours.get(method, {}).get(column), self.paper.get(method, {}).get(column, "")
                figures = [cell.value, cell.k, cell.n, cell.low, cell.high] if cell else [None] * 5
                if theirs or cell:
                    lines.append([self.name, method, column, theirs, *figures])
        columns = ["table", "method", "column", "paper", "ours", "k", "n", "low", "high"]
        return pd.DataFrame(lines, columns=columns, dtype=object).to_csv(index=False, lineterminator="\n")


def paper_figures(path: Path) -> dict[str, dict[str, dict[str, str]]]:
    """Read the paper's values by table, method and column, as printed in arXiv 2501.18877v2."""
    figures: dict[str, dict[str, dict[str, str]]] = {}
    for table, method, column, value in pd.read_csv(path, dtype=str, keep_default_na=False).itertuples(index=False):
        figures.setdefault(table, {}).setdefault(method, {})[column] = value
    return figures


def paired_note(verdicts: Mapping[str, Mapping[Hashable, bool]], reference: str) -> str | None:
    """A note with the exact McNemar test of every row against the row `reference`; None if there is only one row.

    `verdicts` maps the title of each row to whether each image counts, by a key such as set and row of the prompt list.
    Raises ValueError if the rows have different keys.
    """
    pairs = {title: Paired.of(found, verdicts[reference]) for title, found in verdicts.items() if title != reference}
    return " ".join([tests_text(pairs, reference), *corrections(len(pairs))]) if pairs else None


def tests_text(pairs: Mapping[str, Paired], reference: str) -> str:
    """The exact McNemar tests of rows against the row `reference`, at least one, as text with the number of prompts."""
    same = len({pair.n for pair in pairs.values()}) == 1
    tests = [
        f"{title}{'' if same else f' on {pair.n}'} {show_p(pair.p)} ({pair.first_only} images count only for {title}, "
        f"{pair.second_only} only for {reference})"
        for title, pair in pairs.items()
    ]
    on = f"on the same {next(iter(pairs.values())).n} prompts" if same else "on the prompts that both have"
    return f"Exact McNemar test against {reference}, {on}: {'; '.join(tests)}."


def corrections(count: int) -> list[str]:
    """A list with a sentence on the p value below which one of several tests is significant; empty for fewer than two tests."""
    if count < 2:
        return []
    return [f"With Bonferroni's correction for {count} tests, p must be below {0.05 / count:.2g} to be significant at 5%."]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "&#124;") for cell in cells) + " |"


def _row(cells: Sequence[str]) -> str:
    return " & ".join(map(_tex, cells)) + r" \\"


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)
