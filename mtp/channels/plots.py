"""Plots of the table of channels: one PNG for each task, and one of the tokens per pass."""

import math
from pathlib import Path
from typing import Any

from ..reports.style import legend, log_axis, looks, panels, save, share_axis


def plot_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy of one task's rows, as means over seeds: against the mean passes of a thought, with
    the range of the seeds, and against training FLOPs.

    Rows are those of `table.json`. FLOPs are those of the last level of a channel with levels.
    Rows that have an RL stage have no point in the second panel; the legend is in the first.
    """
    figure, [[passes, training]] = panels(1, 2)
    for number, row in enumerate(rows):
        line = looks(number) | {"marker": "o", "label": row["channel"]}
        mean, seeds = row["accuracy"], row["accuracy_by_seed"]
        spread = [[max(0.0, mean - min(seeds))], [max(0.0, max(seeds) - mean)]]
        passes.plot([row["thought_passes"]], [mean], **line)
        passes.errorbar(
            [row["thought_passes"]], [mean], spread, capsize=3, color=line["color"], fmt="none"
        )
        if row["training_flops"] is not None:
            cost = row["training_flops"] / row["training_steps"] / 1e9
            curve = sorted((int(step), value) for step, value in row["accuracy_at_step"].items())
            training.plot([cost * step for step, _ in curve], [value for _, value in curve], **line)
    for axes in (passes, training):
        share_axis(axes, "held-out accuracy")
    passes.set_xlabel("passes of a thought")
    log_axis(training, "training", "GFLOPs", "x")
    legend(passes)
    save(figure, path)


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
            line = looks(sizes.index(size)) | {"marker": "o", "label": f"{size} per pass"}
            points = sorted((int(n), value) for n, value in row["accuracy_at_passes"].items())
            one.plot(*zip(*points, strict=True), **line)
        share_axis(one, "held-out accuracy")
        log_axis(one, f"passes of a thought, {task}", "at most", "x")
        legend(one)
    save(figure, path)


def tokens_per_pass(row: dict[str, Any]) -> int:
    """Tokens per pass of a row `token` or `block_K`: K + 1."""
    _, _, slots = row["channel"].partition("_")
    return 1 + int(slots or 0)
