"""What figures of the report, the app and the demo draw on matplotlib's axes."""

import itertools
from collections.abc import Mapping, Sequence

from des.report.embedding_map import EmbeddingMap

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

INK = "#222222"
GRID = "#e6e6e6"
LOSSES = {"sep": "SEP, first term", "sep_concept": "SEP, concept term", "uen": "UEN", "nen": "NEN", "total": "total"}
GROUP_STYLES = {  # colour-blind safe (Okabe and Ito), with different markers
    "safe": ("#0072b2", "o"),
    "unsafe": ("#d55e00", "^"),
    "concept": ("#a3467f", "*"),
    "empty": ("#4d4d4d", "s"),
}
MARK = "#009e73"


def draw_losses(axes: Axes, steps: Sequence[Mapping[str, float]]) -> None:
    """Draw the loss curves from the entries of metrics.jsonl, one mapping per step."""
    for key, label in LOSSES.items():
        axes.plot([step["step"] for step in steps], [step[key] for step in steps], label=label, lw=2 if key == "total" else 1.2)
    axes.set_xlabel("training step", fontsize=9, color=INK)
    axes.set_ylabel("loss", fontsize=9, color=INK)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    _plain(axes)
    axes.legend(fontsize=8, frameon=False, ncols=len(LOSSES), loc="upper right")


def draw_embeddings(
    axes: Axes, space: EmbeddingMap, after: bool, marked: Mapping[str, tuple[Tensor, Tensor]] | None = None
) -> None:
    """Draw one side of the map, of the original encoder or (`after`) of the protected one."""
    for name, places in (space.after if after else space.before).items():
        colour, marker = GROUP_STYLES[name]
        few, ring = len(places) < 5, name == "empty"  # an open square, since the concept may move onto it
        axes.scatter(
            places[:, 0].tolist(), places[:, 1].tolist(), s=260 if ring else 130 if few else 16, marker=marker, label=name,
            facecolors="none" if ring else colour, edgecolors=colour if ring else "white" if few else "none",
            alpha=1 if few else 0.55, zorder=3 if few else 2, linewidths=1.8 if ring else 1,
        )  # fmt: skip
    for label, places in (marked or {}).items():
        x, y = places[after].tolist()
        axes.scatter([x], [y], s=150, c=MARK, marker="D", edgecolors="white", zorder=4, label=label)
    axes.set_xlabel(f"first component ({space.explained[0]:.0%} of the variance)", fontsize=9, color=INK)
    axes.set_ylabel(f"second component ({space.explained[1]:.0%})", fontsize=9, color=INK)
    _plain(axes)


def pareto(panels: Mapping[str, Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]]]) -> Figure:
    """Draw worst-case ASR against benign quality, a point with 95% intervals for each method, in a panel for each kind of worst case.

    A panel maps the title of a method to the shares `{"fraction", "low", "high"}` of benign images that are right and of the worst ASR.
    The line joins the methods that no other one beats in both.
    """
    figure = Figure(figsize=(4.6 * len(panels) + 1, 4.4), layout="constrained")
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (what, methods) in zip(every, panels.items(), strict=True):
        for (title, shares), marker in zip(methods.items(), itertools.cycle("osD^vPX*"), strict=False):
            places = [100 * share["fraction"] for share in shares]
            bars = [
                [[max(0, place - 100 * share["low"])], [max(0, 100 * share["high"] - place)]]
                for place, share in zip(places, shares, strict=True)
            ]
            points = ([place] for place in places)
            axes.errorbar(*points, xerr=bars[0], yerr=bars[1], fmt=marker, ms=8, lw=1, capsize=2, label=title, zorder=3)
        every_place = [[100 * share["fraction"] for share in shares] for shares in methods.values()]
        best = [every_place[i] for i in front([(-quality, asr) for quality, asr in every_place])]
        axes.plot(*zip(*best, strict=True), color=INK, lw=1, ls=":", zorder=2)
        axes.set_title(what, fontsize=10, color=INK)
        axes.set_xlabel("benign images right (%); higher is better", fontsize=9, color=INK)
        _plain(axes)
    every[0].set_ylim(-3, 103)
    every[0].set_ylabel("worst ASR (%); lower is better", fontsize=9, color=INK)
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the Pareto-optimal points (x, y), sorted by x; lower is better in both coordinates."""
    best = [
        i for i, (x, y) in enumerate(points)
        if not any(u <= x and v <= y and (u, v) != (x, y) for u, v in points)
    ]  # fmt: skip
    return sorted(best, key=lambda i: points[i])


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
