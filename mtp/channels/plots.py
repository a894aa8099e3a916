"""Plots of the table of channels: one PNG for each task, and one of the tokens per pass."""

import math
from pathlib import Path
from typing import Any

from ..reports.style import legend, log_axis, looks, panels, save, share_axis
from .equal_flops import accuracy_by_flops

MARKERS = "osD^vXP"
"""Markers of the block sizes, whose lines often lie on one another."""


def plot_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """The rows of one task: their passes, and accuracy against training FLOPs.

    Rows are those of `table.json`. The first panel has a line for each of them, a point at the mean
    passes of a thought (of the whole output with a memory, whose summaries are no thought), and
    beside it the accuracy in per cent, mean and range of the seeds. The second has means, and the
    range of the seeds as a band. Rows that have an RL stage are not in it.
    """
    what, name = "thought_passes", "passes of a thought"
    if "memory" in rows[0]["channel"]:
        what, name = "passes", "all passes"
    figure, [[passes, training]] = panels(1, 2)
    for number, row in enumerate(rows):
        line = looks(number) | {"marker": "o", "label": row["channel"]}
        passes.plot([row[what]], [number], **line)
        passes.annotate(
            accuracy_in_words(row), (row[what], number), xytext=(6, 0),
            textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
        if row["training_flops"] is not None:
            flops, accuracies = zip(*accuracy_by_flops(row), strict=True)
            costs = [value / 1e9 for value in flops]
            training.plot(costs, accuracies, **line)
            seeds = [one["accuracy_at_step"] for one in row.get("by_seed", {}).values()]
            if len(seeds) > 1:
                steps = sorted(seeds[0], key=int)
                lowest, highest = (
                    [pick(seed[step] for seed in seeds) for step in steps] for pick in (min, max)
                )
                training.fill_between(costs, lowest, highest, color=line["color"], alpha=0.07)
    most = max(1.0, *(row[what] for row in rows))
    passes.set(
        xlabel=f"{name}; beside a point: held-out accuracy (%)",
        xlim=(-0.05 * most, 1.45 * most),
        yticks=range(len(rows)),
        yticklabels=[row["channel"] for row in rows],
    )
    passes.invert_yaxis()
    share_axis(training, "held-out accuracy")
    log_axis(training, "training", "GFLOPs", "x")
    legend(training)
    save(figure, path)


def accuracy_in_words(row: dict[str, Any]) -> str:
    """Mean accuracy of a row in per cent, with the range of its seeds if they differ."""
    mean, seeds = 100 * row["accuracy"], [100 * value for value in row["accuracy_by_seed"]]
    lowest, highest = f"{min(seeds):.1f}", f"{max(seeds):.1f}"
    return f"{mean:.1f}" if lowest == highest else f"{mean:.1f} ({lowest} to {highest})"


def plot_block_sizes(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Accuracy within a number of passes of thought, by tokens per pass.

    rows: by task, at least one, those of `token` and `block_K`; each task has a panel, three in a
    line and sums first. A number looks the same in all of them.
    """
    sizes = sorted({tokens_per_pass(row) for mine in rows.values() for row in mine})
    tasks = sorted(rows.items(), key=lambda item: (not item[0].startswith("running_sum"), item[0]))
    columns = min(len(tasks), 3)
    figure, grid = panels(math.ceil(len(tasks) / columns), columns)
    axes = [one for line in grid for one in line]
    for unused in axes[len(tasks) :]:
        unused.remove()
    for one, (task, mine) in zip(axes[: len(tasks)], tasks, strict=True):
        for row in mine:
            size = tokens_per_pass(row)
            number = sizes.index(size)
            line = looks(number) | {"marker": MARKERS[number % len(MARKERS)]}
            points = sorted((int(n), value) for n, value in row["accuracy_at_passes"].items())
            one.plot(*zip(*points, strict=True), label=f"{size} per pass", **line)
        share_axis(one, "held-out accuracy")
        log_axis(one, f"passes of a thought, {task}", "at most", "x")
        legend(one)
    save(figure, path)


def tokens_per_pass(row: dict[str, Any]) -> int:
    """Tokens per pass of a row `token` or `block_K`: K + 1."""
    _, _, slots = row["channel"].partition("_")
    return 1 + int(slots or 0)
