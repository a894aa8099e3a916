"""Evaluations within a stage and at its end, into log, curves and summary."""

from typing import Any

from ..evaluation.evaluate import evaluate, fast_accuracy
from ..evaluation.spread import Spread
from ..reference import frozen_for_evaluation, reference_in_loss
from ..reports.tables import completions_rows, print_completions
from ..rollouts.rollout import Rollouts
from ..run import Run, StageRun
from ..tasks.base import training_index
from ..training.runtime import over_processes
from ..training.step_module import passes_in_step, within


def has_learned(run: Run, stage: StageRun) -> bool:
    """Whether a stage may end before its last step, see `StageConfig.stop_accuracy`.

    Processes that round differently may disagree: the stage ends once all of them agree.
    """
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
            spread_of(run, stage),
        ),
    )
    return over_processes(run.fabric, {"reached": reached or 0.0}, "min")["reached"] >= limit


def spread_of(run: Run, stage: StageRun) -> Spread:
    """The run's processes, which share the problems of an evaluation."""
    return Spread(run.fabric, passes_in_step(run.fabric, stage.module))


def head_is_trained(run: Run) -> bool:
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
            use_head=head_is_trained(run),
            controls=False,
            verified=run.config.evaluation.verified,
            impl=run.config.kernels,
            spread=spread_of(run, stage),
        ),
    )
    record(run, stage.name, figures)
    log_completions(run, stage.name, shown)
    reached = figures["slow_accuracy" if figures["fast_accuracy"] is None else "fast_accuracy"]
    if reached is None or reached <= run.progress.best_accuracy:
        return False
    run.progress.best_accuracy = reached
    return True


def evaluate_stage(run: Run, stage: StageRun) -> None:
    """Evaluate on all held-out problems and note the stage's summary."""
    config, progress, name = run.config, run.progress, stage.name
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
            use_head=head_is_trained(run),
            reference=reference,
            verified=config.evaluation.verified,
            impl=config.kernels,
            spread=spread_of(run, stage),
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
