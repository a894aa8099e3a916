"""The batches of one step: solved examples, or the policy's own rollouts with their advantages."""

from dataclasses import replace
from typing import Any

import torch

from .advantage import group_advantages, informative
from .batch import RolloutBatch, TextBatch, collate_rollouts, collate_slow_rollouts, collate_text
from .groups import Groups, sample_groups
from .legibility import true_step_share, unigram_drift
from .objectives import score_batch
from .reward import Rewards
from .run import Run, draw
from .stage import StageConfig


def step_batches(
    run: Run, name: str, stage: StageConfig, step: int
) -> tuple[list[list[TextBatch]], dict[str, Any]]:
    """The micro-batches of each optimizer step, for this process, and what sampling measured.

    No optimizer step at all if uninformative groups are dropped and there are no others.
    """
    if stage.kind == "supervised":
        batches, num_tokens = solved_batches(run, name, stage, step, stage.batch_size)
        return [batches], {"num_text_tokens": num_tokens}
    return rollout_batches(run, name, stage, step)


def pieces(number: int, size: int) -> list[list[int]]:
    """0..number-1 in runs of `size`; 0 is one run."""
    size = size or number
    return [list(range(at, min(at + size, number))) for at in range(0, number, size)]


def shares(items: list[int], number: int) -> list[list[int]]:
    """The items in `number` runs whose lengths differ by one at most."""
    bounds = [len(items) * i // number for i in range(number + 1)]
    return [items[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def pieces_by_length(lengths: torch.Tensor, size: int) -> list[list[int]]:
    """All rows in runs of `size`, the short ones together, so that little is padding."""
    order = lengths.argsort(stable=True).tolist()
    return [[order[i] for i in piece] for piece in pieces(len(order), size)]


def solved_batches(
    run: Run, name: str, stage: StageConfig, step: int, number: int
) -> tuple[list[TextBatch], int]:
    """`number` solved examples as batches, and the tokens of their text."""
    text = run.text
    generator = torch.Generator().manual_seed(run.seed_of(name, step))
    samples = [text.example_ids(example) for example in draw(run, number)]
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
    return batches, sum(len(p) + len(c) for p, c in samples)


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
    """The policy's own rollouts, scored, with their advantages, as batches.

    Solved examples of a step come before its rollouts, which reach every parameter, so that the
    last backward, in which processes reduce their gradients, does too.
    """
    groups = sample_groups(run, name, stage, step)
    advantages = advantages_of(run, stage, groups.rewards)
    metrics = rollout_metrics(run, groups, advantages, step)
    minibatches: list[list[TextBatch]] = []
    for number, share in enumerate(shares(groups.used, stage.num_minibatches)):
        if not share:
            continue
        solved: list[TextBatch] = []
        if stage.num_solved:
            purpose = f"{name}/solved/{number}"
            solved, num_tokens = solved_batches(run, purpose, stage, step, stage.num_solved)
            metrics["num_text_tokens"] += num_tokens
        batches = [
            collate(run, stage, groups, advantages, rows)
            for rows in micro_batches(groups, share, stage.micro_batch_size)
        ]
        minibatches.append([*solved, *batches])
    return minibatches, metrics


def micro_batches(groups: Groups, share: list[int], size: int) -> list[list[int]]:
    """Rollouts of the groups in runs of `size`, the short ones together."""
    group_size = groups.rollouts.group_size
    rows = [group * group_size + i for group in share for i in range(group_size)]
    lengths = groups.rollouts.out.lengths[rows]
    return [[rows[i] for i in piece] for piece in pieces_by_length(lengths, size)]


def collate(
    run: Run, stage: StageConfig, groups: Groups, advantages: torch.Tensor, rows: list[int]
) -> RolloutBatch:
    """The chosen rollouts as a batch, with the log-probabilities that ratios are taken to."""
    text, rollouts = run.text, groups.rollouts
    given = (rollouts.prompts, rollouts.out, advantages.flatten(), rows)
    if stage.rollout_mode == "slow":
        batch = collate_slow_rollouts(*given, text.plan("fast"), text.num_slots, text.pad_id)
    else:
        batch = collate_rollouts(*given, text.num_slots, text.pad_id)
    batch = batch.to(run.fabric.device)
    return replayed(run, stage, batch) if stage.recompute_old else batch


@torch.no_grad()
def replayed(run: Run, stage: StageConfig, batch: RolloutBatch) -> RolloutBatch:
    """The batch with `main_old` and `head_old` under the weights as they are now."""
    with run.fabric.autocast():
        scored = score_batch(
            run.model,
            run.model,
            batch,
            channel_gradient=stage.channel_gradient,
            use_head=stage.objective.uses_head,
            impl=run.config.kernels,
        )
    sampler = run.config.decoding.sampler()
    main_old, head_old = scored.main.stats(sampler).logprob, scored.head.stats(sampler).logprob
    return replace(batch, main_old=main_old, head_old=head_old)


def rollout_metrics(
    run: Run, groups: Groups, advantages: torch.Tensor, step: int
) -> dict[str, Any]:
    """What all that was sampled measures, the groups that are left out included."""
    rollouts, rewards, limit = groups.rollouts, groups.rewards, run.config.decoding.max_new_tokens
    cut = 1 - rollouts.out.finished.float().mean()
    if cut == 1:
        run.console.print(
            f"[yellow]warning: all {len(rollouts.prompts)} rollouts of step {step + 1} were cut at "
            f"decoding.max_new_tokens={limit}; none can be right"
        )
    lengths = rollouts.out.lengths.float()
    metrics = {
        "reward": float(rewards.outcomes.mean()),
        "reward_std": float(rewards.outcomes.std(1, correction=0).mean()),
        "frac_reward_zero_std": float((advantages == 0).all(1).float().mean()),
        "groups/sampled": len(rewards.outcomes),
        "groups/informative": int(informative(rewards.outcomes).sum()),
        "groups/used": len(groups.used),
        "completions/mean_length": float(lengths.mean()),
        "completions/clipped_ratio": float(cut),
        "passes": float(rollouts.out.passes.float().mean()),
        "rollout_time": groups.seconds,
        "num_text_tokens": float(lengths.sum()) + sum(map(len, rollouts.prompts)),
    }
    for term, values in rewards.terms.items():
        metrics[f"reward/{term}"] = float(values.mean())
    true = true_step_share([rollouts], run.task, run.text)
    if true is not None:
        metrics["true_steps"] = true
    drift = unigram_drift([rollouts], run.text)
    if drift is not None:
        metrics["unigram_drift"] = drift
    return metrics
