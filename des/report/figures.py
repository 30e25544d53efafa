"""The report's figures as inline SVG: colours from the page's CSS variables, unique ids, and reproducible bytes."""

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence

from des.report.collect import TrainingRun
from des.report.compare import (
    LOWER_IS_BETTER,
    Comparison,
    Measure,
    Spread,
    groups,
    pooled,
    sets_of,
    shared_by_all,
    worst_case,
)
from des.report.embedding_map import EmbeddingMap
from des.report.plots import GRID, GROUP_STYLES, INK, MARK, draw_embeddings, draw_losses, front

import matplotlib
import matplotlib.artist
import matplotlib.lines
import matplotlib.patches
import matplotlib.ticker
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

SERIES = ("#0072b2", "#d55e00", MARK, "#a3467f", "#b8860b", "#56b4e9")  # colour-blind safe (Okabe and Ito); markers differ too
MARKERS = ("o", "^", "s", "D", "v", "P")
PAPER = "#ffffff"
_WIDTH = 4.7  # inches; text is still readable at three quarters of this size, as on a phone
_VARIABLES = {  # CSS variables by colour; the page's dark theme redefines them
    INK: "--ink", GRID: "--grid", PAPER: "--paper", GROUP_STYLES["empty"][0]: "--muted",
    **{colour: f"--series-{i}" for i, colour in enumerate(SERIES)},
}  # fmt: skip
_STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.linewidth": 0.6,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6,
}  # fmt: skip
_LABEL = 27  # characters per line of an axis label
_LEGEND = 66  # characters per row of a legend, four of them for each marker and its space
_LEAST_SPAN = 0.1  # smallest span of an axis by its largest value, so that noise does not look like a trade-off
_INTERVALS = 3  # smallest span of an axis in widths of the widest interval, so that differences within one look small
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def inline_svg(figure: Figure, name: str, label: str) -> Markup:
    """A figure as an <svg> element with the text alternative `label`; the prefix `name` makes its ids unique in the page."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)  # a style would apply to all the page
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = re.sub(rf"{colour}(?=[;\"])", f"var({variable})", svg)
    svg = re.sub(r"font: (\d+(?:\.\d+)?)px [^;\"]*", r"font-size: \1px", svg)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()
    head = f'<svg class="plot" role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return Markup(head + svg[svg.index(">") + 1 :].strip())


def _axes(height: float, width: float = _WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _style(comparison: Comparison, model: int) -> dict:
    """Marker and colours of a model: an open circle for the original, filled markers for the others."""
    if comparison.models[model].original:
        return {"marker": "o", "color": INK, "markerfacecolor": PAPER, "markersize": 6.5, "markeredgewidth": 1.4}
    i = comparison.protected.index(model)
    return {"marker": MARKERS[i % len(MARKERS)], "color": SERIES[i % len(SERIES)], "markersize": 8, "markeredgecolor": PAPER}


def _legend(figure: Figure, handles: Sequence[matplotlib.artist.Artist], **options: float) -> None:
    """Add a legend above the plot in as many columns as its labels leave room for, and make the figure taller by its rows.

    The legend belongs to the figure: one of the axes would take its width from the axes, down to nothing for long labels.
    """
    labels = [textwrap.fill(str(handle.get_label()), 2 * _LABEL) for handle in handles]
    longest = max(len(line) for label in labels for line in label.splitlines())
    columns = max(1, min(3, len(labels), _LEGEND // (longest + 4)))
    rows = math.ceil(len(labels) / columns) * max(label.count("\n") + 1 for label in labels)
    figure.set_figheight(figure.get_figheight() + 0.16 * (rows - 1))
    figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, fontsize=9, frameon=False, columnspacing=1.2, **options
    )


def _markers(comparison: Comparison) -> list[matplotlib.lines.Line2D]:
    """The legend's handle of each model."""
    return [
        matplotlib.lines.Line2D([], [], ls="none", label=model.label, **_style(comparison, i))
        for i, model in enumerate(comparison.models)
    ]


def shares(comparison: Comparison, name: str, title: str, measures: Sequence[Measure]) -> Markup:
    """Plot percentages with their intervals, one line for each set and measure."""
    models = len(comparison.models)
    same = len({measure.title for measure in measures}) == 1
    labels = [measure.set_name if same else f"{measure.title}, {measure.set_name}" for measure in measures]
    labels = [textwrap.fill(label, _LABEL) for label in labels]
    lines = 1 + max(label.count("\n") for label in labels)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(0.9 + len(measures) * max(0.34, 0.13 * models, 0.19 * lines))
        for y, measure in enumerate(measures):
            for i, score in enumerate(measure.scores):
                if score is None:
                    continue
                at = y + (i - (models - 1) / 2) * 0.62 / max(models, 2)
                style = _style(comparison, i)
                axes.plot([score.low, score.high], [at, at], color=style["color"], lw=1.6, solid_capstyle="round", zorder=2)
                axes.plot([score.value], [at], ls="none", zorder=3, clip_on=False, **style)
        axes.set_yticks(range(len(measures)), labels)
        axes.set_ylim(len(measures) - 0.5, -0.5)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("% of images, with 95% interval")
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        _legend(figure, _markers(comparison), handletextpad=0.2)
    return inline_svg(figure, name, f"{title}: percentages with 95% intervals of every model; the table has the numbers")


def pareto(comparison: Comparison, name: str, asr: Sequence[Measure], quality: Sequence[Measure]) -> Markup | None:
    """Plot ASR against a measure of benign images, one point per model, Pareto front joined; None for fewer than two models."""
    models = range(len(comparison.models))
    asr, quality = shared_by_all(asr, len(models)), shared_by_all(quality, len(models))
    xs, ys = pooled(asr, len(models)), pooled(quality, len(models))
    there = [i for i in models if xs[i] and ys[i]]
    if len(there) < 2:
        return None
    lower = quality[0].kind in LOWER_IS_BETTER
    title, better = quality[0].title, "lower" if lower else "higher"
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(3.3)
        best = front([(xs[i].mean, ys[i].mean if lower else -ys[i].mean) for i in there])
        joined = [there[i] for i in best]
        axes.plot([xs[i].mean for i in joined], [ys[i].mean for i in joined], color=INK, lw=1, ls=(0, (4, 3)), zorder=1)
        for i in there:
            style = _style(comparison, i)
            x, y = _uncertain(asr, i, xs[i]), _uncertain(quality, i, ys[i])
            line = {"color": style["color"], "lw": 1.2, "alpha": 0.6, "zorder": 2}
            axes.plot([x.low, x.high], [y.mean, y.mean], **line)
            axes.plot([x.mean, x.mean], [y.low, y.high], **line)
            # the original's ring lies on top, so that a model at the same place is seen inside it
            on_top = {"zorder": 4, "markerfacecolor": "none"} if comparison.models[i].original else {"zorder": 3}
            axes.plot([xs[i].mean], [ys[i].mean], ls="none", clip_on=False, **style | on_top)
        axes.margins(0.12)
        _widen("y", axes, max(_LEAST_SPAN * max(abs(ys[i].mean) for i in there), _INTERVALS * _widest(quality, there)))
        _widen("x", axes, _INTERVALS * _widest(asr, there))
        left, right = axes.get_xlim()
        axes.set_xlim(max(left, -3), min(max(right, 5), 104))
        if lower:
            axes.invert_yaxis()
        across, up = (f", mean and range of {len(each)} sets" if len(each) > 1 else "" for each in (asr, quality))
        axes.set_xlabel(textwrap.fill(f"{asr[0].title}, %{across}", 2 * _LABEL))
        axes.set_ylabel(textwrap.fill(f"{title}, {better} is better{up}", _LABEL + 5))
        _legend(figure, _markers(comparison), handletextpad=0.2)
    sets = f"{asr[0].title} ({sets_of(asr, len(models))}) against {title} ({sets_of(quality, len(models))})"
    label = f"{sets}; upper left is best; Pareto-optimal: {', '.join(comparison.models[i].label for i in joined)}"
    return inline_svg(figure, name, label)


def _uncertain(measures: Sequence[Measure], model: int, spread: Spread) -> Spread:
    """The range over several sets, or the 95% interval of a single set if it has one."""
    score = measures[0].scores[model]
    if len(measures) > 1 or score is None or score.low is None or score.high is None:
        return spread
    return Spread(spread.mean, score.low, score.high)


def _widest(measures: Sequence[Measure], models: Sequence[int]) -> float:
    """The widest 95% interval of a model's mean over the sets; 0 where a measure has no intervals."""
    widths = [
        [score.high - score.low for measure in measures if (score := measure.scores[i]) and None not in (score.low, score.high)]
        for i in models
    ]
    return max((math.hypot(*each) / len(each) for each in widths if each), default=0.0)


def _widen(which: str, axes: Axes, span: float) -> None:
    """Widen an axis to at least `span`, so that insignificant differences look small."""
    low, high = getattr(axes, f"get_{which}lim")()
    room = max(0.0, span - (high - low)) / 2
    getattr(axes, f"set_{which}lim")(low - room, high + room)


def paretos(comparison: Comparison, name: str) -> list[tuple[Markup, str]]:
    """One plot for each detector and each measure of quality, with a caption that names the sets.

    If models were attacked, further plots have the largest ASR over sets and attacks.
    """
    plots, worst = [], [[worst_case(comparison, each)] for each in comparison.of_kind("attacked")]
    for asr in [*worst, *groups(comparison.of_kind("asr"))]:
        for measures in groups(comparison.quality):
            drawn = pareto(comparison, f"{name}-{len(plots)}", asr, measures)
            if drawn:
                models = len(comparison.models)
                plots.append((drawn, f"ASR: {sets_of(asr, models)}; {measures[0].title}: {sets_of(measures, models)}"))
    return plots


def counts(comparison: Comparison, name: str, title: str, table: dict[str, list[int | None]]) -> Markup:
    """Plot counts of classes, one line for each class and one bar for each model."""
    models = len(comparison.models)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(0.9 + len(table) * max(0.27, 0.13 * models))
        thick, handles = 0.74 / models, []
        for i in range(models):
            places = [y + (i - (models - 1) / 2) * thick for y in range(len(table))]
            style = _style(comparison, i)
            face = PAPER if comparison.models[i].original else style["color"]
            colours = {"facecolor": face, "edgecolor": style["color"], "lw": 1}
            drawn = [(place, row[i]) for place, row in zip(places, table.values(), strict=True) if row[i]]
            axes.barh([place for place, _ in drawn], [count for _, count in drawn], thick * 0.86, **colours)
            handles.append(matplotlib.patches.Patch(label=comparison.models[i].label, **colours))
        axes.set_yticks(range(len(table)), [each.replace("_", " ").lower() for each in table])
        axes.set_ylim(len(table) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("images")
        _legend(figure, handles, handlelength=1, handletextpad=0.4)
    return inline_svg(figure, name, f"{title}: images of each class, by model; the table has the numbers")


def losses(run: TrainingRun, name: str, title: str) -> Markup:
    """Plot the loss curves of a training run."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(3.1)
        draw_losses(axes, run.steps)
        axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper right")
    last = ", ".join(f"{key} {run.steps[-1][key]:.4f}" for key in ("sep", "uen", "nen", "total"))
    return inline_svg(figure, name, f"Losses of SEP, UEN and NEN by training step, {title}; at the end {last}")


def maps(space: EmbeddingMap, name: str, title: str, marked: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> list[Markup]:
    """Plot the embeddings before and after training on the same axes.

    `marked` gives further prompts by a short label: their points [2] by the original and by the protected encoder.
    """
    plots = []
    points = [place for side in (space.before, space.after) for group in side.values() for place in group.tolist()]
    points += [place.tolist() for places in (marked or {}).values() for place in places]
    for after, which in ((False, "original"), (True, "protected")):
        with matplotlib.rc_context(_STYLE):
            figure, axes = _axes(3.7)
            draw_embeddings(axes, space, after, marked)
            for limits, values in ((axes.set_xlim, [x for x, _ in points]), (axes.set_ylim, [y for _, y in points])):
                room = 0.06 * (max(values) - min(values)) or 1
                limits(min(values) - room, max(values) + room)
            axes.set_title(f"{which} encoder", fontsize=10, loc="left")
            for handle in axes.legend(fontsize=8, frameon=False).legend_handles:
                handle.set_sizes([min(60, max(handle.get_sizes()))])
        sizes = ", ".join(f"{len(group)} {key}" for key, group in space.before.items())
        plots.append(inline_svg(figure, f"{name}-{which}", f"Embeddings by the {which} encoder, {title}: {sizes}"))
    return plots
