"""A stage of a run with a comparator: its steps, its evaluation, its checkpoints.

The run around it is that of all runs (`mtp/trainer.py`): tasks, optimizers, checkpoints, logs. A
stage is supervised (`examples`, stream main_ce) or RL on the policy's own rollouts (`rollouts`,
stream policy): REINFORCE with a group baseline, one update per batch of rollouts, no KL. All other
settings of a stage have no effect on a comparator and are refused.
"""

import time
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.files import save_atomically
from ..config import RunConfig
from ..evaluation.evaluate import over_test_sets
from ..reports.progress import StageProgress
from ..rollouts.advantage import GroupRewards
from ..rollouts.prompt_format import PromptFormat
from ..run import Run, StageRun, next_examples
from ..stages.checkpointing import check_grace, interrupted, save_run, stop_signal
from ..stages.evaluation import record
from ..stages.loop import run_stage
from ..tasks.base import Attempt, Split, Task
from ..training.optimizers import (
    build_optimizer,
    fixed_parameters,
    set_lr,
    split_parameters,
)
from ..training.runtime import NotFinite
from ..training.sharding import load_optimizer
from ..training.stage import StageConfig
from .channel import Channel, WriteOptions, build_channel, short_curriculum
from .measure import evaluate_channel
from .saving import ATTRIBUTE, save_channel
from .vectors import VectorChannel

SUPPORTED = (
    "steps",
    "examples.batch_size",
    "rollouts.num_prompts",
    "rollouts.group_size",
    "train_head",
    "optimizers.main",
    "objective.main_ce.weight",
    "objective.policy.weight",
    "objective.policy.algorithm",
    "advantage.kind",
    "evaluate_every",
)
"""Settings of a stage that a comparator reads; `train_head` must be false."""


def attach_channel(config: RunConfig, model: Any, fmt: PromptFormat, task: Task) -> None:
    """Put the run's comparator into the model. Raises ValueError for settings that it ignores."""
    check_run(config)
    options = config.channel.options
    if config.dry_run:
        options = short_curriculum(config.channel.name, options)
    channel = build_channel(config.channel.name, options, model)
    channel.check(fmt, task)
    model.add_module(ATTRIBUTE, channel)
    for name, stage in config.active_stages().items():
        check_stage(stage, f"stages.{name}", config.channel.name, channel)
    begins = channel.last_level_begins()
    for name, stage in config.active_stages().items():
        if stage.kind == "supervised" and stage.steps <= begins and not config.dry_run:
            raise ValueError(
                f"stages.{name}.steps must be above {begins}, where the last level of "
                f"channel.name={config.channel.name} begins, got {stage.steps}: thoughts as they "
                "are evaluated would never be trained; raise it, or lower text_steps or "
                "level_steps of channel.options"
            )


def check_run(config: RunConfig) -> None:
    """Raises ValueError for settings of a run that a comparator does not support."""
    if config.channel.name in ("token", "block"):
        raise ValueError(
            f"channel.name must be text for an ordinary run, got {config.channel.name!r}; text is "
            "token where only main is trained, and block where the head is too"
        )
    processes = config.fabric.devices * config.fabric.num_nodes
    if processes > 1 or config.fabric.precision != "32-true":
        raise ValueError(
            "fabric must be one process with precision 32-true for a comparator, got "
            f"{processes} with {config.fabric.precision}; set fabric.devices=1 "
            "fabric.precision=32-true"
        )
    if config.numbers.not_finite != "stop":
        raise ValueError(
            "numbers.not_finite must be stop for a comparator, which leaves no step out, got "
            f"{config.numbers.not_finite!r}"
        )
    if config.decoding.top_k or config.decoding.top_p < 1:
        raise ValueError(
            "decoding.top_k and decoding.top_p must be 0 and 1 for a comparator, got "
            f"{config.decoding.top_k} and {config.decoding.top_p}"
        )


def check_stage(stage: StageConfig, key: str, name: str, channel: Channel) -> None:
    """Raises ValueError naming a setting of a stage that has no effect on a comparator."""
    default = asdict(StageConfig())
    for setting, (value, expected) in _pairs(asdict(stage), default).items():
        supported = any(setting == s or setting.startswith(f"{s}.") for s in SUPPORTED)
        if not supported and value != expected:
            raise ValueError(
                f"{key}.{setting} must be left at {expected!r} with channel.name={name}, got "
                f"{value!r}: a comparator does not read it"
            )
    if stage.train_head:
        raise ValueError(f"{key}.train_head must be false with channel.name={name}: it has no head")
    wanted = "policy" if stage.kind == "rl" else "main_ce"
    if list(stage.objective.active()) != [wanted]:
        raise ValueError(
            f"{key}.objective must have the stream {wanted} alone with channel.name={name}, got "
            f"{', '.join(stage.objective.active())}"
        )
    weight = getattr(stage.objective, wanted).weight
    if weight != 1:
        raise ValueError(
            f"{key}.objective.{wanted}.weight must be 1 with channel.name={name}, got {weight}: it "
            f"is the only stream; change {key}.optimizers.main.lr instead"
        )
    algorithm = stage.objective.policy.algorithm
    if (
        stage.advantage.kind is not None
        and algorithm != default["objective"]["policy"]["algorithm"]
    ):
        raise ValueError(
            f"{key}.objective.policy.algorithm must be left out with channel.name={name} and "
            f"advantage.kind={stage.advantage.kind}, got {algorithm}: a comparator reads only its "
            "advantage rule"
        )
    if stage.kind == "rl" and not isinstance(channel, VectorChannel):
        why = (
            "its rollouts have no replay"
            if channel.has_log_prob
            else "its thoughts have no log-probability, so a policy gradient has nothing to score"
        )
        raise ValueError(
            f"{key}.rollouts.num_prompts must be 0 with channel.name={name}: {why}; use solved "
            "examples"
        )


def _pairs(value: Any, default: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Leaves of two trees with the same keys, by dotted key."""
    if not isinstance(value, dict) or not isinstance(default, dict):
        return {prefix: (value, default)}
    out: dict[str, tuple[Any, Any]] = {}
    for key in value | default:
        below = f"{prefix}.{key}" if prefix else str(key)
        out |= _pairs(value.get(key), default.get(key), below)
    return out


def run_channel_stage(
    run: Run, name: str, config: StageConfig, optimizer_states: dict[str, Any] | None
) -> None:
    """`run_stage` of a comparator."""
    run_stage(
        run, name, config, optimizer_states, begin=begin_stage, train=train_stage, end=end_stage
    )


def begin_stage(
    run: Run, name: str, config: StageConfig, optimizer_states: dict[str, Any]
) -> StageRun:
    """Make main and the channel trainable and build their optimizer."""
    parts, fixed = split_parameters(run.model), fixed_parameters(run.model)
    for part, parameters in parts.items():
        for parameter_name, parameter in parameters.items():
            parameter.requires_grad_(part == "main" and parameter_name not in fixed)
    optimizer = build_optimizer(trained_main(run.model), config.optimizers.main)
    if "main" in optimizer_states:
        load_optimizer(optimizer, optimizer_states["main"])
    return StageRun(name, config, run.model, {"main": optimizer}, None)


def trained_main(model: Any) -> dict[str, torch.nn.Parameter]:
    """Main's parameters that require a gradient, by name."""
    return {n: p for n, p in split_parameters(model)["main"].items() if p.requires_grad}


def train_stage(run: Run, stage: StageRun) -> None:
    """Train one stage from its current step on."""
    config, progress, name = stage.config, run.progress, stage.name
    channel: Channel = getattr(run.model, ATTRIBUTE)
    main = trained_main(run.model)
    run.model.train()
    began = saved = time.monotonic()
    done_before = progress.stage_seconds
    with StageProgress(name, config.steps, progress.step, run.console) as bar:
        for step in range(progress.step, config.steps):
            if channel.begins_level(step):
                stage.optimizers["main"] = build_optimizer(main, config.optimizers.main)
            optimizer = stage.optimizers["main"]
            set_lr(optimizer, config.optimizers.main.lr_at(step, config.steps))
            step_began = time.monotonic()
            run.seed_globals(name, "globals", step)
            take = rl_loss if config.kind == "rl" else supervised_loss
            loss, metrics = take(run, stage, channel, step)
            if loss is not None:
                metrics |= take_step(optimizer, main, loss, config.optimizers.main.clip_norm)
            metrics["step_time"] = time.monotonic() - step_began
            progress.step, progress.global_step = step + 1, progress.global_step + 1
            run.trains()
            is_last = step + 1 == config.steps
            if is_last or (step + 1) % run.config.logger.log_every == 0:
                run.log.metrics(name, step + 1, progress.global_step, metrics)
            if config.evaluate_every and (step + 1) % config.evaluate_every == 0 and not is_last:
                number = run.config.evaluation.num_interim_problems
                of_set = run.task.interim_set
                record(run, name, measured(run, number, of_set), of_set)
            last: dict[str, Any] = progress.points[-1] if progress.points else {}
            shown = {"loss": metrics.get("loss"), "reward": metrics.get("reward")}
            bar.step(step + 1, shown | {"accuracy": last.get("accuracy")})
            progress.stage_seconds = done_before + time.monotonic() - began
            is_due = time.monotonic() - saved > 60 * run.config.checkpoint_minutes
            asked = stop_signal(run)
            if asked is not None or (is_due and not is_last):
                save_run(run, stage.optimizers)
                saved = time.monotonic()
            check_grace(run, f"step {step + 1} of stage {name}", step_began)
            if asked is not None:
                raise interrupted(
                    run, f"in stage {name} after step {step + 1} of {config.steps}", asked
                )


def supervised_loss(
    run: Run, stage: StageRun, channel: Channel, step: int
) -> tuple[Tensor, dict[str, Any]]:
    """Loss of the next solved examples."""
    examples = list(next_examples(run, stage.config.examples.batch_size).values())
    seed = run.seed_of(stage.name, step)
    loss = channel.supervised_loss(run.model, run.fmt, examples, step=step, seed=seed)
    return loss, {"loss": float(loss.detach())}


def rl_loss(
    run: Run, stage: StageRun, channel: Channel, step: int
) -> tuple[Tensor | None, dict[str, Any]]:
    """Policy gradient on rollouts of the next prompts; None if no group is informative."""
    assert isinstance(channel, VectorChannel)
    config = stage.config.rollouts
    examples = list(next_examples(run, config.num_prompts).values())
    copies = [example for example in examples for _ in range(config.group_size)]
    sampler = run.config.decoding.sampler()
    options = WriteOptions(
        sampler=sampler,
        sample_answer=True,
        max_new_tokens=run.config.decoding.max_new_tokens,
        seed=run.seed_of(stage.name, step),
    )
    run.model.eval()
    prompts = [run.fmt.question_ids(example) for example in copies]
    rows = channel.rollouts(run.model, run.fmt, prompts, options)
    run.model.train()
    answers = {i: run.fmt.answer_text(row.text) for i, row in enumerate(rows)}
    given = {i: answer for i, answer in answers.items() if answer is not None}
    attempts = [Attempt(copies[i], answer) for i, answer in given.items()]
    outcomes = torch.zeros(len(copies))
    for i, scored in zip(given, run.task.scored(attempts), strict=True):
        outcomes[i] = scored.outcome
    rewards = outcomes.view(-1, config.group_size)
    advantages = stage.config.advantage_rule()(GroupRewards(rewards, rewards, rewards))
    passes = sum(len(row.log_probs) for row in rows) / len(rows)
    metrics: dict[str, Any] = {"reward": float(rewards.mean()), "passes": passes}
    used = advantages.flatten().nonzero()[:, 0].tolist()
    if not used:
        return None, metrics
    chosen = [rows[i] for i in used]
    log_probs, owners = channel.replay(run.model, run.fmt, chosen, sampler)
    sampled = torch.tensor([value for row in chosen for value in row.log_probs])
    difference = (log_probs.detach().cpu() - sampled).abs().mean()
    weights = advantages.flatten()[used].to(log_probs.device)[owners]
    loss = -(weights * log_probs).sum() / len(log_probs)
    return loss, metrics | {
        "loss": float(loss.detach()),
        "main/sampling_logp_difference": float(difference),
    }


def take_step(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, torch.nn.Parameter],
    loss: Tensor,
    clip_norm: float,
) -> dict[str, float]:
    """One optimizer step. Raises NotFinite, before the step, if loss or gradient is not finite."""
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), clip_norm)
    if not (bool(loss.isfinite()) and bool(norm.isfinite())):
        optimizer.zero_grad(set_to_none=True)
        raise NotFinite(f"the loss is {float(loss)} and the gradient norm is {float(norm)}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"main/grad_norm": float(norm)}


def measured(run: Run, num_problems: int, split: Split) -> dict[str, Any]:
    """Metrics of the run's channel on a held-out set."""
    run.model.eval()
    metrics = evaluate_channel(
        run.model,
        run.fmt,
        getattr(run.model, ATTRIBUTE),
        run.task,
        num_problems=num_problems,
        batch_size=run.config.evaluation.batch_size,
        max_new_tokens=run.config.decoding.max_new_tokens,
        budgets=run.config.evaluation.thought_budgets,
        split=split,
    )
    run.model.train()
    return metrics


def end_stage(run: Run, stage: StageRun) -> None:
    """Save the model at the end of the stage, evaluate it on all held-out sets, and advance to the
    next stage.
    """
    progress, name = run.progress, stage.name
    save_atomically(
        run.stage_folder(name),
        partial(save_channel, run.model, run.fmt, run.config.channel.name),
    )
    number = run.config.evaluation.num_problems
    metrics, _ = over_test_sets(run.task, lambda split: (measured(run, number, split), None))
    record(run, name, metrics, run.task.test_sets[0])
    seconds = round(progress.stage_seconds, 1)
    progress.summaries.append({"name": name, **metrics, "steps": progress.step, "seconds": seconds})
    progress.stage, progress.step, progress.stage_seconds = progress.stage + 1, 0, 0.0
    progress.is_trained, progress.best_accuracy = False, 0.0
    save_run(run, {})
