"""Kill a run at random and at named moments, resume it, compare it with one that was not killed.

    python benchmarks/chaos.py --kills 40 [--seed 1] [--json]
    python benchmarks/chaos.py --kills 20 --ranks 2 --strategy fsdp2
    python benchmarks/chaos.py --kills 20 --signal TERM

A small four-stage run is started in processes of its own, and one of them is ended by SIGKILL, or
gets a signal that asks it to stop: after a random time,
or at a named moment (the n-th call of a function: a step, a checkpoint half written, an evaluation,
a rollout, the export). It is resumed with `resume=auto`, perhaps killed again, and must end with
the very bits of the whole run: weights of every stage, metrics, completions, summary and export.
Clocks (seconds, tokens per second) are left out of the comparison.

With several ranks the others must end by themselves. A run that stops at a signal with a checkpoint
counts as killed, too.

Prints one line per kill, and with --json `{"kills", "bit_equal", "stages"}`: kills by the stage in
which the run died. Exit code 1 unless every run is bit equal.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import TINY_MODEL, add_json_option, print_json

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
    *TINY_MODEL,
    "checkpoint_minutes=0",
    "resume=auto",
]
CLOCKS = {"step_time", "rollout_time", "tokens_per_second", "seconds"}
MOMENTS = {
    "step": ("mtp.stages.loop", "step_batches", 18),
    "update": ("mtp.stages.loop", "update", 18),
    "rollout": ("mtp.training.remote_sampler", "sample", 4),
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
OF_EVERY_RANK = ("step", "update", "rollout", "evaluation", "end of stage")
"""Moments that every rank has; the first alone writes files."""
STOPPED = 130
"""Exit code of a run that has stopped at a signal, with a checkpoint."""


def compose(folder: Path, more: list[str]) -> Any:
    """The config of the run, with more overrides."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from mtp.cli.hydra import register_configs
    from mtp.config import to_run_config

    register_configs()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return to_run_config(hydra_compose("train", [*OVERRIDES, *more, f"run_dir={folder}"]))


def die_at(number: int, module: str, name: str, call: int, inside: bool) -> None:
    """Let this process send itself a signal at the given call of a function: before it, or after
    its work and before its caller continues.
    """
    import importlib

    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, seen = getattr(owner, last), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        is_call = len(seen) == call  # the function may call itself
        if is_call and not inside:
            os.kill(os.getpid(), number)
        result = original(*args, **kwargs)
        if is_call and inside:
            os.kill(os.getpid(), number)
        return result

    setattr(owner, last, counted)


def start(folder: Path, log: Path, more: list[str], ranks: int, plan: "Plan | None") -> list[int]:
    """Fork the processes of a run, one of them perhaps with a planned death. Returns their pids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start_rank(
            rank, port, folder, log, more, ranks, plan if plan and plan.rank == rank else None
        )
        for rank in range(ranks)
    ]


def start_rank(
    rank: int, port: int, folder: Path, log: Path, more: list[str], ranks: int, plan: "Plan | None"
) -> int:
    """Fork one process of a run. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if ranks > 1:
            os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_PORT": str(port)}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        if plan is not None and plan.at is not None:
            die_at(plan.number, *plan.at)
        from mtp.trainer import Interrupted, train

        try:
            train(compose(folder, more))
            code = 0
        except Interrupted:
            code = STOPPED
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)
    return 0  # not reached


def wait(pids: list[int], plan: "Plan | None" = None) -> bool:
    """Wait for the processes of a run, sending a plan's signal after its time. True if it has
    ended; False if it has died, or stopped.
    """
    deadline = time.monotonic() + plan.after if plan and plan.after is not None else None
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if plan and deadline is not None and time.monotonic() > deadline:
            deadline = None
            if pids[plan.rank] not in codes:
                os.kill(pids[plan.rank], plan.number)
        time.sleep(0.002)
    return not any(codes.values())


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


@dataclass(frozen=True)
class Plan:
    """A planned death of one process of a run."""

    moment: str
    rank: int
    number: int
    """The signal."""
    after: float | None = None
    """Seconds after its start; None: at a named moment."""
    at: tuple[str, str, int, bool] | None = None
    """Arguments of `die_at`."""


def plan_of(kill: int, seed: int, seconds: float, ranks: int, number: int) -> Plan:
    """The planned death of a kill: at a named moment's call, or after a time."""
    rng = random.Random(f"{seed}/{kill}")
    if kill % 3 == 2:
        after = rng.uniform(0.1, seconds)
        return Plan("random time", rng.randrange(ranks), number, after=after)
    moment = list(MOMENTS)[(kill - kill // 3) % len(MOMENTS)]
    module, name, most = MOMENTS[moment]
    at = (module, name, rng.randint(1, most), rng.random() < 0.5)
    rank = rng.randrange(ranks) if moment in OF_EVERY_RANK else 0
    return Plan(moment, rank, number, at=at)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40, metavar="N", help="default 40")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the moments")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes; default 1")
    parser.add_argument("--strategy", default="auto", help="of several ranks: ddp or fsdp2")
    signals = ("KILL", "TERM", "USR1", "USR2", "INT")
    parser.add_argument("--signal", choices=signals, default="KILL", help="default KILL")
    add_json_option(parser)
    arguments = parser.parse_args()
    number = signal.Signals[f"SIG{arguments.signal}"]
    ranks, seed = arguments.ranks, arguments.seed
    more = [f"fabric.devices={ranks}", f"fabric.strategy={arguments.strategy}"]

    import mtp.trainer  # noqa: F401  # once, for all processes that are forked

    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    stages: Counter[str] = Counter()
    num_equal = kill = 0
    try:
        whole = folder / "whole"
        began = time.monotonic()
        if not wait(start(whole, folder / "whole.log", more, ranks, None)):
            raise SystemExit(f"the whole run failed:\n{(folder / 'whole.log').read_text()}")
        seconds = time.monotonic() - began
        at = 0
        while kill < arguments.kills:
            at += 1
            run, log = folder / f"run{at}", folder / f"run{at}.log"
            died: list[str] = []
            # One run in four is killed again after it was resumed.
            for turn in range(2 if at % 4 == 3 and kill + 1 < arguments.kills else 1):
                plan = plan_of(2 * at + turn, seed, seconds, ranks, number)
                if wait(start(run, log, more, ranks, plan), plan):
                    break  # it ended before its moment came
                where = f"{plan.moment} in {stage_of(run)}"
                died.append(where if ranks == 1 else f"{where}, rank {plan.rank}")
                stages[stage_of(run)] += 1
            kill += len(died)
            if not died:
                shutil.rmtree(run, ignore_errors=True)
                continue
            has_ended = wait(start(run, log, more, ranks, None))
            found = differences(run, whole) if has_ended else [f"resuming failed, see {log}"]
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
