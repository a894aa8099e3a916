"""What a person sees of a run: the table, the curves, a few completions.

`python -m mtp.report FOLDER` prints the table over the arms of a comparison, such as runs/rl_proof,
and writes its summary.json, arms.png and frontier.png.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .arms import aggregate, read_runs, save_frontier, save_plot
from .logger import make_console
from .rollout import Rollouts
from .tasks.base import Example, Task
from .text import TextFormat

COLUMNS = {
    "slow_accuracy": "slow acc.",
    "fast_accuracy": "fast acc.",
    "slow_passes": "slow passes",
    "fast_passes": "fast passes",
    "fast_tokens_per_pass": "tokens/pass",
    "verified_passes": "verified passes",
    "verified_tokens_per_pass": "verified tokens/pass",
    "acceptance_by_slot": "accepted by slot",
    "empty_thought_accuracy": "empty thought",
    "wrong_thought_accuracy": "wrong thought",
    "true_steps": "true steps",
    "reference_nats_per_token": "ref. nats/token",
    "seconds": "seconds",
}
"""Figures of a stage, as tables name them."""


def columns_of(stages: list[dict[str, Any]]) -> dict[str, str]:
    """The columns of a table over stages: figures that some stage has."""
    measured = {key for stage in stages for key, value in stage.items() if value is not None}
    return {name: title for name, title in COLUMNS.items() if name in measured}


def cell(name: str, value: float | list[float] | None) -> str:
    """A figure as the table shows it."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(f"{share:.2f}" for share in value)
    if name == "verified_tokens_per_pass":
        return f"{value:.2f}"
    if name.endswith("accuracy") or name == "true_steps":
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if "nats" in name else f"{value:.1f}"


def print_table(console: Console, summary: dict[str, Any]) -> None:
    """One row a stage."""
    num_problems = summary["stages"][-1]["num_problems"]
    table = Table(title=f"{num_problems} held-out problems, greedy, seed {summary['seed']}")
    table.add_column("stage")
    columns = columns_of(summary["stages"])
    for title in columns.values():
        table.add_column(title, justify="right")
    for stage in summary["stages"]:
        table.add_row(stage["name"], *(cell(name, stage[name]) for name in columns))
    console.print(table)
    console.print(f"total {summary['seconds']:.0f} s; exported to {summary['export']}")


def is_right(task: Task, example: Example, answer: str | None) -> bool | None:
    """Whether a completion's answer is right; None for a task that judges no answers."""
    return bool(answer is not None and task.outcome(example, answer)) if task.judges else None


MARKS = {True: "[green]right[/green] ", False: "[red]wrong[/red] ", None: ""}


def completions_rows(
    batches: list[Rollouts], task: Task, text: TextFormat, number: int, stage: str
) -> list[dict[str, Any]]:
    """A few completions: each pass's tokens divided by `|`, each segment beginning a new line.

    Where text is written in segments, `segments` tells of each and `memory` is the file in the end.
    """
    rows: list[dict[str, Any]] = []
    for batch in batches:
        for row in range(len(batch)):
            if len(rows) == number:
                return rows
            mine = batch.segments_of(row)
            answer = text.answer_text(batch.completion(row))
            example = batch.example(row)
            rows.append(
                {
                    "stage": stage,
                    "prompt": example.prompt,
                    "completion": "\n".join(passes_text(batch, i, text) for i in mine),
                    "passes": int(batch.out.passes[mine].sum()),
                    "answer": example.answer,
                    "right": is_right(task, example, answer),
                }
            )
            if text.segments.max_segments > 1:
                rows[-1] |= {
                    "segments": [segment_row(batch, i, text) for i in mine],
                    "memory": batch.memories[mine[-1]].text,
                }
    return rows


def segment_row(batch: Rollouts, segment: int, text: TextFormat) -> dict[str, str]:
    """One segment: what it was given, what it wrote, why it ended, the memory file after it."""
    return {
        "context": str(text.tokenizer.decode(batch.prompts[segment])),
        "completion": passes_text(batch, segment, text),
        "ended_by": batch.out.ended_by(segment),
        "memory": batch.memories[segment].text,
    }


def passes_text(batch: Rollouts, segment: int, text: TextFormat) -> str:
    """What one segment wrote, each pass's tokens divided by `|`."""
    ids, slots = batch.out.completion(segment), batch.out.slots[segment].tolist()
    return "".join(
        ("|" if slot == 0 and i else "") + str(text.tokenizer.decode([token]))
        for i, (token, slot) in enumerate(zip(ids, slots, strict=False))
    )


def print_completions(
    console: Console, name: str, rows: list[dict[str, Any]], figures: dict[str, Any]
) -> None:
    """A stage's figures in one line, and a few completions."""
    shown = ", ".join(
        f"{title} {cell(key, figures[key])}"
        for key, title in COLUMNS.items()
        if figures.get(key) is not None
    )
    console.print(f"[bold]{name}[/bold]: {shown}")
    for row in rows:
        console.print(f"  {MARKS[row['right']]}{escape(row['prompt'] + ' ' + row['completion'])}")


def save_curves(points: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against passes per problem, a line a stage; it and true steps against steps."""
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


ARM_COLUMNS = {
    "start_fast_accuracy": "start",
    "fast_accuracy": "fast",
    "slow_accuracy": "slow",
    "true_steps": "true steps",
    "empty_thought_accuracy": "empty",
    "wrong_thought_accuracy": "wrong",
    "fast_passes": "passes",
    "reference_nats_per_token": "nats",
}
"""Accuracy at the start and after, in fast and slow mode, behind an empty and a wrong thought."""


def print_arms(console: Console, summary: dict[str, Any]) -> None:
    """One row an arm."""
    table = Table(title="held-out accuracy by arm: means over seeds, ± half the 95 % interval")
    table.add_column("arm")
    for title in ("seeds", *ARM_COLUMNS.values()):
        table.add_column(title, justify="right", no_wrap=True)
    for arm, figures in summary["arms"].items():
        cells = [arm_cell(name, figures[name]) for name in ARM_COLUMNS]
        table.add_row(escape(arm), str(len(figures["seeds"])), *cells)
    console.print(table)


def arm_cell(name: str, value: Any) -> str:
    """A mean as the table shows it, with its interval where it has one."""
    if not isinstance(value, dict):
        return cell(name, value)
    if value["low"] is None:
        return cell(name, value["mean"])
    return f"{100 * value['mean']:.1f} ± {100 * (value['high'] - value['mean']):.1f} %"


def main(argv: list[str] | None = None) -> int:
    """Print the table over a comparison's arms; the exit code is 2 after an error."""
    parser = argparse.ArgumentParser(
        prog="python -m mtp.report",
        description="Print the table over the arms of a comparison; write summary.json, "
        "arms.png and frontier.png (fast accuracy against legibility) beside them.",
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="of a comparison, such as runs/rl_proof"
    )
    folder = parser.parse_args(argv).folder
    try:
        runs = read_runs(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    summary = aggregate(runs)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    save_plot(runs, summary, folder / "arms.png")
    save_frontier(runs, summary, folder / "frontier.png")
    print_arms(make_console(), summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
