"""Impossible input for train.py and the commands: each must end in one line that names the mistake.

    python benchmarks/fuzz.py --cases 1000 [--seed 0] [--kind data] [--json]

A case is a command line and the files that it reads. Its generator makes a change that is known to
be impossible, therefore the right end is always the same: exit code 2, one line `error: ...` that
names the key, the option or the file, no traceback, and no file that was not there before. Cases
run in forks of one process, because a fresh interpreter would spend seconds on imports.

    named_errors   cases that ended right
    tracebacks     cases that ended in a traceback, or were killed
    half_written   cases that left, changed or removed a file

Other cases are printed as `unnamed` (the line names nothing) or `taken` (the command continued).
"""

import argparse
import json
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz_cases import KINDS, ROOT, TINY, Case, World, make_case

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
SECONDS = 60.0
"""Longest that a case may take."""


def prepare(case: Case, world: World, home: Path) -> None:
    """The files of a case."""
    for to, source in case.runs.items():
        shutil.copytree(world.home / "run" / source, home / to, dirs_exist_ok=True)
    for path, content in case.files.items():
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_bytes(content)
    for path in case.removed:
        (home / path).unlink()


def state(home: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder; folders have size -1."""
    found = {}
    for path in home.rglob("*"):
        about = path.lstat()
        size, changed = (-1, 0) if path.is_dir() else (about.st_size, about.st_mtime_ns)
        found[str(path.relative_to(home))] = (size, changed)
    return found


def execute(program: str, arguments: list[str], home: Path, log: Path) -> int:
    """Run a command in a fork with `home` as its folder; returns its exit code, -9 if killed."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        os._exit(inside(program, arguments, home, log))
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -9


def inside(program: str, arguments: list[str], home: Path, log: Path) -> int:
    """The work of the fork."""
    code: Any = 1
    try:
        os.chdir(home)
        null = os.open(os.devnull, os.O_RDONLY)
        out, err = (
            os.open(f"{log}.{n}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC) for n in ("out", "err")
        )
        for number, stream in enumerate((null, out, err)):
            os.dup2(stream, number)
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
        sys.argv = [program, *arguments]
        sys.path.insert(0, str(home))
        if program == "train.py":
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            sys.modules.pop(program, None)
            runpy.run_module(program, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    return code


def verdict_of(case: Case, code: int, said: str) -> str:
    """named, unnamed, traceback or taken."""
    if "Traceback" in said or code not in (0, 2):
        return "traceback"
    if code == 0:
        return "taken"
    lines = [line for line in said.splitlines() if line.strip()]
    is_usage = bool(lines) and lines[0].startswith("usage:") and ": error: " in lines[-1]
    is_one_line = len(lines) == 1 and lines[0].startswith("error: ")
    names_it = bool(lines) and any(name in lines[-1] for name in case.names)
    return "named" if (is_one_line or is_usage) and names_it else "unnamed"


def make_world(home: Path) -> World:
    """A finished run in `home`, and the config's keys. Imports what the commands import."""
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    sys.dont_write_bytecode = True
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ["HYDRA_MAIN_MODULE"] = "__main__"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import DictConfig, ListConfig, OmegaConf

    import mtp.cli.main
    import mtp.cli.streaming_search
    import mtp.evaluation.evaluate_search
    import mtp.trainer
    from mtp.cli.hydra import register_configs
    from mtp.common.bounds import numbers
    from mtp.config import to_run_config

    torch.set_num_threads(1)
    register_configs()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("train", [*TINY, "run_dir=run"])
        config = to_run_config(composed)
    GlobalHydra.instance().clear()
    mtp.trainer.build_model(config.model, config.head, config.decoding, config.task.build())
    code = execute("train.py", [*TINY, "run_dir=run"], home, home / "first")
    if code:
        raise SystemExit(f"the finished run failed:\n{(home / 'first.err').read_text()}")

    def leaves(node: Any, key: str = "") -> list[str]:
        if isinstance(node, DictConfig):
            return [leaf for name in node for leaf in leaves(node._get_node(name), f"{key}{name}.")]
        return [] if isinstance(node, ListConfig) else [key[:-1]]

    OmegaConf.set_struct(composed, False)
    composed.pop("experiment", None)
    known = [(key, value, bounds) for key, value, bounds in numbers(config) if bounds is not None]
    return World(home, known, leaves(composed))


def fuzz(
    cases: int, seed: int, kind: str | None = None, show: Callable[[str], Any] = print
) -> dict[str, Any]:
    """Run cases and count how they ended; what did not end right is shown."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        world = make_world(Path(name))
        for number in range(cases):
            home, log = Path(name) / "case", Path(name) / "log"
            made, case = make_case(world, seed, number, kind)
            home.mkdir()
            prepare(case, world, home)
            before = state(home)
            code = execute(case.program, case.arguments, home, log)
            said = Path(f"{log}.err").read_text(errors="replace")
            end, changed = verdict_of(case, code, said), before.items() ^ state(home).items()
            counts[end] += 1
            counts["half_written"] += bool(changed)
            if end != "named" or changed:
                mine = [a for a in case.arguments if a not in TINY]
                show(
                    f"{number} {made}: {end}, exit code {code}: {case.program} {mine}, "
                    f"names {case.names}, files {sorted(case.files)}, removed {case.removed}\n"
                    f"  changed {sorted({path for path, _ in changed})[:4]}\n"
                    + "".join(f"  {line[:400]}\n" for line in said.splitlines()[-3:])
                )
            shutil.rmtree(home)
    return {
        "cases": cases,
        "named_errors": counts["named"],
        "tracebacks": counts["traceback"],
        "half_written": counts["half_written"],
        "unnamed": counts["unnamed"],
        "taken": counts["taken"],
    }


def main() -> int:
    """Print the counts; the exit code is 1 unless every case ended right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS), help="cases of one kind only")
    parser.add_argument("--json", action="store_true", help="print the counts alone, as JSON")
    given = parser.parse_args()
    to = sys.stderr if given.json else sys.stdout
    found = fuzz(given.cases, given.seed, given.kind, lambda text: print(text, file=to, flush=True))
    print(json.dumps(found) if given.json else found)
    return 0 if found["named_errors"] == found["cases"] and not found["half_written"] else 1


if __name__ == "__main__":
    sys.exit(main())
