"""A run: its stages one after the other, evaluated, checkpointed, exported.

Randomness of a step is derived from (seed, stage, step), and data from a running position. Hence a
run that was stopped and resumed gives exactly the same numbers as an uninterrupted one.
"""

import json
import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric, seed_everything
from mtp_kernels.dispatch import TRITON_INSTALLED, triton_interpreted
from rich.console import Console

from .channels.saving import ATTRIBUTE
from .channels.stage import attach_channel, run_channel_stage
from .common.files import save_atomically, save_text
from .config import RunConfig, load_run_config
from .hub.build import build_model, has_trained_head, load_model
from .hub.export import export
from .hub.run_folder import START_ANEW, RunFolder, changed_settings, claim
from .modeling.compiled import check_traceable
from .modeling.contract import head_is_trained
from .reference import check_references, check_saved_reference, save_start
from .reports.curves import save_curves
from .reports.loggers import Log, LoggedRun
from .reports.page import REPORT, write_page
from .reports.progress import make_console
from .reports.tables import print_table
from .run import Progress, Run, discard_what_is_replaced, read_start, settings_of, write_start
from .stages.checkpointing import Interrupted, stop_if_asked
from .stages.dry_run import dry_config, estimate
from .stages.loop import run_stage
from .tasks.base import RunState, Task, check_disjoint
from .training.examples import checked_task
from .training.lifeline import lifeline
from .training.numbers import active_dropout
from .training.optimizers import num_parameters
from .training.precision import cast_weights
from .training.remote_sampler import check_ray
from .training.runtime import (
    StopRequest,
    check_writable,
    naming_what_is_not_finite,
    on_first_process,
)
from .training.sharding import is_sharded

__all__ = ["Interrupted", "train"]

_log = logging.getLogger(__name__)


def train(config: RunConfig) -> dict[str, Any]:
    """Run all stages and return the content of `summary.json`.

    A resumed run continues with the weights of its checkpoint; one that has ended returns its
    summary again and changes nothing.

    Raises:
        ValueError: for impossible settings, naming the key.
        Interrupted: after a signal; the checkpoint is saved.
    """
    config.validate()
    check_writable(Path(config.run_dir), "run_dir")
    check_references(config)
    config.logger.check_installed()
    fabric = config.fabric.build()
    with lifeline(fabric, good=Interrupted):
        return train_on(fabric, config)


def train_on(fabric: Fabric, config: RunConfig) -> dict[str, Any]:
    """`train` on devices and processes that are there."""
    check_kernels(config.kernels, fabric.device)
    if any(stage.rollouts.lag is not None for stage in config.active_stages().values()):
        check_ray(fabric.device.type)
    path, full_steps = Path(config.run_dir), {}
    if config.dry_run:
        path = path.with_name(path.name + "-dry_run")
        full_steps = {name: stage.steps for name, stage in config.active_stages().items()}
        config = dry_config(config)
    folder = RunFolder(path, is_dry_run=config.dry_run)
    checkpoint = on_first_process(fabric, lambda: claim(folder, config.resume, config.overwrite))
    try:
        summary = run_stages(config, fabric, folder, checkpoint)
        if config.dry_run and fabric.is_global_zero:
            cost = estimate(full_steps, summary, path / "metrics.jsonl")
            make_console(quiet=False).print(cost)
    finally:
        if fabric.is_global_zero:
            if config.dry_run:
                folder.remove()
            folder.restore_replaced()
            folder.release()
            if config.dry_run and path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    return summary


def run_stages(
    config: RunConfig, fabric: Fabric, folder: RunFolder, checkpoint: str | None
) -> dict[str, Any]:
    """The stages from the first, or from a checkpoint's, then the export."""
    console = make_console(quiet=not fabric.is_global_zero)
    settings = settings_of(config, fabric)
    progress, state = Progress(), None
    if checkpoint is not None:
        state = read_start(checkpoint, settings, config)
        progress = Progress(**state["progress"])
        if has_ended(config, folder.path, progress):
            summary = json.loads((folder.path / "summary.json").read_text())
            console.print(f"{folder.path} has ended; use overwrite=true to run it again")
            print_table(console, summary)
            return summary
    elif config.resume and (folder.path / "summary.json").is_file():
        return ended_without_checkpoints(config, folder.path, console)
    seed_everything(config.seed, verbose=False)
    task = config.task.build()
    if progress.bookmark:
        task.restore(progress.bookmark)
    check_disjoint(task)
    check_outcomes(config, task)
    check_projects(config, task)
    check_heads(config)
    model, fmt = build_model(config.model, config.head, config.decoding, task)
    cast_weights(model, config.weight_dtype())
    if config.weight_dtype() == torch.bfloat16 and fabric.is_global_zero:
        _log.warning(
            "the weights are bfloat16: a step that changes one by less than about 1/500 of it is "
            "rounded away, most of them at rates of 1e-5; model.dtype=float32 with "
            "fabric.precision=bf16-mixed keeps them in float32, which needs more memory"
        )
    if not config.channel.is_text:
        attach_channel(config, model, fmt, task)
    task = checked_task(
        task,
        config.decoding,
        config.active_stages(),
        model,
        fmt,
        config.evaluation.num_problems,
    )
    if config.fabric.strategy != "fsdp2":  # which moves each process's shard
        model.to(fabric.device)
    if config.decoding.compile_passes:
        check_traceable(model)
    if state is not None:
        load_weights(model, state.pop("model"), checkpoint)
        check_processes(model, progress)
    task.follow(partial(state_of, config, progress, task.size("train")))
    check_saved_reference(config, fmt)
    if fabric.is_global_zero:
        if state is None:
            folder.check_stays("model.source", config.model.source or "")
            folder.check_stays("evaluation.reference", config.evaluation.reference)
        write_start(folder, config, state)
    fabric.barrier()
    log = Log.of(config.logger) if fabric.is_global_zero else Log({})
    # Every model that the run saves says in its config whether its head is trained by then.
    model.config.mtp_head_is_trained = has_trained_head(config.model)
    console.print(
        f"{task.name}: {sizes_in_words(config, model)}; {fabric.device}, "
        f"{config.fabric.precision}; writing {folder.path}"
    )
    with StopRequest() as stop:
        run = Run(
            config,
            folder.path,
            fabric,
            console,
            task,
            model,
            fmt,
            log,
            progress,
            stop,
            settings,
            restored_rollouts=state.get("rollouts", []) if state else [],
        )
        try:
            if state is None:
                save_start(run)
            logged = LoggedRun(folder.path, asdict(config), progress.global_step)
            lines = log.start(logged, state["log"] if state else None)
            if state is not None:
                say_where(run, lines)
            if fabric.is_global_zero:
                run.discard = partial(
                    discard_what_is_replaced, folder, checkpoint, progress.global_step
                )
            for index, (name, stage) in enumerate(config.active_stages().items()):
                model.config.mtp_head_is_trained |= stage.train_head
                if index >= progress.stage:
                    states = state["optimizers"] if state else None
                    run_one = run_stage if config.channel.is_text else run_channel_stage
                    with naming_what_is_not_finite(model, partial(where, run, name)):
                        run_one(run, name, stage, states)
                    state = None
                    stop_if_asked(run, f"after stage {name}")
            run.trains()
            return finish(run)
        finally:
            log.finish(has_ended=False)


def has_ended(config: RunConfig, folder: Path, progress: Progress) -> bool:
    """True if the run is complete: all stages, the export and the summary exist."""
    return (
        progress.stage == len(config.active_stages())
        and (folder / "summary.json").is_file()
        and (final_model(config, folder) / "config.json").is_file()
    )


def ended_without_checkpoints(config: RunConfig, folder: Path, console: Console) -> dict[str, Any]:
    """The summary of a run that has ended and whose checkpoints somebody removed.

    Raises ValueError if the run had other settings or its model is gone, too.
    """
    saved = json.loads(json.dumps(asdict(load_run_config(folder / "config.yaml"))))
    changed_settings(saved, asdict(config))
    if not (final_model(config, folder) / "config.json").is_file():
        raise ValueError(f"{folder} holds neither checkpoints nor an export; {START_ANEW}")
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    console.print(f"{folder} has ended; use overwrite=true to run it again")
    print_table(console, summary)
    return summary


def final_model(config: RunConfig, folder: Path) -> Path:
    """The folder of the model that a run ends with. Only a text model is exported: other tools
    would read a comparator's weights without its channel.
    """
    if config.channel.is_text:
        return folder / "export"
    return folder / "stages" / list(config.active_stages())[-1]


def load_weights(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], checkpoint: str | None
) -> None:
    """Load the weights of a checkpoint into the model. Raises ValueError if they do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"the weights of {checkpoint} do not fit the model: {str(error).splitlines()[-1]}; "
            "set model.source to the model that the run began with"
        ) from None


def check_processes(model: Any, progress: Progress) -> None:
    """Raise ValueError if the model's noise depends on the processes and their number changed."""
    changes = {change["key"]: change for change in progress.changed}
    change = changes.get("fabric.processes")
    if change is None or change["global_step"] != progress.global_step:
        return
    dropout = active_dropout(model)
    if dropout is not None:
        raise ValueError(
            f"the number of processes must stay {change['then']}, got {change['now']}: the model's "
            f"{dropout} drops other numbers on other processes; set fabric.devices and "
            "fabric.num_nodes as they were"
        )


def say_where(run: Run, messages: list[str]) -> None:
    """Print where a resumed run continues, which settings changed and which logs are damaged."""
    progress, stages = run.progress, list(run.config.active_stages())
    where = "at the export"
    if progress.stage < len(stages):
        step = "evaluation" if progress.is_trained else f"step {progress.step + 1}"
        where = f"in stage {stages[progress.stage]} at its {step}"
    run.console.print(f"resumed {where}")
    for change in progress.changed:
        if change["global_step"] == progress.global_step:
            run.console.print(f"{change['key']} was {change['then']} and is now {change['now']}")
    for message in messages:
        run.console.print(message)


def state_of(config: RunConfig, progress: Progress, size: int | None) -> RunState:
    """The run's position, as rewards may read it; size: number of training examples."""
    return RunState(
        global_step=progress.global_step,
        max_steps=sum(stage.steps for stage in config.active_stages().values()),
        epoch=progress.position / size if size else None,
    )


def where(run: Run, stage: str) -> str:
    """The place in a run that an error names."""
    return f"stage {stage}, step {run.progress.step + 1}"


def finish(run: Run) -> dict[str, Any]:
    """Export, summary, curves and the table."""
    progress, folder = run.progress, run.folder
    summary = {
        "stages": progress.summaries,
        "seed": run.config.seed,
        "seconds": round(sum(stage["seconds"] for stage in progress.summaries), 1),
        "export": str(final_model(run.config, folder)),
    }
    if progress.changed:
        summary["changed_on_resume"] = progress.changed
    if run.fabric.is_global_zero:
        if run.config.channel.is_text:
            model = run.model
            if is_sharded(run.module):
                model, _ = load_model(folder / "stages" / progress.summaries[-1]["name"])
            export(model, run.fmt, folder / "export", summary, run.config)
        save_atomically(folder / "curves.png", lambda file: save_curves(progress.points, file))
        written = [final_model(run.config, folder), folder / "curves.png"]
        if run.log.stores_report:
            write_page([folder], folder / REPORT, summary=summary)
            written.append(folder / REPORT)
        for path in written:
            run.log.artifact(path)
        run.log.finish(has_ended=True)
        # Last, since a summary marks the run as ended.
        save_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        print_table(run.console, summary, keeps_export=not run.config.dry_run)
    return summary


def check_kernels(kernels: str, device: torch.device) -> None:
    """Raise ValueError if Triton's kernels are asked for where they cannot run."""
    if kernels != "triton":
        return
    if not TRITON_INSTALLED:
        raise ValueError(
            "kernels=triton needs the triton package; install it, or use kernels=torch"
        )
    if device.type != "cuda" and not triton_interpreted():
        raise ValueError(
            f"kernels=triton needs a GPU, got {device.type}; use kernels=auto, or set "
            "TRITON_INTERPRET=1 for Triton's interpreter, which is slow"
        )


def check_projects(config: RunConfig, task: Task) -> None:
    """Raise ValueError if a batch or a share of it cannot hold whole projects of the task."""
    size, segments = task.project_size, config.decoding.segments
    if segments.is_shared and size == 1:
        raise ValueError(
            "decoding.segments.memory_scope=shared needs a task of projects, which task "
            f"{task.name} is not; use task=pointer_chasing task.project_size=4, or problem"
        )
    processes = config.fabric.devices * config.fabric.num_nodes
    evaluation = config.evaluation
    numbers = {
        "evaluation.num_problems": (evaluation.num_problems, 1),
        "evaluation.num_interim_problems": (evaluation.num_interim_problems, 1),
        "evaluation.batch_size": (evaluation.batch_size, 1),
    }
    for name, stage in config.active_stages().items():
        numbers |= {
            f"stages.{name}.examples.batch_size": (stage.examples.batch_size, processes),
            f"stages.{name}.rollouts.num_prompts": (stage.rollouts.num_prompts, processes),
            f"stages.{name}.rollouts.num_solved": (stage.rollouts.num_solved, processes),
        }
    for key, (number, shares) in numbers.items():
        if size > 1 and number % (size * shares):
            raise ValueError(
                f"{key} must be a multiple of task.project_size={size}"
                + (f" times the {shares} processes" if shares > 1 else "")
                + f", got {number}; the problems of a project stay together"
            )


def check_outcomes(config: RunConfig, task: Task) -> None:
    """Raise ValueError if a stage learns from outcomes of a task without a verifier."""
    for name, stage in config.active_stages().items():
        key = f"stages.{name}"
        uses = {
            f"{key}.objective.policy.weight": stage.objective.policy.weight,
            f"{key}.stop_accuracy": stage.stop_accuracy,
            f"{key}.rollouts.drop_uninformative": stage.rollouts.drop_uninformative,
        }
        for setting, value in uses.items():
            if value and not task.has_verifier:
                raise ValueError(
                    f"{setting} needs answers that are right or wrong, which task {task.name} does "
                    f"not have, got {value}; set it to 0 or choose another task"
                )


def sizes_in_words(config: RunConfig, model: Any) -> str:
    """Numbers of parameters of main, and of its head or channel if the run uses one."""
    sizes = num_parameters(model)
    if not config.channel.is_text:
        own = sum(p.numel() for p in getattr(model, ATTRIBUTE).parameters())
        name = config.channel.name
        return f"main {sizes['main'] - own:,} parameters, channel {name} with {own:,} of its own"
    stages = config.active_stages().values()
    if not head_is_trained(model.config) and not any(stage.train_head for stage in stages):
        return f"main {sizes['main']:,} parameters, no head is trained"
    return (
        f"main {sizes['main']:,} parameters, head {sizes['head']:,} ({config.head.type}, "
        f"{config.head.num_slots} slots, taps {model.mtp_taps})"
    )


def check_heads(config: RunConfig) -> None:
    """Raise ValueError for fast rollouts, or an accuracy of fast mode to stop at, with a head that
    no stage has trained, or trains then.
    """
    if not config.channel.is_text:
        return
    is_trained = False
    for name, stage in config.active_stages().items():
        is_trained |= stage.train_head
        if is_trained or has_trained_head(config.model):
            return
        if stage.stop_accuracy:
            raise ValueError(
                f"stages.{name}.stop_accuracy={stage.stop_accuracy:g} is an accuracy of fast mode "
                f"and needs a head that is trained, but no stage up to {name} trains it; set it to "
                f"0, or stages.{name}.train_head to true"
            )
        if stage.kind == "rl" and stage.rollouts.mode == "fast":
            raise ValueError(
                f"stages.{name}.rollouts.mode=fast needs a head that is trained, but no stage up "
                f"to {name} trains it; set it to slow, or stages.{name}.train_head to true"
            )
