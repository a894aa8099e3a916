"""The batches of one step: solved examples, or the policy's own rollouts with their advantages."""

import time
from typing import Any

import torch

from .advantage import group_advantages
from .batch import TextBatch, collate_rollouts, collate_text
from .evaluate import true_step_share
from .reward import Rewards, score
from .rollout import sample
from .run import Run
from .stage import StageConfig
from .tasks.base import Example, training_index


def step_batches(
    run: Run, name: str, stage: StageConfig, step: int
) -> tuple[list[list[TextBatch]], dict[str, Any]]:
    """The micro-batches of each optimizer step, for this process, and what sampling measured."""
    if stage.kind == "supervised":
        batches, metrics = supervised_batches(run, name, stage, step)
        return [batches], metrics
    return rollout_batches(run, name, stage, step)


def draw(run: Run, number: int) -> list[Example]:
    """The next `number` training examples, of which this process takes its share."""
    config, progress = run.config, run.progress
    rank, world = run.fabric.global_rank, run.fabric.world_size
    if number % world:
        raise ValueError(f"a step's {number} examples must divide evenly over {world} processes")
    size = run.task.size("train")
    positions = range(progress.position + rank, progress.position + number, world)
    progress.position += number
    return [
        run.task.example("train", training_index(position, size, config.seed))
        for position in positions
    ]


def pieces(number: int, size: int) -> list[list[int]]:
    """0..number-1 in runs of `size`; 0 is one run."""
    size = size or number
    return [list(range(at, min(at + size, number))) for at in range(0, number, size)]


def pieces_by_length(lengths: torch.Tensor, size: int) -> list[list[int]]:
    """All rows in runs of `size`, the short ones together, so that little is padding."""
    order = lengths.argsort(stable=True).tolist()
    return [[order[i] for i in piece] for piece in pieces(len(order), size)]


def supervised_batches(
    run: Run, name: str, stage: StageConfig, step: int
) -> tuple[list[TextBatch], dict[str, Any]]:
    """Solved examples as batches."""
    text = run.text
    generator = torch.Generator().manual_seed(run.seed_of(name, step))
    samples = [text.example_ids(example) for example in draw(run, stage.batch_size)]
    batches = [
        collate_text(
            [samples[i] for i in chosen],
            text.plan("fast"),
            text.num_slots,
            text.pad_id,
            num_anchors=stage.num_anchors,
            block_anchors=stage.block_anchors,
            generator=generator,
        ).to(run.fabric.device)
        for chosen in pieces(len(samples), stage.micro_batch_size)
    ]
    return batches, {"num_text_tokens": sum(len(p) + len(c) for p, c in samples)}


def advantages_of(run: Run, stage: StageConfig, rewards: Rewards) -> torch.Tensor:
    """[P, G] by the stage's rule, or its algorithm's."""
    kind = stage.advantage.kind or stage.objective.policy.preset.advantage
    batch = None
    if kind == "batch_std" and run.fabric.world_size > 1:
        mine = rewards.total.to(run.fabric.device)
        batch = torch.as_tensor(run.fabric.all_gather(mine)).cpu()
    return group_advantages(rewards.total, rewards.outcomes, kind, batch)


def rollout_batches(
    run: Run, name: str, stage: StageConfig, step: int
) -> tuple[list[list[TextBatch]], dict[str, Any]]:
    """The policy's own rollouts, scored, with their advantages, as batches."""
    config, text = run.config, run.text
    examples = draw(run, stage.num_prompts)
    began = time.monotonic()
    with run.fabric.autocast():
        rollouts = sample(
            run.model,
            text,
            examples,
            text.plan("fast"),
            config.decoding.sampler(),
            max_new_tokens=config.decoding.max_new_tokens,
            group_size=stage.group_size,
            generator=run.generator(name, step),
        )
    rollout_seconds = time.monotonic() - began
    rewards = score(run.task, text, rollouts, stage.reward)
    advantages = advantages_of(run, stage, rewards)
    minibatches: list[list[TextBatch]] = [
        [
            collate_rollouts(
                rollouts.prompts,
                rollouts.out,
                advantages.flatten(),
                [share[i] for i in rows],
                text.num_slots,
                text.pad_id,
            ).to(run.fabric.device)
            for rows in pieces_by_length(rollouts.out.lengths[share], stage.micro_batch_size)
        ]
        for share in pieces(len(rollouts.prompts), len(rollouts.prompts) // stage.num_minibatches)
    ]
    cut = 1 - rollouts.out.finished.float().mean()
    if cut == 1:
        run.console.print(
            f"[yellow]warning: all {len(rollouts.prompts)} rollouts of step {step + 1} were cut at "
            f"decoding.max_new_tokens={config.decoding.max_new_tokens}; none can be right"
        )
    lengths = rollouts.out.lengths.float()
    metrics = {
        "reward": float(rewards.outcomes.mean()),
        "reward_std": float(rewards.outcomes.std(1, correction=0).mean()),
        "frac_reward_zero_std": float((advantages == 0).all(1).float().mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/clipped_ratio": float(cut),
        "passes": float(rollouts.out.passes.float().mean()),
        "rollout_time": rollout_seconds,
        "num_text_tokens": float(lengths.sum()) + sum(map(len, rollouts.prompts)),
    }
    for term, values in rewards.terms.items():
        metrics[f"reward/{term}"] = float(values.mean())
    true = true_step_share([rollouts], run.task, text)
    if true is not None:
        metrics["true_steps"] = true
    return minibatches, metrics
