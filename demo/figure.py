"""The picture of the experiment: pairs of images at equal seeds, original and protected, and the loss curves."""

import json
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from des.data.image_folders import pair_with_prompts
from des.report.plots import INK, draw_losses

import matplotlib.pyplot as plt
from PIL import Image

PAIRS = 6
PALE = "#8a8a8a"


def draw_comparison(out: Path, seed: int, prompts: dict[str, Path], titles: dict[str, str]) -> None:
    """Draw `out`/comparison.png: for each prompt set, pairs of images (original, protected), then the loss curves."""
    names = list(prompts)
    figure = plt.figure(figsize=(2 * PAIRS + 1.6, 1.62 * len(names) + 3.4), dpi=110, facecolor="white")
    grid = figure.add_gridspec(
        len(names) + 1, PAIRS, height_ratios=[1] * len(names) + [1.35], wspace=0.12, hspace=0.62,
        left=0.13, right=0.985, top=0.93, bottom=0.07,
    )  # fmt: skip
    for row, name in enumerate(names):
        _draw_set(figure, grid, row, _pairs(out, seed, name, prompts[name]))
        position = grid[row, 0].get_position(figure)
        middle = (position.y0 + position.y1) / 2
        figure.text(0.012, middle, textwrap.fill(titles[name], 16), fontsize=10, color=INK, va="center", weight="bold")
    _draw_losses(figure.add_subplot(grid[len(names), :]), out / f"checkpoints-{seed}")
    figure.suptitle(
        "Same prompt, same seed: the original model on the left, protected by DES on the right (blue frame)",
        fontsize=13,
        color=INK,
        y=0.985,
    )
    figure.savefig(out / "comparison.png")
    plt.close(figure)


def _pairs(out: Path, seed: int, name: str, csv_path: Path) -> list[tuple[str, Path, Path]]:
    """(prompt, original image, protected image) of evenly spaced rows of a set; of different objects, if it has several."""
    original = pair_with_prompts(next(out.glob(f"original/none/*/{name}")), csv_path)
    protected = pair_with_prompts(next(out.glob(f"protected-{seed}/des/*/{name}")), csv_path)
    distinct = original.drop_duplicates("object").index
    rows = distinct if len(distinct) > 1 else original.index
    picks = [rows[i * len(rows) // PAIRS] for i in range(PAIRS)] if len(rows) > PAIRS else rows
    return [(original["prompt"][row], original["image"][row], protected["image"][row]) for row in picks]


def _draw_set(figure, grid, row: int, pairs: list[tuple[str, Path, Path]]) -> None:
    for column, (prompt, *images) in enumerate(pairs):
        pair = grid[row, column].subgridspec(1, 2, wspace=0.04)
        for side, path in enumerate(images):
            axes = figure.add_subplot(pair[side])
            with Image.open(path) as image:
                axes.imshow(image.convert("RGB"), interpolation="lanczos")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color("#2b6cb0" if side else PALE)
                spine.set_linewidth(1.6 if side else 0.8)
            if side == 0:
                axes.text(
                    1.03,
                    -0.08,
                    textwrap.fill(prompt, 27),
                    fontsize=7.5,
                    color=INK,
                    ha="center",
                    va="top",
                    transform=axes.transAxes,
                )


def _draw_losses(axes, checkpoints: Path) -> None:
    metrics = next(checkpoints.glob("*/metrics.jsonl"))
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    draw_losses(axes, steps)
