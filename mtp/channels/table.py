"""The table of all channels: `python -m mtp.channels.table`.

Each cell is a run of `train.py experiment=channels/NAME` with a task and a seed, and a measurement
of its model. Runs and measurements that exist are not repeated, so an interrupted table continues
where it ended. First the cost is printed, from a few steps of each kind of run.

Example: `python -m mtp.channels.table --tasks graph_search --rows token latent --seeds 1`
"""

import argparse
import json
import re
import signal
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from statistics import mean
from typing import Any

from ..common.files import save_text
from ..common.process import run_command
from ..reports.json_lines import read_records, with_plain_names
from .cells import MEASURED, ROWS, TASKS, TEXT_ROW, Cell, plan
from .equal_flops import add_equal_flops, by_task
from .plots import plot_block_sizes, plot_rows

RESULT = Path("docs/results/channels/table.json")
PLOTS = Path("docs")
RUNS = Path("runs/channels")
ATTEMPTED = "attempted_problems"
"""Name of the number of problems with several attempts, which older measurements lack."""


def run_train(cell: Cell, *more: str, capture: bool = False) -> str:
    """Run the training command. Raises ValueError if it fails.

    SIGTERM and Ctrl-C end the training as well, which first writes a checkpoint.
    """
    with subprocess.Popen(
        cell.command(*more), stdout=subprocess.PIPE if capture else None, text=True
    ) as training:
        try:
            printed = training.communicate()[0]
        except (KeyboardInterrupt, SystemExit):
            training.terminate()
            training.wait()
            raise
    if training.returncode == 130:
        raise KeyboardInterrupt
    if training.returncode:
        raise ValueError(
            f"training of {cell.folder} must end with exit code 0, got {training.returncode}; its "
            "message is above; runs with other overrides need another folder, --runs"
        )
    return printed or ""


def minutes_of(cell: Cell) -> float:
    """Estimated minutes of a run, from a dry run of it."""
    printed = run_train(cell, "dry_run=true", capture=True)
    found = re.search(r"a full run would take about \d+ min and its evaluations \((.*)\)", printed)
    if found is None:
        raise ValueError(f"the dry run of {cell.folder} must print an estimate, got {printed!r}")
    return sum(float(number) for number in re.findall(r" (\d+\.\d+)", f" {found[1]}"))


def print_runs(cells: list[Cell], with_cost: bool) -> None:
    """Print how many cells are not trained yet and, if asked, the estimated cost of each kind."""
    left = [cell for cell in cells if not cell.is_trained]
    total, kinds = 0.0, dict[tuple[str, str], Cell]()
    for cell in left:
        kinds.setdefault((cell.row, cell.task), cell)
    print(f"{len(cells)} runs, {len(cells) - len(left)} of them done", flush=True)
    for (row, task), cell in kinds.items():
        number = sum((c.row, c.task) == (row, task) for c in left)
        minutes = minutes_of(cell) if with_cost else 0.0
        total += number * minutes
        print(f"  {task:14}{row:14}{number}" + f" x {minutes:.1f} min" * with_cost, flush=True)
    if kinds and with_cost:
        print(f"about {total / 60:.1f} h for training, evaluations not included", flush=True)


def measure(
    folder: Path, num_problems: int, num_attempts: int, reader_folder: Path | None
) -> dict[str, Any]:
    """All measures of a trained run's model; reader_folder: run of its reader, if it has one."""
    from ..config import load_run_config
    from ..hub.build import load_model
    from ..tasks.base import training_index
    from ..training.optimizers import num_parameters
    from ..training.stage import AnchorsConfig
    from .channel import build_channel
    from .measure import (
        BUDGETS,
        evaluate_channel,
        measure_attempts,
        measure_message,
        measure_reader,
        training_cost,
    )
    from .saving import load_channel

    config = load_run_config(folder / "config.yaml")
    stages = config.active_stages()

    def load_stage(name: str) -> tuple[Any, Any, Any]:
        stage = folder / "stages" / name
        if not config.channel.is_text:
            model, fmt, channel = load_channel(stage)
            return model.eval(), fmt, channel
        model, fmt = load_model(stage)
        return model.eval(), fmt, build_channel("block" if has_blocks else "token", anchors, model)

    supervised = next(stage for stage in stages.values() if stage.kind == "supervised")
    anchors = {f.name: getattr(supervised.examples, f.name) for f in fields(AnchorsConfig)}
    has_blocks = config.channel.is_text and any(stage.train_head for stage in stages.values())
    first, last = list(stages)[0], list(stages)[-1]
    model, fmt, channel = trained = load_stage(last)
    task = config.task.build()
    limits: dict[str, Any] = {
        "batch_size": config.evaluation.batch_size,
        "max_new_tokens": config.decoding.max_new_tokens,
    }
    metrics = evaluate_channel(
        model, fmt, channel, task, num_problems=config.evaluation.num_problems, budgets=BUDGETS,
        **limits,
    )  # fmt: skip
    metrics["accuracy_at_passes"] = {
        str(n): value for n, value in zip(BUDGETS, metrics.pop("accuracy_by_budget"), strict=True)
    }
    by_place = metrics.pop("accuracy_by_place", [])
    metrics["accuracy_at_place"] = {str(n): value for n, value in enumerate(by_place)}
    metrics |= measure_attempts(
        model, fmt, channel, task, num_problems=num_problems, num_attempts=num_attempts,
        temperature=1.0, **limits,
    )  # fmt: skip
    metrics |= measure_message(model, fmt, channel, task, num_problems=num_problems, **limits)
    if reader_folder is not None:
        last_of_reader = list(load_run_config(reader_folder / "config.yaml").active_stages())[-1]
        reader = load_model(reader_folder / "stages" / last_of_reader)[0].eval()
        for name, suffix in {first: "_before_rl", last: ""}.items():  # one, if both are the same
            read = trained if name == last else load_stage(name)
            found = measure_reader(*read, task, reader, num_problems=num_problems, **limits)
            metrics |= {key + suffix: value for key, value in found.items()}
    size = task.size("train")
    number = supervised.examples.batch_size
    examples = [
        task.example("train", training_index(i, size, config.seed, task.project_size))
        for i in range(number)
    ]
    levels = [step for step in range(supervised.steps) if step == 0 or channel.begins_level(step)]
    costs = {n: training_cost(model, fmt, channel, examples, step=n) for n in levels}
    cost = costs[levels[-1]]
    sizes = num_parameters(model)
    summary = json.loads((folder / "summary.json").read_text())
    before = summary["stages"][0]
    if len(summary["stages"]) > 1:
        metrics["accuracy_before_rl"] = before[accuracy_name(before)]
    return metrics | asdict(cost) | {
        "attempts": num_attempts,
        ATTEMPTED: num_problems,
        "accuracy_at_step": accuracy_at_steps(folder, summary),
        "training_seconds": summary["seconds"],
        "training_steps": sum(stage["steps"] for stage in summary["stages"]),
        "flops_per_example_from_step": {str(n): one.flops_per_example for n, one in costs.items()},
        "training_batch_size": number,
        "main_parameters": sizes["main"],
        "channel_parameters": sum(p.numel() for p in channel.parameters()),
        "head_parameters": sizes["head"] if has_blocks else 0,
    }  # fmt: skip


def accuracy_name(stage: dict[str, Any]) -> str:
    """Name of a stage's accuracy in the channel's own mode."""
    names = ("accuracy", "fast_accuracy", "slow_accuracy")
    return next(name for name in names if stage.get(name) is not None)


def accuracy_at_steps(folder: Path, summary: dict[str, Any]) -> dict[str, float]:
    """Held-out accuracy by optimizer step of the first stage, in the channel's own mode."""
    first = summary["stages"][0]
    name = accuracy_name(first)
    found = {}
    for record in map(with_plain_names, read_records(folder / "metrics.jsonl")):
        if record["stage"] == first["name"] and f"eval/{name}" in record:
            found[str(record["step"])] = record[f"eval/{name}"]
    return found


def averaged(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the measurements of several seeds; None where a seed has none."""
    out: dict[str, Any] = {}
    for key, value in found[0].items():
        if key == ATTEMPTED:
            continue
        if isinstance(value, dict):
            out[key] = {k: mean(one[key][k] for one in found) for k in value}
        elif any(one[key] is None for one in found):
            out[key] = None
        else:
            out[key] = mean(one[key] for one in found)
    return out


def names_of(measured: dict[str, Any]) -> set[str]:
    """Names of all numbers of a measurement."""
    inner = (
        f"{key}.{k}" for key, value in measured.items() if isinstance(value, dict) for k in value
    )
    return {*measured, *inner} - {ATTEMPTED}


def read_measured(cell: Cell, row: dict[str, Any]) -> dict[str, Any]:
    """The measurement of a cell. Raises ValueError if another command trained its run.

    row: the table's row of its channel and task, which knows the command of a measurement of an
    older version; empty without one.
    """
    found: dict[str, Any] = json.loads((cell.folder / MEASURED).read_text())
    in_row = row.get("by_seed", {}).get(str(cell.seed)) == found
    command = found.pop("command", row["command"] if in_row else cell.shown_command)
    if command != cell.shown_command:
        raise ValueError(
            f"{cell.folder} must be a run with these overrides, got one of {command!r}; use "
            "another folder, --runs"
        )
    return found


def check_attempts(cell: Cell, found: dict[str, Any], num_problems: int, num_attempts: int) -> None:
    """Raises ValueError if a measurement has other numbers of attempts or of their problems."""
    options = {
        "--attempts": ("attempts", num_attempts),
        "--num-problems": (ATTEMPTED, num_problems),
    }
    for option, (name, wanted) in options.items():
        if found.get(name, wanted) != wanted:
            raise ValueError(
                f"{option} must be that of {cell.folder / MEASURED}, {found[name]}, got {wanted}; "
                "remove this file, and it is measured again"
            )


def table_rows(cells: list[Cell], known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per channel and task: its measurements by seed, and their means.

    Seeds that a known row has, and these cells do not, are kept if they were measured by the same
    command, with as many attempts, and have the same numbers. Raises ValueError for a cell that
    lacks numbers of another seed, or whose run another command trained.
    """
    rows = []
    before = {(row["channel"], row["task"]): row for row in known}
    for row, task in dict.fromkeys((cell.row, cell.task) for cell in cells):
        mine = [c for c in cells if (c.row, c.task) == (row, task) and c.is_measured]
        if not mine:
            continue
        old = before.get((row, task), {})
        found = {str(c.seed): read_measured(c, old) for c in mine}
        names = set().union(*map(names_of, found.values()))
        for cell in mine:
            if missing := sorted(names - names_of(found[str(cell.seed)])):
                raise ValueError(
                    f"{cell.folder / MEASURED} must have the numbers of the other seeds, but lacks "
                    f"{missing[0]}; remove it, and it is measured again"
                )
        command, first = mine[0].shown_command, next(iter(found.values()))
        if old.get("command") == command:
            found |= {
                seed: measured
                for seed, measured in old.get("by_seed", {}).items()
                if seed not in found
                and names_of(measured) == names
                and measured.get("attempts") == first.get("attempts")
                and measured.get(ATTEMPTED, first.get(ATTEMPTED)) == first.get(ATTEMPTED)
            }
        by_seed = dict(sorted(found.items(), key=lambda item: int(item[0])))
        rows.append(
            {
                "channel": row,
                "task": task,
                "seeds": [int(seed) for seed in by_seed],
                "command": command,
                "accuracy_by_seed": [one["accuracy"] for one in by_seed.values()],
                **averaged(list(by_seed.values())),
                "by_seed": by_seed,
            }
        )
    return rows


def shown(value: float | None, factor: float = 1.0, digits: int = 1) -> str:
    """A number of a cell; a dash for None."""
    return "-" if value is None else f"{factor * value:.{digits}f}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown, one part per task."""
    heads = [
        "channel", "accuracy (seeds)", "at 4", "at 8", "at 16", "at 32", "thought passes",
        "passes", "passes in sequence", "ms / example", "kB / example", "training s",
        "at equal FLOPs", "one", "majority", "best of n", "swap bits", "zero bits", "reader",
        "reader nats", "by place",
    ]  # fmt: skip
    lines = []
    for task, mine in by_task(rows).items():
        lines += [f"**{task}**", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in mine:
            by_seed = ", ".join(f"{100 * value:.1f}" for value in row["accuracy_by_seed"])
            at = [f"{100 * row['accuracy_at_passes'][n]:.1f}" for n in ("4", "8", "16", "32")]
            cells = [
                row["channel"], by_seed, *at, f"{row['thought_passes']:.1f}",
                f"{row['passes']:.1f}", f"{row['sequential_passes']:.0f}",
                f"{1000 * row['seconds_per_example']:.2f}",
                f"{row['bytes_per_example'] / 1000:.0f}", f"{row['training_seconds']:.0f}",
                shown(row["accuracy_at_equal_flops"], 100),
                *(shown(row[k], 100) for k in
                  ("mean_accuracy", "majority_accuracy", "best_accuracy")),
                shown(row["message_swap_bits"]), shown(row["message_zero_bits"]),
                shown(row.get("reader_accuracy"), 100), shown(row.get("reader_nats"), digits=2),
                " ".join(shown(v, 100) for v in row.get("accuracy_at_place", {}).values()) or "-",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def known_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a table's file; none without a file."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
    return rows


def write_table(cells: list[Cell], path: Path) -> list[dict[str, Any]]:
    """Write the rows that are measured so far, and return them.

    Rows of other channels and tasks that the file holds are kept, and other seeds of the same rows.
    """
    known = known_rows(path)
    rows = table_rows(cells, known)
    new = {(row["channel"], row["task"]) for row in rows}
    rows += [row for row in known if (row["channel"], row["task"]) not in new]
    order = [(row, task) for task in TASKS for row in ROWS]
    rows.sort(key=lambda row: order.index((row["channel"], row["task"])))
    add_equal_flops(rows)
    save_text(path, json.dumps({"rows": rows}, indent=2) + "\n")
    return rows


def write_plots(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write `channels_TASK.png` for each task of the rows, and `channels_block_size.png`."""
    tasks = by_task(rows)
    for task, mine in tasks.items():
        plot_rows(mine, folder / f"channels_{task}.png")
    text = {
        task: found
        for task, mine in tasks.items()
        if (found := [row for row in mine if TEXT_ROW.fullmatch(row["channel"])])
    }
    if text:
        plot_block_sizes(text, folder / "channels_block_size.png")


def make_table(arguments: argparse.Namespace) -> None:
    """Plan, estimate, train, measure, write."""
    cells = plan(
        arguments.rows, arguments.tasks, arguments.seeds, arguments.runs, arguments.overrides
    )
    rows = {(row["channel"], row["task"]): row for row in known_rows(arguments.out)}
    for cell in cells:
        if cell.is_measured:
            found = read_measured(cell, rows.get((cell.row, cell.task), {}))
            check_attempts(cell, found, arguments.num_problems, arguments.attempts)
    print_runs(cells, with_cost=not arguments.no_estimate)
    if arguments.plan:
        return
    for number, cell in enumerate(cells, 1):
        label = f"[{number}/{len(cells)}] {cell.task}, {cell.row}, seed {cell.seed}"
        if not cell.is_trained:
            print(f"{label}: training", flush=True)
            run_train(cell, "resume=auto")
        elif not cell.is_measured:
            run_train(cell, "resume=true")  # which refuses other settings, and trains no further
        if not cell.is_measured:
            print(f"{label}: measuring", flush=True)
            found = measure(cell.folder, arguments.num_problems, arguments.attempts, cell.reader)
            found["command"] = cell.shown_command
            save_text(cell.folder / MEASURED, json.dumps(found, indent=2) + "\n")
        write_table(cells, arguments.out)
    written = write_table(cells, arguments.out)
    write_plots(written, arguments.plots)
    print(markdown(written))
    print(f"written to {arguments.out}; plots to {arguments.plots}")


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    out = argparse.ArgumentParser(
        prog="python -m mtp.channels.table", description="Train and measure all channels."
    )
    out.add_argument(
        "--overrides", nargs="+", default=[], help="further overrides of every run, key=value"
    )
    out.add_argument("--rows", nargs="+", default=list(ROWS), help="channels (default: all)")
    out.add_argument("--tasks", nargs="+", default=list(TASKS), help="tasks (default: all)")
    out.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds (1 2 3)")
    out.add_argument("--runs", type=Path, default=RUNS, help=f"folder of the runs ({RUNS})")
    out.add_argument("--out", type=Path, default=RESULT, help=f"file of the table ({RESULT})")
    out.add_argument("--plots", type=Path, default=PLOTS, help=f"folder of the plots ({PLOTS})")
    out.add_argument("--attempts", type=int, default=16, help="attempts per problem (16)")
    out.add_argument(
        "--num-problems", type=int, default=256, help="problems with several attempts (256)"
    )
    out.add_argument("--plan", action="store_true", help="print the runs and their cost, and end")
    out.add_argument("--no-estimate", action="store_true", help="do not estimate the cost first")
    return out


def main() -> int:
    """The command; returns its exit code."""
    arguments = parser().parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    return run_command(lambda: make_table(arguments))


if __name__ == "__main__":
    sys.exit(main())
