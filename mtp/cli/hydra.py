"""Hydra's side of a run: the schema, the resolvers of conf/train.yaml, a run and a sweep's jobs."""

import hashlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from ..common.errors import in_quotes, one_line, reading
from ..common.files import save_text
from ..common.process import print_error, run_command
from ..common.watch import end_with
from ..config import RunConfig, decides_numbers, to_run_config
from ..reports.loggers import SINKS
from ..tasks import TASK_CONFIGS
from . import slurm
from .code_copy import check_code, run_from_copy, this_code


def compose_and_run(arguments: list[str], conf: Path) -> None:
    """Compose the config from Hydra's arguments and a folder of settings, and run it.

    A sweep runs each of its jobs, or gives them to a launcher.
    """
    register_configs()
    given, submission = list(sys.argv), Submission(this_code().name, os.getpid())

    def task(config: DictConfig) -> float | None:
        """A run, or a job of a sweep; a sweeper may maximise the accuracy that it returns.

        Launchers send it to other processes, with the values of this one.
        """
        sys.argv = given  # a strategy of several processes starts the same command again
        overrides = job_overrides()
        if overrides is None:
            code = run_command(lambda: run_alone(config))  # Hydra would print its own message
            return sys.exit(code) if code else None
        settings = job_settings()
        begin_job(submission)

        def job() -> float | None:
            check_code(submission.code)
            return run(config)

        return run_job(job, Path(config.run_dir), overrides, settings)

    sys.argv = [given[0], *arguments]  # where Hydra reads them
    try:
        hydra.main(version_base="1.3", config_path=str(conf), config_name="train")(task)()
    except ValueError as error:
        if "No trials are completed" in str(error):  # Optuna's, which has no best job then
            raise ValueError("no job of the sweep has ended well; mend the errors above") from None
        raise
    finally:
        sys.argv = given


def run_alone(config: DictConfig) -> float | None:
    """`run` outside of a sweep. Raises ValueError if a setting asks for a sweep."""
    choices = HydraConfig.get().runtime.choices
    for group, default in (("study", None), ("sweep", "basic"), ("sweeper", "basic")):
        if choices[group] != default:
            raise ValueError(f"{group}={choices[group]} belongs to a sweep: add -m")
    return run(config)


def run(config: DictConfig) -> float | None:
    """Run the configured stages. Returns the last fast accuracy, else the only one."""
    from ..trainer import Interrupted, train
    from ..training.runtime import hand_on

    try:
        summary = train(to_run_config(config))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        hand_on(stop.signal)
        # A launcher of several processes treats any other exit code as a crash and kills the first
        # process, which may still be writing the checkpoint.
        sys.exit(128 + stop.signal if os.environ.get("LOCAL_RANK", "0") == "0" else 0)
    last = summary["stages"][-1]
    found = (last.get(name) for name in ("fast_accuracy", "slow_accuracy", "accuracy"))
    return next((float(accuracy) for accuracy in found if accuracy is not None), None)


@dataclass
class Submission:
    """The command that started a sweep, as its jobs know it. Launchers pickle it."""

    code: str
    """Name of the copy of the code."""
    process: int
    noted: int | None = None
    """In a job on Slurm, the signals since the job has read this, see `slurm.note_signals`."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"noted": slurm.note_signals() if slurm.is_job() else None}


def register_configs() -> None:
    """Add the schemas of runs, tasks and sinks, and the resolvers, to those that conf/ can name."""
    store = ConfigStore.instance()
    store.store(name="run_config", node=RunConfig)
    for name, config in TASK_CONFIGS.items():
        store.store(group="task", name=f"{name}_schema", node=config)
    for name, kind in SINKS.items():
        package = f"logger.sinks.{name}"
        store.store(group="logger", name=f"{name}_schema", node=kind.config, package=package)
    for resolver in (in_sweep, run_folder, job_folder, variant_folder, sweep_name, code_folder):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


def in_sweep(then: Any, otherwise: Any) -> Any:
    """`${in_sweep:a,b}` is a within a job of a sweep, else b."""
    in_job = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return then if in_job else otherwise


def run_folder(name: str) -> str:
    """`${run_folder:${name}}` is runs/<name>, or the folder of a sweep's job."""
    if not in_sweep(True, False):
        return f"runs/{name}"
    folder = Path(HydraConfig.get().runtime.output_dir)
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def sweep_name() -> str | None:
    """`${sweep_name:}` is the name of a sweep's folder; None outside of one."""
    return Path(HydraConfig.get().runtime.output_dir).parent.name if in_sweep(True, False) else None


def code_folder() -> str:
    """`${code_folder:}` is the folder that `mtp` is imported from: in a sweep, its copy."""
    return str(this_code())


def job_folder(overrides: str, number: int) -> str:
    """Name of a job's folder: its overrides, as far as they make a good name.

    A name that had to be changed or cut ends in a hash, so that two jobs never share a folder.
    """
    name = re.sub(r"[^\w.,=+-]", "_", overrides) or f"job{number}"
    if name == overrides and len(name) <= 120 or not overrides:
        return name
    return f"{name[:100]}-{hashlib.sha256(overrides.encode()).hexdigest()[:6]}"


def variant_folder(name: str) -> str:
    """`${variant_folder:${name}}` is VARIANT/SEED of a run named COMPARISON/VARIANT/SEED.

    A study's sweep is in the folder of its comparison, so a job is where the run of its name is.
    """
    comparison, separator, rest = name.partition("/")
    if not (comparison and separator and rest):
        raise ValueError(
            f"name must be COMPARISON/VARIANT/SEED in a study, got {name!r}; leave it as the "
            "experiment has it"
        )
    return rest


def job_overrides() -> dict[str, str] | None:
    """Overrides that distinguish this job from the others of its sweep, by key; None outside a
    sweep.
    """
    if not in_sweep(True, False):
        return None
    hydra = HydraConfig.get()
    fixed = hydra.job.config.override_dirname.exclude_keys
    pairs = (override.partition("=")[::2] for override in hydra.overrides.task)
    return {key: value for key, value in pairs if key.lstrip("+~") not in fixed}


def job_settings() -> dict[str, str]:
    """Overrides of this job that decide its numbers, by key, with those that all jobs share."""
    given = filter(decides_numbers, HydraConfig.get().overrides.task)
    return dict(override.partition("=")[::2] for override in given)


def sweeper_overrides(settings: Any) -> list[Override]:
    """Overrides that the configuration of the sweeper holds, as a study's does.

    settings: the node `hydra` of a configuration. Those of the command line come after them.
    """
    params = settings.sweeper.get("params") or {}
    return OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in params.items()])


def jobs_of_command(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Name and overrides of each job that a sweep's command starts, from its `multirun.yaml`.

    Hydra writes this file before a launcher gets the jobs. Only Hydra's own sweeper knows all of
    them at that time; the list is empty for another one, such as Optuna's, and for a sweep over
    `glob(...)`, whose values are names of files in conf/. Raises ValueError for a damaged file.
    """
    with reading(str(path)):
        settings: Any = OmegaConf.load(path).hydra
        if not str(settings.sweeper._target_).endswith(f".{BasicSweeper.__name__}"):
            return []
        given = OverridesParser.create().parse_overrides(list(settings.overrides.task))
        every = sweeper_overrides(settings) + given
    if any(override.value_type == ValueType.GLOB_CHOICE_SWEEP for override in every):
        return []
    shared = {one.get_key_element() for one in given if not one.is_sweep_override()}
    found = []
    for number, job in enumerate(BasicSweeper.split_arguments(every, None)[0]):
        pairs = [override.split("=", 1) for override in job]
        own = {key: value for key, value in pairs if key not in shared}
        lines = sorted(f"{key}={value}" for key, value in own.items())  # as Hydra's are
        name = job_folder(",".join(lines), number)
        found.append((name, own))
    return found


class SweepCallback(Callback):
    """Names a sweep's jobs by their differences, and ends the sweep with its table."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Leave out overrides that all jobs share from their names; one folder for all of them."""
        overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        given = {o.key_or_group for o in overrides}
        every = {o.key_or_group: o for o in sweeper_overrides(config.hydra) + overrides}
        swept = {key for key, override in every.items() if override.is_sweep_override()}
        if "name" in swept or "run_dir" in given:
            print_error(
                "a sweep writes to runs/<name>_sweep/<overrides>: name cannot be swept over "
                "and run_dir cannot be set; use name=... or hydra.sweep.dir=... to move the sweep"
            )
            sys.exit(2)
        fixed, launcher = ",".join(sorted(given - swept)), config.hydra.launcher
        is_on_slurm = config.hydra.runtime.choices["hydra/launcher"] == "submitit_slurm"
        if is_on_slurm and 60 * launcher.timeout_min <= launcher.signal_delay_s:
            print_error(
                f"hydra.launcher.timeout_min must be above hydra.launcher.signal_delay_s="
                f"{launcher.signal_delay_s} seconds, got {launcher.timeout_min} minutes: a job "
                "would be asked to end as soon as it begins; give it more time"
            )
            sys.exit(2)
        run_from_copy(Path(config.hydra.sweep.dir), sys.argv[1:])
        with read_write(config.hydra), open_dict(config.hydra):
            if is_on_slurm:
                launcher.setup = [slurm.QUEUE_AGAIN, *(launcher.setup or [])]
            config.hydra.overrides.hydra.append(
                f"hydra.job.config.override_dirname.exclude_keys=[{fixed}]"
            )
            # An experiment may set another name; its jobs belong here nonetheless.
            folder = config.hydra.sweep.dir
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir={in_quotes(folder)}")
        logs = f"; output of the jobs: {folder}/.submitit/" if "submitit_folder" in launcher else ""
        print(f"sweep over {', '.join(sorted(swept)) or 'nothing'}: {folder}{logs}", flush=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table, and the values that Optuna found; exit with code 1 if a job failed."""
        from ..reports.sweep import report

        folder = Path(config.hydra.sweep.dir)
        num_failed = report(folder)
        if config.hydra.runtime.choices["hydra/sweeper"] == "optuna":
            found: Any = OmegaConf.load(folder / "optimization_results.yaml")
            best = ", ".join(f"{key}={value}" for key, value in found["best_params"].items())
            print(f"best accuracy, {100 * found['best_value']:.1f} %: {best}")
        if num_failed:
            sys.exit(1)


def run_job(
    run: Callable[[], float | None],
    folder: Path,
    overrides: dict[str, str],
    settings: dict[str, str] | None = None,
) -> float | None:
    """Run a sweep's job and return its value.

    An exception is printed and written to `job.json`, and the value is None, so that the other jobs
    of the sweep run and the table lists the error. Optuna counts the job as failed. A run that does
    not take these settings keeps what the file said of its own. overrides: those that distinguish
    it. settings: all that decide its numbers; None: no others.
    """
    noted = {"overrides": overrides, "settings": overrides if settings is None else settings}
    before, trained = noted_before(folder), config_of(folder)
    note_job(folder, noted, None)
    try:
        value = run()
        note_job(folder, noted, None)  # another command may have noted that the run is in use
        return value
    except Exception as error:
        line = one_line(error)
        if line is None:
            traceback.print_exc()
            line = f"{type(error).__name__}: {error}".splitlines()[0]
        print_error(f"{job_name(folder)}: {line}")
        is_refused = trained is not None and config_of(folder) == trained
        note_job(folder, before if is_refused and before else noted, line)
        return None


def job_name(folder: Path) -> str:
    """The path of a job's folder in its sweep's."""
    sweep = Path(HydraConfig.get().sweep.dir) if HydraConfig.initialized() else folder.parent
    folder, sweep = folder.absolute(), sweep.absolute()
    return str(folder.relative_to(sweep)) if folder.is_relative_to(sweep) else folder.name


def begin_job(submission: Submission) -> None:
    """Prepare the process of a job: its working folder, and its end by a signal of Slurm or if its
    launcher ends.
    """
    if submission.noted is not None:
        slurm.end_if_asked(submission.noted)
    hydra, launcher = HydraConfig.get(), submission.process
    os.chdir(hydra.runtime.cwd)  # Ray starts processes wherever it was started itself
    # Slurm's jobs outlive the command that submitted them; Ray ends its own.
    if hydra.runtime.choices["hydra/launcher"] in ("joblib", "submitit_local"):
        line = f"process {launcher}, which started the sweep, has ended; start it again to continue"
        end_with(launcher, line)


def noted_before(folder: Path) -> dict[str, Any]:
    """The content of `job.json` but its error; empty if there is none that can be read."""
    try:
        found = json.loads((folder / "job.json").read_text())
        return {key: found[key] for key in ("overrides", "settings") if key in found}
    except (OSError, ValueError, TypeError):
        return {}


def config_of(folder: Path) -> bytes | None:
    """The settings that a run was begun or continued with; None if it has not begun."""
    path = folder / "config.yaml"
    return path.read_bytes() if path.is_file() else None


def note_job(folder: Path, noted: dict[str, Any], error: str | None) -> None:
    """Write `job.json`."""
    save_text(folder / "job.json", json.dumps({**noted, "error": error}, indent=2) + "\n")
