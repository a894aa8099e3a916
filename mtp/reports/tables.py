"""Output of a run on a terminal: the table, and a few completions."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..rollouts.prompt_format import PromptFormat
from ..rollouts.rollout import Rollouts
from ..tasks.base import Example, Task
from .metrics import Table as TableName
from .metrics import by_test_set, measured


def print_table(console: Console, summary: dict[str, Any], keeps_export: bool = True) -> None:
    """The metrics of a run: one row each, one column per stage; one table per held-out set.

    keeps_export: False for a run whose files are removed when it ends.
    """
    for name, stages in by_test_set(summary["stages"]).items():
        of_set = f" of {name}" if name else ""
        number = stages[-1]["num_problems"]
        title = f"{number} held-out problems{of_set}, greedy, seed {summary['seed']}"
        print_metrics(console, title, "run", {stage["name"]: stage for stage in stages})
    exported = f"; exported to {summary['export']}" if keeps_export else ""
    console.print(f"total {summary['seconds']:.0f} s{exported}")


def print_metrics(
    console: Console, title: str, table: TableName, columns: dict[str, dict[str, Any]]
) -> None:
    """A row for each metric that some column has a value of; columns by their heads.

    A column may have ends of intervals by metric, under `intervals`.
    """
    shown = Table(title=title)
    shown.add_column("metric")
    for head in columns:
        shown.add_column(escape(head), justify="right")
    for metric in measured(table, columns.values()):
        cells = [
            metric.cell(values.get(metric.name), values.get("intervals", {}).get(metric.name))
            for values in columns.values()
        ]
        shown.add_row(metric.head, *cells)
    console.print(shown)


def is_right(task: Task, example: Example, answer: str | None, ids: list[int]) -> bool | None:
    """True if a completion's answer is right; None for a task without a verifier."""
    if not task.has_verifier:
        return None
    return bool(answer is not None and task.outcome(example, answer, ids))


MARKS = {True: "[green]right[/green] ", False: "[red]wrong[/red] ", None: ""}


def completions_rows(
    batches: list[Rollouts], task: Task, fmt: PromptFormat, number: int, stage: str
) -> list[dict[str, Any]]:
    """A few completions: each pass's tokens separated by `|`, each segment beginning a new line.

    If text is written in segments, `segments` describes each and `memory` is the last memory file.
    """
    rows: list[dict[str, Any]] = []
    for batch in batches:
        for row in range(len(batch)):
            if len(rows) == number:
                return rows
            mine = batch.segments_of(row)
            ids = batch.completion(row)
            answer = fmt.answer_text(ids)
            example = batch.example(row)
            rows.append(
                {
                    "stage": stage,
                    "prompt": example.shown,
                    "completion": "\n".join(passes_text(batch, i, fmt) for i in mine),
                    "passes": int(batch.out.passes[mine].sum()),
                    "answer": example.answer,
                    "right": is_right(task, example, answer, ids),
                }
            )
            if fmt.segments.max_segments > 1:
                rows[-1] |= {
                    "segments": [segment_row(batch, i, fmt) for i in mine],
                    "memory": batch.memories[mine[-1]].text,
                }
    return rows


def segment_row(batch: Rollouts, segment: int, fmt: PromptFormat) -> dict[str, str]:
    """One segment: its context, its text, why it ended, and the memory file after it."""
    return {
        "context": str(fmt.tokenizer.decode(batch.prompts[segment])),
        "completion": passes_text(batch, segment, fmt),
        "ended_by": batch.out.ended_by(segment),
        "memory": batch.memories[segment].text,
    }


def passes_text(batch: Rollouts, segment: int, fmt: PromptFormat) -> str:
    """Text of one segment, each pass's tokens separated by `|`."""
    starts = set(batch.pass_starts(segment)) - {0}
    return "".join(
        ("|" if at in starts else "") + str(fmt.tokenizer.decode([token]))
        for at, token in enumerate(batch.out.completion(segment))
    )


def print_completions(
    console: Console, name: str, rows: list[dict[str, Any]], metrics: dict[str, Any]
) -> None:
    """A stage's metrics in one line, and a few completions."""
    shown = ", ".join(
        f"{metric.title} {metric.cell(metrics[metric.name])}"
        for metric in measured("run", [metrics])
    )
    console.print(f"[bold]{name}[/bold]: {shown}")
    for row in rows:
        console.print(f"  {MARKS[row['right']]}{escape(row['prompt'] + ' ' + row['completion'])}")
