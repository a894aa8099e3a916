"""Evaluations within a stage and at its end, written to the log, the curves and the summary."""

from typing import Any

from ..evaluation.evaluate import evaluate, fast_accuracy, over_test_sets
from ..evaluation.spread import Spread
from ..evaluation.thoughts import outcome_rows, shown_mode, thought_rows
from ..modeling.contract import head_is_trained
from ..reference import frozen_for_evaluation, reference_in_loss
from ..reports.progress import PartsProgress, Report, no_report
from ..reports.tables import completions_rows, print_completions
from ..rollouts.rollout import Rollouts
from ..run import Run, StageRun, training_example
from ..tasks.base import Split
from ..training.length_windows import end_of_window
from ..training.runtime import over_processes
from ..training.step_module import passes_in_step, within


def has_learned(run: Run, stage: StageRun) -> bool:
    """True if a stage may end before its last step, see `StageConfig.stop_accuracy`.

    Processes that round differently may disagree: the stage ends once all of them agree.
    """
    progress, config = run.progress, run.config
    limit = stage.config.stop_accuracy
    if not (limit and progress.step) or progress.step % stage.config.stop_every:
        return False
    examples_config = stage.config.examples
    window = examples_config.length_window * examples_config.batch_size
    begin = end_of_window(progress.position, window) if window else progress.position
    positions = range(begin, begin + config.evaluation.num_interim_problems)
    examples = [training_example(run, position) for position in positions]
    reached = within(
        stage.module,
        lambda model: fast_accuracy(
            model,
            run.fmt,
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


def interim_evaluation(run: Run, stage: StageRun) -> bool:
    """A small evaluation within a stage, for the log and the curves.

    Returns True if its accuracy, in fast mode if the head is trained, is the stage's best so far.
    """
    number = run.config.evaluation.num_interim_problems
    metrics, decoded = measure(run, stage, number, ends_stage=False)
    record(run, stage.name, metrics, run.task.interim_set)
    log_completions(run, stage.name, decoded[shown_mode(decoded)])
    reached = metrics["slow_accuracy" if metrics["fast_accuracy"] is None else "fast_accuracy"]
    if reached is None or reached <= run.progress.best_accuracy:
        return False
    run.progress.best_accuracy = reached
    return True


def evaluate_stage(run: Run, stage: StageRun) -> None:
    """Evaluate on all held-out sets and record the stage's summary."""
    config, progress, name = run.config, run.progress, stage.name
    with PartsProgress(run.console) as report:
        metrics, decoded = measure(
            run, stage, config.evaluation.num_problems, ends_stage=True, report=report
        )
    record(run, name, metrics, run.task.test_sets[0])
    in_loss = reference_in_loss(config, name)
    progress.summaries.append(
        {
            "name": name,
            **metrics,
            "reference_in_loss": in_loss,
            "steps": progress.step,
            "seconds": round(progress.stage_seconds, 1),
        }
    )
    rows = log_completions(run, name, decoded[shown_mode(decoded)])
    print_completions(run.console, name, rows, progress.summaries[-1])


def measure(
    run: Run,
    stage: StageRun,
    num_problems: int,
    *,
    ends_stage: bool,
    report: Report = no_report,
) -> tuple[dict[str, Any], dict[str, list[Rollouts]]]:
    """Evaluate the model and log the details for the report.

    Returns the metrics and the rollouts by mode. Only an evaluation that ends a stage has controls
    and a reference.
    """
    config = run.config
    reference = frozen_for_evaluation(run) if ends_stage else None
    spread = spread_of(run, stage)

    def evaluated(model: Any) -> tuple[Any, ...]:
        def evaluate_set(split: Split) -> tuple[dict[str, Any], dict[str, list[Rollouts]]]:
            return evaluate(
                model,
                run.fmt,
                run.task,
                config.decoding,
                num_problems=num_problems,
                batch_size=config.evaluation.batch_size,
                use_head=head_is_trained(run.model.config),
                controls=ends_stage,
                reference=reference,
                verified=config.evaluation.verified,
                thought_budgets=config.evaluation.thought_budgets,
                impl=config.kernels,
                split=split,
                spread=spread,
                report=lambda part, done, total: report(f"{stage.name}: {part}", done, total),
            )

        metrics, decoded = (
            over_test_sets(run.task, evaluate_set)
            if ends_stage
            else evaluate_set(run.task.interim_set)
        )
        thoughts = thought_rows(
            model,
            decoded,
            run.task,
            run.fmt,
            stage=stage.name,
            max_tokens=config.logger.thought_tokens,
            ends_stage=ends_stage,
            reference=reference,
        )
        return metrics, decoded, thoughts

    metrics, decoded, thoughts = within(stage.module, evaluated)
    step = run.progress.global_step
    at = {"step": run.progress.step, "ends_stage": ends_stage}
    outcomes = outcome_rows(decoded, run.task, run.fmt, stage.name)
    run.log.detail("thoughts", [at | row for row in thoughts], step)
    run.log.detail("outcomes", [at | row for row in outcomes], step)
    return metrics, decoded


def log_completions(run: Run, name: str, shown: list[Rollouts]) -> list[dict[str, Any]]:
    """Write a few completions of an evaluation to the log."""
    number = run.config.evaluation.num_samples
    rows = completions_rows(shown, run.task, run.fmt, number, name)
    run.log.table("completions", rows, run.progress.global_step)
    return rows


def record(run: Run, name: str, metrics: dict[str, Any], of_set: Split) -> None:
    """Write an evaluation of `of_set` to the log and the curves.

    In the log the metrics of `Task.test_sets[0]` have plain names, those of other sets begin with
    the set's name.
    """
    progress = run.progress
    sets = {"": metrics} | metrics.get("test_sets", {})
    point = {
        f"{split}/{key}".lstrip("/"): value
        for split, of_set in sets.items()
        for key, value in of_set.items()
        if value is not None and key not in ("num_problems", "test_sets")
    }
    at = {"stage": name, "step": progress.step, "global_step": progress.global_step}
    if progress.points and at.items() <= progress.points[-1].items():
        progress.points.pop()  # a stage's last evaluation replaces one within it at the same step
    progress.points.append(at | point)
    prefix = "eval" if of_set == run.task.test_sets[0] else f"eval/{of_set}"
    tagged = {f"{prefix}/{k}": v for k, v in point.items()}
    run.log.metrics(name, progress.step, progress.global_step, tagged)
