"""The curves of a run."""

from pathlib import Path
from typing import Any


def save_curves(points: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against passes per problem, one line per stage; accuracy and true steps against
    steps.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    left, right, legible = panels
    stages = list(dict.fromkeys(point["stage"] for point in points))
    for color, stage in zip(
        colormaps["viridis_r"]([0.1 + 0.25 * i for i in range(9)]), stages, strict=False
    ):
        mine = [p for p in points if p["stage"] == stage]
        checked = [p for p in mine if "true_steps" in p]
        legible.plot(
            [p["global_step"] for p in checked],
            [p["true_steps"] for p in checked],
            "o-",
            color=color,
            markersize=4,
        )
        for mode, style, marker in (("slow", "--", "s"), ("fast", "-", "o")):
            with_mode = [p for p in mine if f"{mode}_accuracy" in p]
            if not with_mode:
                continue
            accuracies = [p[f"{mode}_accuracy"] for p in with_mode]
            left.plot(
                [p[f"{mode}_passes"] for p in with_mode],
                accuracies,
                style,
                marker=marker,
                color=color,
                markersize=4,
                label=f"{stage}, {mode}",
            )
            right.plot(
                [p["global_step"] for p in with_mode],
                accuracies,
                style,
                marker=marker,
                color=color,
                markersize=4,
            )
    left.set(xlabel="passes per problem", ylabel="held-out accuracy", ylim=(-0.03, 1.03))
    right.set(xlabel="step", ylim=(-0.03, 1.03))
    legible.set(xlabel="step", ylabel="true steps in thoughts", ylim=(-0.03, 1.03))
    left.set_xlim(left=0)
    if left.lines:
        left.legend(fontsize=7)
    for axes in panels:
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format="png")
