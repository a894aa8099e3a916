"""The curves of a run."""

from pathlib import Path
from typing import Any

from .style import MODES, STEPS, legend, log_axis, looks, panels, save, share_axis


def save_curves(points: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against passes per problem, one line per stage and mode; accuracy and true steps
    against steps. A comparator has one mode, whose metrics are `accuracy` and `passes`.
    """
    figure, [[cost, training, legible]] = panels(1, 3)
    for number, stage in enumerate(dict.fromkeys(point["stage"] for point in points)):
        mine = [p for p in points if p["stage"] == stage]
        line = looks(number) | {"marker": "o"}
        checked = [p for p in mine if "true_steps" in p]
        steps = [p["global_step"] for p in checked]
        legible.plot(steps, [p["true_steps"] for p in checked], label=stage, **line)
        for mode in ("slow_", "fast_", ""):
            with_mode = [p for p in mine if f"{mode}accuracy" in p]
            if not with_mode:
                continue
            line |= {"label": stage}
            if mode:
                style, marker = MODES[mode.rstrip("_")]
                line |= {"linestyle": style, "marker": marker, "label": f"{stage}, {mode[:-1]}"}
            accuracies = [p[f"{mode}accuracy"] for p in with_mode]
            cost.plot([p[f"{mode}passes"] for p in with_mode], accuracies, **line)
            training.plot([p["global_step"] for p in with_mode], accuracies, **line)
    for axes in (cost, training):
        share_axis(axes, "held-out accuracy")
    share_axis(legible, "true steps in thoughts")
    log_axis(cost, "passes per problem", "", "x")
    for axes in (training, legible):
        axes.set_xlabel(STEPS)
    legend(cost)
    legend(legible)
    save(figure, path)
