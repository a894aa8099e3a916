"""What a person sees of a run on a terminal: the table, and a few completions."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..rollouts.prompt_format import PromptFormat
from ..rollouts.rollout import Rollouts
from ..tasks.base import Example, Task

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
    batches: list[Rollouts], task: Task, text: PromptFormat, number: int, stage: str
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


def segment_row(batch: Rollouts, segment: int, text: PromptFormat) -> dict[str, str]:
    """One segment: what it was given, what it wrote, why it ended, the memory file after it."""
    return {
        "context": str(text.tokenizer.decode(batch.prompts[segment])),
        "completion": passes_text(batch, segment, text),
        "ended_by": batch.out.ended_by(segment),
        "memory": batch.memories[segment].text,
    }


def passes_text(batch: Rollouts, segment: int, text: PromptFormat) -> str:
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
