"""A stage: its steps, its evaluations and checkpoints, and the model that it saves."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ..common.files import save_atomically
from ..groups import rollouts_ahead
from ..hub.build import save_model
from ..modeling.versions import set_activation_checkpointing
from ..reference import frozen_for_stage
from ..reports.measures import forget_results
from ..reports.progress import StageProgress
from ..run import Run, StageRun
from ..steps import step_batches
from ..training.batch import TextBatch
from ..training.gradient_split import split_gradient, split_metrics
from ..training.optimizers import (
    build_optimizer,
    fixed_parameters,
    set_lr,
    split_parameters,
)
from ..training.sharding import load_optimizer, weights_of
from ..training.stage import StageConfig
from ..training.step_module import wrap
from ..training.update import update
from .checkpointing import check_grace, interrupted, save_run, stop_signal
from .evaluation import evaluate_stage, has_learned, interim_evaluation
from .numbers import Watch

Begin = Callable[[Run, str, StageConfig, dict[str, Any]], StageRun]
"""Makes a stage of its name, its settings and the optimizers' states."""


def run_stage(
    run: Run,
    name: str,
    config: StageConfig,
    optimizer_states: dict[str, Any] | None,
    *,
    begin: Begin | None = None,
    train: Callable[[Run, StageRun], None] | None = None,
    end: Callable[[Run, StageRun], None] | None = None,
) -> None:
    """Take the remaining steps of a stage, evaluate it and save its model.

    optimizer_states: those of a checkpoint within the stage, by emitter; else empty or None.
    begin, train, end: the parts of a stage; None: those of this file.
    """
    stage = (begin or begin_stage)(run, name, config, optimizer_states or {})
    if not run.progress.is_trained:
        with rollouts_ahead(run, stage):
            (train or train_stage)(run, stage)
        run.progress.is_trained = True
        save_run(run, {})
    run.trains()
    began = time.monotonic()
    (end or end_stage)(run, stage)
    check_grace(run, f"the evaluation of stage {name}", began)


def begin_stage(
    run: Run, name: str, config: StageConfig, optimizer_states: dict[str, Any]
) -> StageRun:
    """Make the stage's parameters trainable, wrap the model and build the optimizers and the
    reference.
    """
    parameters, fixed = split_parameters(run.model), fixed_parameters(run.model)
    trained = {"main": config.train_main, "head": config.train_head}
    for part, is_trained in trained.items():
        for parameter_name, parameter in parameters[part].items():
            parameter.requires_grad_(is_trained and parameter_name not in fixed)
    set_activation_checkpointing(run.model, config.gradient_checkpointing)
    run.module = wrap(run.fabric, run.model, run.module, run.config.fabric.rollout_weights)
    parameters = split_parameters(run.model)  # of the wrapped model, where they may be shards
    optimizers: dict[str, Any] = {}
    for part, is_trained in trained.items():
        if is_trained:
            learning = {n: p for n, p in parameters[part].items() if p.requires_grad}
            built = build_optimizer(learning, config.optimizer_of(part))
            if part in optimizer_states:
                load_optimizer(built, optimizer_states[part])
            optimizers[part] = run.fabric.setup_optimizers(built)
    reference = None if run.progress.is_trained else frozen_for_stage(run, name)
    return StageRun(name, config, run.module, optimizers, reference)


def train_stage(run: Run, stage: StageRun) -> None:
    """Train one stage from its current step on."""
    config, progress, name = stage.config, run.progress, stage.name
    run.model.train()
    began = saved = time.monotonic()
    done_before = progress.stage_seconds
    first_step, watch = progress.step, Watch(run, stage)
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
            every = config.gradient_split_every
            is_split = bool(every and minibatches) and (step + 1) % every == 0
            if is_split:
                metrics |= gradient_split(run, stage, minibatches[0])
            take = partial(take_update, run, stage, step, check_gradients=step == first_step)
            updates = [watch.update(batches, take) for batches in minibatches]
            if updates:
                watch.compare(updates[0])
            metrics |= over_updates(updates)
            metrics["step_time"] = time.monotonic() - step_began
            metrics["tokens_per_second"] = metrics.pop("num_text_tokens") / metrics["step_time"]
            progress.step, progress.global_step = step + 1, progress.global_step + 1
            run.trains()
            progress.stage_seconds = done_before + time.monotonic() - began
            is_last = step + 1 == config.steps
            if is_last or is_split or (step + 1) % run.config.logger.log_every == 0:
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
            check_grace(run, f"step {step + 1} of stage {name}", step_began)
            if asked is not None:
                raise interrupted(
                    run, f"in stage {name} after step {step + 1} of {config.steps}", asked
                )
    progress.stage_seconds = done_before + time.monotonic() - began


def take_update(
    run: Run, stage: StageRun, step: int, batches: list[TextBatch], *, check_gradients: bool
) -> dict[str, float]:
    """One optimizer step of a stage, see `update`."""
    config = stage.config
    return update(
        run.fabric,
        stage.module,
        stage.optimizers,
        batches,
        config.objective,
        clip_norms={p: config.optimizer_of(p).clip_norm for p in stage.optimizers},
        channel_gradient=config.channel_gradient_at(step),
        logits_detach=config.logits_detach,
        sampler=run.config.decoding.sampler(),
        reference=stage.reference,
        check_gradients=check_gradients,
        impl=run.config.kernels,
    )


def gradient_split(run: Run, stage: StageRun, batches: list[TextBatch]) -> dict[str, float | None]:
    """Metrics of the two parts of main's policy gradient in a step's first update."""
    parts = split_gradient(
        run.fabric,
        stage.module,
        batches,
        stage.config.objective.policy,
        logits_detach=stage.config.logits_detach,
        sampler=run.config.decoding.sampler(),
        impl=run.config.kernels,
    )
    return {f"main/grad_{name}": value for name, value in split_metrics(parts).items()}


def over_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of a step's optimizer updates: means, except that `_max` metrics are maxima."""
    merged = {}
    for key in dict.fromkeys(key for metrics in updates for key in metrics):
        values = [metrics[key] for metrics in updates if key in metrics]
        merged[key] = max(values) if key.endswith("_max") else sum(values) / len(values)
    return merged


def headline(
    metrics: dict[str, Any], points: list[dict[str, Any]], stage: str
) -> dict[str, float | None]:
    """The metrics that the progress bar shows."""
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


def end_stage(run: Run, stage: StageRun) -> None:
    """Save the model at the end of the stage, evaluate it, and advance to the next stage."""
    progress, name = run.progress, stage.name
    weights = weights_of(run.model, run.fabric.is_global_zero)
    if run.fabric.is_global_zero:
        save_atomically(
            run.stage_folder(name),
            lambda folder: save_model(run.model, run.fmt, folder, weights=weights),
        )
        forget_results(run.folder, name)
    run.fabric.barrier()
    evaluate_stage(run, stage)
    progress.stage, progress.step, progress.stage_seconds = progress.stage + 1, 0, 0.0
    progress.is_trained, progress.best_accuracy, progress.num_skipped = False, 0.0, 0
    save_run(run, {})
