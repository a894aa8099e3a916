"""Kill a run at random and at named moments, resume it, compare it with one that was not killed.

    python benchmarks/chaos.py --kills 40 [--seed 1] [--json]

A small four-stage run is started in a process of its own and ended by SIGKILL: after a random time,
or at a named moment (the n-th call of a function: a step, a checkpoint half written, an evaluation,
a rollout, the export). It is resumed with `resume=auto`, perhaps killed again, and must end with
the very bits of the whole run: weights of every stage, metrics, completions, summary and export.
Clocks (seconds, tokens per second) are left out of the comparison.

Prints one line per kill, and with --json `{"kills", "bit_equal", "stages"}`: kills by the stage in
which the run died. Exit code 1 unless every run is bit equal.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from measure import add_json_option, print_json

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

OVERRIDES = [
    "stages.main.steps=6",
    "stages.head.steps=4",
    "stages.joint.steps=4",
    "stages.rl.steps=4",
    "stages.rl.rollouts.num_prompts=4",
    "stages.rl.rollouts.group_size=4",
    "stages.joint.evaluate_every=2",
    "stages.rl.evaluate_every=2",
    "evaluation.num_problems=8",
    "evaluation.num_interim_problems=4",
    "evaluation.reference=start",
    "logger.log_every=1",
    "fabric.accelerator=cpu",
    "fabric.num_threads=1",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "head.hidden_size=16",
    "head.intermediate_size=24",
    "checkpoint_minutes=0",
    "resume=auto",
]
CLOCKS = {"step_time", "rollout_time", "tokens_per_second", "seconds"}
MOMENTS = {
    "step": ("mtp.stages.loop", "step_batches", 18),
    "update": ("mtp.stages.loop", "update", 18),
    "rollout": ("mtp.groups", "sample", 4),
    "evaluation": ("mtp.stages.evaluation", "evaluate", 6),
    "checkpoint written": ("mtp.hub.checkpoint", "write_state", 24),
    "checkpoint moved": ("mtp.common.files", "_settle", 40),
    "old checkpoint removed": ("mtp.hub.checkpoint", "checkpoints", 24),
    "stage saved": ("mtp.stages.loop", "save_model", 4),
    "end of stage": ("mtp.stages.loop", "end_stage", 4),
    "metrics": ("mtp.reports.json_lines", "JsonLines.append", 60),
    "export": ("mtp.trainer", "export", 1),
    "export written": ("mtp.hub.export", "write_card", 1),
    "curves": ("mtp.trainer", "save_curves", 1),
    "summary": ("mtp.trainer", "save_text", 1),
    "start": ("mtp.run", "save_run_config", 1),
}
"""Named moments: module, function, and up to which call of it a kill is placed."""


def compose(folder: Path) -> Any:
    """The config of the run."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from mtp.cli.hydra import register_configs
    from mtp.config import to_run_config

    register_configs()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return to_run_config(hydra_compose("train", [*OVERRIDES, f"run_dir={folder}"]))


def die_at(module: str, name: str, call: int, inside: bool) -> None:
    """Let this process kill itself at the given call of a function: before it, or after its work
    and before its caller continues.
    """
    import importlib

    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, seen = getattr(owner, last), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) == call and not inside:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if len(seen) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, last, counted)


def start(folder: Path, log: Path, plan: tuple[str, str, int, bool] | None) -> int:
    """Fork a process that runs the run, with a planned death or none. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if plan is not None:
            die_at(*plan)
        from mtp.trainer import train

        train(compose(folder))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)
    return 0  # not reached


def wait(pid: int, seconds: float | None = None) -> int:
    """Wait for a process, killing it after some seconds. Returns minus its signal, or its code."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, 0 if deadline is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = None
        time.sleep(0.002)


def stage_of(folder: Path) -> str:
    """The stage in which a run died, by the files that it has written."""
    path = folder / "metrics.jsonl"
    if (folder / "summary.json").is_file():
        return "end"
    if (folder / "stages" / "rl").is_dir():
        return "export"
    if not path.is_file():
        return "start"
    stages = [json.loads(line)["stage"] for line in path.read_text().split("\n")[:-1]]
    return stages[-1] if stages else "start"


def without_clocks(node: Any) -> Any:
    """The node without its clocks."""
    if isinstance(node, dict):
        return {k: without_clocks(v) for k, v in node.items() if k not in CLOCKS}
    return [without_clocks(v) for v in node] if isinstance(node, list) else node


def differences(mine: Path, whole: Path) -> list[str]:
    """Names of the files in which a run differs from the whole one."""

    def files(folder: Path) -> dict[str, Path]:
        return {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}

    ours, theirs = files(mine), files(whole)
    found = sorted(ours.keys() ^ theirs.keys())
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name].read_bytes(), theirs[name].read_bytes()
        if name in ("metrics.jsonl", "completions.jsonl"):
            a, b = (without_clocks([json.loads(line) for line in x.splitlines()]) for x in (a, b))
        elif name == "summary.json":
            a, b = (without_clocks(json.loads(x)) | {"export": ""} for x in (a, b))
        elif name in ("export/README.md", "config.yaml"):
            a, b = (x.replace(str(f).encode(), b"") for x, f in ((a, mine), (b, whole)))
            if name == "export/README.md":  # its table has a column of seconds
                a, b = (without_seconds(x.decode()) for x in (a, b))
        elif name == "metrics.csv" or name.startswith("checkpoints/"):
            continue  # made of metrics.jsonl; checkpoints hold clocks
        if a != b:
            found.append(name)
    return found


def without_seconds(card: str) -> list[str]:
    """The lines of a model card without the last cell of its table's rows."""
    return [
        line.rstrip(" |").rpartition("|")[0] if line.startswith("|") else line
        for line in card.splitlines()
    ]


def plan_of(kill: int, seed: int, seconds: float) -> tuple[str, Any]:
    """A planned death: at a named moment's call, or after a time in seconds."""
    rng = random.Random(f"{seed}/{kill}")
    if kill % 3 == 2:
        return "random time", rng.uniform(0.1, seconds)
    moment = list(MOMENTS)[(kill - kill // 3) % len(MOMENTS)]
    module, name, most = MOMENTS[moment]
    return moment, (module, name, rng.randint(1, most), rng.random() < 0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40, metavar="N", help="default 40")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the moments")
    add_json_option(parser)
    arguments = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    stages: Counter[str] = Counter()
    num_equal = kill = 0
    try:
        whole = folder / "whole"
        began = time.monotonic()
        if wait(start(whole, folder / "whole.log", None)):
            raise SystemExit(f"the whole run failed:\n{(folder / 'whole.log').read_text()}")
        seconds = time.monotonic() - began
        number = 0
        while kill < arguments.kills:
            number += 1
            run, log = folder / f"run{number}", folder / f"run{number}.log"
            died: list[str] = []
            # One run in four is killed again after it was resumed.
            for turn in range(2 if number % 4 == 3 and kill + 1 < arguments.kills else 1):
                moment, how = plan_of(2 * number + turn, arguments.seed, seconds)
                is_timed = isinstance(how, float)
                pid = start(run, log, None if is_timed else how)
                code = wait(pid, how if is_timed else None)
                if code != -signal.SIGKILL:
                    break  # it ended before its moment came
                died.append(f"{moment} in {stage_of(run)}")
                stages[stage_of(run)] += 1
            kill += len(died)
            if not died:
                shutil.rmtree(run, ignore_errors=True)
                continue
            code = wait(start(run, log, None))
            found = differences(run, whole) if code == 0 else [f"resuming failed, see {log}"]
            num_equal += len(died) if not found else 0
            print(f"{kill:4} {', then '.join(died)}: {', '.join(found) or 'bit equal'}", flush=True)
            if found:
                print(log.read_text()[-2000:], file=sys.stderr)
            shutil.rmtree(run, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{num_equal} of {kill} kills bit equal")
    print_json(arguments.json, {"kills": kill, "bit_equal": num_equal, "stages": dict(stages)})
    return 0 if num_equal == kill else 1


if __name__ == "__main__":
    sys.exit(main())
