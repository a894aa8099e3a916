"""A run: its stages one after the other, evaluated, checkpointed, exported.

Randomness of a step is derived from (seed, stage, step), and data from a running position, so that
a run that was stopped and resumed gives the very numbers of one that was not.
"""

import json
import signal
import time
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric, seed_everything

from .config import RunConfig
from .evaluation.evaluate import evaluate, fast_accuracy
from .files import save_atomically, save_text
from .hub.build import build_model, has_head, save_model
from .hub.checkpoint import save_checkpoint
from .hub.export import export
from .hub.run_folder import RunFolder, claim
from .reference import (
    check_references,
    frozen_for_evaluation,
    frozen_for_stage,
    reference_in_loss,
    save_start,
)
from .reports.curves import save_curves
from .reports.json_lines import read_records
from .reports.loggers import FilesConfig, Log, LoggedRun
from .reports.progress import StageProgress, make_console
from .reports.tables import completions_rows, print_completions, print_table
from .rollouts.rollout import Rollouts
from .run import Progress, Run, StageRun, read_start, settings_of, write_start
from .steps import step_batches
from .tasks.base import Task, check_disjoint, training_index
from .training.examples import checked_task
from .training.optimizers import build_optimizer, set_lr, split_parameters
from .training.runtime import StopRequest, on_first_process, over_processes
from .training.stage import StageConfig
from .training.step_module import within, wrap
from .training.update import update

DRY_STEPS = 3
"""Steps of each stage in a dry run."""


class Interrupted(Exception):
    """The run was asked to stop by a signal and has saved a checkpoint."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = number


def train(config: RunConfig) -> dict[str, Any]:
    """Run all stages and return what `summary.json` holds.

    A run that is resumed continues with the weights of its checkpoint; one that has ended returns
    its summary again and changes nothing.

    Raises:
        ValueError: for impossible settings, naming the key.
        Interrupted: after a signal; the checkpoint is saved.
    """
    config.validate()
    check_references(config)
    fabric = config.fabric.build()
    path, full_steps = Path(config.run_dir), {}
    if config.dry_run:
        path = path.with_name(path.name + "-dry_run")
        full_steps = {name: stage.steps for name, stage in config.active_stages().items()}
        config = dry_config(config)
    folder = RunFolder(path)
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
            folder.release()
            if config.dry_run and path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    return summary


def run_stages(
    config: RunConfig, fabric: Fabric, folder: RunFolder, checkpoint: str | None
) -> dict[str, Any]:
    """The stages from the first, or from where a checkpoint stands, then the export."""
    console = make_console(quiet=not fabric.is_global_zero)
    settings = settings_of(config, fabric)
    progress, state = Progress(), None
    if checkpoint is not None:
        state = read_start(checkpoint, settings)
        progress = Progress(**state["progress"])
        if has_ended(config, folder.path, progress):
            summary = json.loads((folder.path / "summary.json").read_text())
            console.print(f"{folder.path} has ended; overwrite=true runs it again")
            print_table(console, summary)
            return summary
    seed_everything(config.seed, verbose=False)
    task = config.task.build()
    check_disjoint(task)
    check_judged(config, task)
    model, text = build_model(config.model, config.head, config.decoding, task)
    task = checked_task(
        task,
        config.decoding,
        config.active_stages(),
        model,
        text,
        config.evaluation.num_problems,
    )
    model.to(fabric.device)
    if state is not None:
        load_weights(model, state.pop("model"), checkpoint)
    if fabric.is_global_zero:
        write_start(folder, config, state)
    fabric.barrier()
    log = Log.of(config.logger) if fabric.is_global_zero else Log({})
    parts = split_parameters(model)
    sizes = {name: sum(p.numel() for p in part.values()) for name, part in parts.items()}
    console.print(
        f"{task.name}: main {sizes['main']:,} parameters, head {sizes['head']:,} "
        f"({config.head.type}, {config.head.num_slots} slots, taps {model.mtp_taps}); "
        f"{fabric.device}, {config.fabric.precision}; writing {folder.path}"
    )
    with StopRequest() as stop:
        came_with_head = has_head(config.model)
        run = Run(
            config,
            folder.path,
            fabric,
            console,
            task,
            model,
            came_with_head,
            text,
            log,
            progress,
            stop,
            settings,
        )
        try:
            if state is None:
                save_start(run)
            logged = LoggedRun(folder.path, asdict(config), progress.global_step)
            lines = log.start(logged, state["log"] if state else None)
            if state is not None:
                say_where(run, lines)
            for index, (name, stage) in enumerate(config.active_stages().items()):
                if index >= progress.stage:
                    run_stage(run, name, stage, state["optimizers"] if state else None)
                    state = None
                    stop_if_asked(run, f"after stage {name}")
            return finish(run)
        finally:
            log.finish()


def has_ended(config: RunConfig, folder: Path, progress: Progress) -> bool:
    """True if the run has nothing left to do: all stages, the export and the summary are there."""
    return (
        progress.stage == len(config.active_stages())
        and (folder / "summary.json").is_file()
        and (folder / "export" / "config.json").is_file()
    )


def load_weights(model: Any, weights: dict[str, torch.Tensor], checkpoint: str | None) -> None:
    """Give the model the weights of a checkpoint. Raises ValueError if they do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"the weights of {checkpoint} do not fit the model: {str(error).splitlines()[-1]}; "
            "has model.source changed since the run began?"
        ) from None


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


def estimate(full_steps: dict[str, int], summary: dict[str, Any], log: Path) -> str:
    """What a full run costs, from the few steps of each stage that a dry run took.

    The first steps of a stage also pay for what is compiled, for one shape and then for any; the
    others are taken to cost what the last, in the `log`, did.
    """
    steps = {r["stage"]: r["step_time"] for r in read_records(log) if "step_time" in r}
    minutes = {}
    for stage in summary["stages"]:
        name = stage["name"]
        left = max(0, full_steps[name] - DRY_STEPS)
        minutes[name] = (stage["seconds"] + steps[name] * left) / 60
    parts = ", ".join(f"{name} {value:.1f}" for name, value in minutes.items())
    return (
        f"a full run would take about {sum(minutes.values()):.0f} min and its evaluations ({parts})"
    )


def run_stage(
    run: Run, name: str, config: StageConfig, optimizer_states: dict[str, Any] | None
) -> None:
    """Take the steps of a stage that are left, evaluate it and save its model.

    optimizer_states: those of a checkpoint within the stage, by emitter; else empty or None.
    """
    stage = begin_stage(run, name, config, optimizer_states or {})
    if not run.progress.is_trained:
        train_stage(run, stage)
        run.progress.is_trained = True
        save_run(run, {})
    end_stage(run, stage)


def begin_stage(
    run: Run, name: str, config: StageConfig, optimizer_states: dict[str, Any]
) -> StageRun:
    """Make the stage's parameters trainable, wrap the model and build what trains it."""
    parameters = split_parameters(run.model)
    trained = {"main": config.train_main, "head": config.train_head}
    for part, is_trained in trained.items():
        for parameter in parameters[part].values():
            parameter.requires_grad_(is_trained)
    if config.gradient_checkpointing:
        run.model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        run.model.activation_checkpointing_disable()
    built = {
        part: build_optimizer(parameters[part], config.optimizer_of(part))
        for part, is_trained in trained.items()
        if is_trained
    }
    module = wrap(run.fabric, run.model)
    optimizers: dict[str, Any] = {part: run.fabric.setup_optimizers(o) for part, o in built.items()}
    for part, optimizer_state in optimizer_states.items():
        optimizers[part].load_state_dict(optimizer_state)
    reference = None if run.progress.is_trained else frozen_for_stage(run, name)
    return StageRun(name, config, module, optimizers, reference)


def train_stage(run: Run, stage: StageRun) -> None:
    """Train one stage from where it stands."""
    config, progress, name = stage.config, run.progress, stage.name
    run.model.train()
    began = saved = time.monotonic()
    done_before = progress.stage_seconds
    first_step = progress.step
    with StageProgress(name, config.steps, progress.step, run.console) as bar:
        for step in range(progress.step, config.steps):
            if has_learned(run, stage):
                run.console.print(
                    f"{name}: fast accuracy reached {config.stop_accuracy:g}, step {step}"
                )
                break
            for part, optimizer in stage.optimizers.items():
                set_lr(optimizer, config.optimizer_of(part).lr_at(step, config.steps))
            step_began = time.monotonic()
            run.seed_globals(name, "globals", step)
            minibatches, metrics = step_batches(run, stage, step)
            updates = [
                update(
                    run.fabric,
                    stage.module,
                    stage.optimizers,
                    batches,
                    config.objective,
                    clip_norms={p: config.optimizer_of(p).clip_norm for p in stage.optimizers},
                    channel_gradient=config.channel_gradient_at(step),
                    logits_detach=config.logits_detach,
                    sampler=run.config.decoding.sampler() if config.kind == "rl" else None,
                    reference=stage.reference,
                    check_gradients=step == first_step,
                    impl=run.config.kernels,
                )
                for batches in minibatches
            ]
            metrics |= over_updates(updates)
            metrics["step_time"] = time.monotonic() - step_began
            metrics["tokens_per_second"] = metrics.pop("num_text_tokens") / metrics["step_time"]
            progress.step, progress.global_step = step + 1, progress.global_step + 1
            progress.stage_seconds = done_before + time.monotonic() - began
            is_last = step + 1 == config.steps
            if is_last or (step + 1) % run.config.logger.log_every == 0:
                run.log.metrics(name, step + 1, progress.global_step, metrics)
            is_best = False
            if config.evaluate_every and (step + 1) % config.evaluate_every == 0 and not is_last:
                is_best = interim_evaluation(run, stage)
            bar.step(step + 1, headline(metrics, progress.points, name))
            progress.stage_seconds = done_before + time.monotonic() - began
            is_due = time.monotonic() - saved > 60 * run.config.checkpoint_minutes
            asked = stop_signal(run)
            if asked is not None or is_best or (is_due and not is_last):
                save_run(run, stage.optimizers, is_best)
                saved = time.monotonic()
            if asked is not None:
                raise interrupted(
                    run, f"in stage {name} after step {step + 1} of {config.steps}", asked
                )
    progress.stage_seconds = done_before + time.monotonic() - began


def over_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of a step's optimizer updates: means, and maxima of what is a maximum."""
    merged = {}
    for key in dict.fromkeys(key for metrics in updates for key in metrics):
        values = [metrics[key] for metrics in updates if key in metrics]
        merged[key] = max(values) if key.endswith("_max") else sum(values) / len(values)
    return merged


def stop_signal(run: Run) -> int | None:
    """The signal by which any process was asked to stop, so that all stop after the same step."""
    mine = run.stop.signal
    flags = {"signal": float(mine or 0), "requeue": float(mine == signal.SIGUSR2)}
    asked = over_processes(run.fabric, flags, "max")
    return signal.SIGUSR2 if asked["requeue"] else int(asked["signal"]) or None


def stop_if_asked(run: Run, where: str) -> None:
    """Raise Interrupted if a signal came; the run's last checkpoint is then of this moment."""
    asked = stop_signal(run)
    if asked is not None:
        raise interrupted(run, where, asked)


def interrupted(run: Run, where: str, number: int) -> Interrupted:
    """The exception that ends a run at a signal."""
    return Interrupted(
        f"stopped {where}; use resume=true to continue from {run.folder}/checkpoints", number
    )


def has_learned(run: Run, stage: StageRun) -> bool:
    """Whether a stage may end before its last step, see `StageConfig.stop_accuracy`."""
    progress, config = run.progress, run.config
    limit = stage.config.stop_accuracy
    if not (limit and progress.step) or progress.step % stage.config.stop_every:
        return False
    size = run.task.size("train")
    places = range(progress.position, progress.position + config.evaluation.num_interim_problems)
    examples = [
        run.task.example("train", training_index(place, size, config.seed)) for place in places
    ]
    reached = within(
        stage.module,
        lambda model: fast_accuracy(
            model,
            run.text,
            examples,
            run.task,
            config.decoding,
            config.evaluation.batch_size,
            config.kernels,
        ),
    )
    # All processes stop together, whatever the rounding of each.
    return over_processes(run.fabric, {"reached": reached or 0.0}, "max")["reached"] >= limit


def heard(run: Run) -> bool:
    """True once some stage up to the current one trains the head, or it came with the model."""
    if run.came_with_head:
        return True
    stages = list(run.config.active_stages().values())[: run.progress.stage + 1]
    return any(stage.train_head for stage in stages)


def interim_evaluation(run: Run, stage: StageRun) -> bool:
    """A small evaluation within a stage, for the log and the curves.

    Returns True if its accuracy, in fast mode if the head is trained, is the stage's best so far.
    """
    figures, shown = within(
        stage.module,
        lambda model: evaluate(
            model,
            run.text,
            run.task,
            run.config.decoding,
            num_problems=run.config.evaluation.num_interim_problems,
            batch_size=run.config.evaluation.batch_size,
            use_head=heard(run),
            controls=False,
            verified=run.config.evaluation.verified,
            impl=run.config.kernels,
        ),
    )
    record(run, stage.name, figures)
    log_completions(run, stage.name, shown)
    reached = figures["slow_accuracy" if figures["fast_accuracy"] is None else "fast_accuracy"]
    if reached is None or reached <= run.progress.best_accuracy:
        return False
    run.progress.best_accuracy = reached
    return True


def log_completions(run: Run, name: str, shown: list[Rollouts]) -> list[dict[str, Any]]:
    """A few completions of an evaluation into the log."""
    number = run.config.evaluation.num_samples
    rows = completions_rows(shown, run.task, run.text, number, name)
    run.log.table("completions", rows, run.progress.global_step)
    return rows


def record(run: Run, name: str, figures: dict[str, Any]) -> None:
    """An evaluation into the log and the curves."""
    progress = run.progress
    point = {k: v for k, v in figures.items() if v is not None and k != "num_problems"}
    at = {"stage": name, "step": progress.step, "global_step": progress.global_step}
    if progress.points and at.items() <= progress.points[-1].items():
        progress.points.pop()  # a stage's last evaluation stands for one within it at the same step
    progress.points.append(at | point)
    tagged = {f"eval/{k}": v for k, v in point.items()}
    run.log.metrics(name, progress.step, progress.global_step, tagged)


def end_stage(run: Run, stage: StageRun) -> None:
    """Evaluate on all held-out problems, save the model, note the summary."""
    config, progress, name = run.config, run.progress, stage.name
    if run.fabric.is_global_zero:
        save_atomically(
            run.stage_folder(name), lambda folder: save_model(run.model, run.text, folder)
        )
    run.fabric.barrier()
    reference = frozen_for_evaluation(run)
    figures, shown = within(
        stage.module,
        lambda model: evaluate(
            model,
            run.text,
            run.task,
            config.decoding,
            num_problems=config.evaluation.num_problems,
            batch_size=config.evaluation.batch_size,
            use_head=heard(run),
            reference=reference,
            verified=config.evaluation.verified,
            impl=config.kernels,
        ),
    )
    record(run, name, figures)
    in_loss = reference_in_loss(config, name)
    progress.summaries.append(
        {
            "name": name,
            **figures,
            "reference_in_loss": in_loss,
            "steps": progress.step,
            "seconds": round(progress.stage_seconds, 1),
        }
    )
    rows = log_completions(run, name, shown)
    print_completions(run.console, name, rows, progress.summaries[-1])
    progress.stage, progress.step, progress.stage_seconds = progress.stage + 1, 0, 0.0
    progress.is_trained, progress.best_accuracy = False, 0.0
    save_run(run, {})


def save_run(run: Run, optimizers: dict[str, Any], is_best: bool = False) -> None:
    """Write a checkpoint with everything that the run needs to continue."""
    if not run.fabric.is_global_zero:
        return
    state = {
        "model": run.model.state_dict(),
        "optimizers": {part: o.state_dict() for part, o in optimizers.items()},
        "progress": asdict(run.progress),
        "log": run.log.states(),
        "settings": run.settings,
    }
    save_checkpoint(run.folder / "checkpoints", run.progress.global_step, state, is_best)


def finish(run: Run) -> dict[str, Any]:
    """Export, summary, curves and the table."""
    progress, folder = run.progress, run.folder
    summary = {
        "stages": progress.summaries,
        "seed": run.config.seed,
        "seconds": round(sum(stage["seconds"] for stage in progress.summaries), 1),
        "export": str(folder / "export"),
    }
    if progress.changed:
        summary["changed_on_resume"] = progress.changed
    if run.fabric.is_global_zero:
        export(run.model, run.text, folder / "export", summary, run.config)
        save_atomically(folder / "curves.png", lambda file: save_curves(progress.points, file))
        for name in ("export", "curves.png"):
            run.log.artifact(folder / name)
        run.log.finish()
        # Last: a summary says that the run has ended.
        save_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        print_table(run.console, summary)
    return summary


def headline(
    metrics: dict[str, Any], points: list[dict[str, Any]], stage: str
) -> dict[str, float | None]:
    """The figures that the progress bar shows."""
    last: dict[str, Any] = next((p for p in reversed(points) if p["stage"] == stage), {})
    return {
        "loss": metrics.get("loss"),
        "reward": metrics.get("reward"),
        "passes": metrics.get("passes"),
        "true": metrics.get("true_steps"),
        "slow": last.get("slow_accuracy"),
        "fast": last.get("fast_accuracy"),
        "tok/s": round(metrics["tokens_per_second"]),
    }


def check_judged(config: RunConfig, task: Task) -> None:
    """Raise ValueError if a stage learns from outcomes of a task that judges no answers."""
    for name, stage in config.active_stages().items():
        key = f"stages.{name}"
        uses = {
            f"{key}.objective.policy.weight": stage.objective.policy.weight,
            f"{key}.stop_accuracy": stage.stop_accuracy,
            f"{key}.rollouts.drop_uninformative": stage.rollouts.drop_uninformative,
        }
        for setting, value in uses.items():
            if value and not task.judges:
                raise ValueError(
                    f"{setting} needs answers that are right or wrong, which task {task.name} does "
                    f"not have, got {value}; set it to 0 or choose another task"
                )


def dry_config(config: RunConfig) -> RunConfig:
    """The same run with DRY_STEPS steps a stage and small evaluations, logged to files alone."""
    config = deepcopy(config)
    config.logger.sinks = {"files": FilesConfig()}
    for stage in config.active_stages().values():
        stage.steps = min(DRY_STEPS, stage.steps)
    config.evaluation.num_problems = min(8, config.evaluation.num_problems)
    config.overwrite, config.resume = True, False
    return config
