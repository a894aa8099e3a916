"""The cost of training in FLOPs, and the accuracy of the table's rows at equal cost."""

from typing import Any

import numpy as np

from .cells import CONTROLS


def by_task(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each task, in their order."""
    out: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        out.setdefault(row["task"], []).append(row)
    return out


def training_flops(row: dict[str, Any], steps: int) -> float:
    """FLOPs of the first steps on solved examples, with the cost of each level of a curriculum."""
    costs = row.get("flops_per_example_from_step", {"0": row["flops_per_example"]})
    begins = sorted((int(step), cost) for step, cost in costs.items())
    ends = [step for step, _ in begins[1:]] + [steps]
    per_example = sum(
        max(0, min(end, steps) - begin) * cost
        for (begin, cost), end in zip(begins, ends, strict=True)
    )
    return float(per_example * row["training_batch_size"])


def add_equal_flops(rows: list[dict[str, Any]]) -> None:
    """Add `training_flops`, and `accuracy_at_equal_flops`: that within the cheapest row's FLOPs.

    FLOPs are those of training on solved examples. Between evaluations the accuracy is interpolated
    linearly. None where the row has no evaluation so early, and in rows whose training has an RL
    stage too. These rows and `CONTROLS` do not count as the cheapest.
    """
    for mine in by_task(rows).values():
        for row in mine:
            steps = int(row["training_steps"])
            is_supervised = str(steps) in row["accuracy_at_step"]
            row["training_flops"] = training_flops(row, steps) if is_supervised else None
        known = [row for row in mine if row["training_flops"] is not None]
        compared = [row for row in known if row["channel"] not in CONTROLS] or known
        least = min((row["training_flops"] for row in compared), default=0.0)
        for row in mine:
            costs, accuracies = zip(*accuracy_by_flops(row), strict=True)
            row["accuracy_at_equal_flops"] = (
                float(np.interp(least, costs, accuracies))
                if row["training_flops"] is not None and costs[0] <= least
                else None
            )


def accuracy_by_flops(row: dict[str, Any]) -> list[tuple[float, float]]:
    """FLOPs and accuracy of the evaluations within training on solved examples, in order."""
    found = sorted((int(step), accuracy) for step, accuracy in row["accuracy_at_step"].items())
    return [(training_flops(row, step), accuracy) for step, accuracy in found]
