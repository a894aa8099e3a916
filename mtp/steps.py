"""The batches of one step: solved examples, or the policy's own rollouts with their advantages."""

from dataclasses import replace
from typing import Any

import torch

from .groups import Groups, join_rewards, join_rollouts, sample_groups
from .modeling.records import FORCED
from .rollouts.advantage import GroupRewards, informative
from .rollouts.legibility import true_step_share, unigram_drift
from .rollouts.reward import Rewards
from .rollouts.rollout import Rollouts
from .run import Run, StageRun, draw
from .training.batch import AnyBatch, RolloutBatch, TextBatch, without_rows
from .training.collate import collate_rollouts, collate_slow_rollouts, collate_text
from .training.objectives.scored import RowStats, replay_batch
from .training.runtime import all_of, on_first_process, over_processes
from .training.stage import AnchorsConfig, StageConfig
from .training.step_module import within


def step_batches(
    run: Run, stage: StageRun, step: int
) -> tuple[list[list[TextBatch]], dict[str, Any]]:
    """The micro-batches of each optimizer step, for this process, and what sampling measured.

    No optimizer step at all if uninformative groups are dropped and there are no others.
    """
    config, examples = stage.config, stage.config.examples
    if config.kind == "rl":
        return rollout_batches(run, stage, step)
    batches, num_tokens = solved_batches(
        run, stage.name, step, examples.batch_size, examples, config.micro_batch_size
    )
    return [batches], {"num_text_tokens": num_tokens}


def pieces(number: int, size: int) -> list[list[int]]:
    """0..number-1 in runs of `size`; 0 is one run."""
    size = size or number
    return [list(range(at, min(at + size, number))) for at in range(0, number, size)]


def evened(run: Run, batches: list[AnyBatch]) -> list[AnyBatch]:
    """The micro-batches, after as many without rows as bring all processes to the same number.

    Under a strategy that gathers weights in every forward all processes must run equally many.
    """
    most = over_processes(run.fabric, {"number": float(len(batches))}, "max")["number"]
    return [without_rows(batches[-1])] * (int(most) - len(batches)) + batches


def solved_batches(
    run: Run, purpose: str, step: int, number: int, anchors: AnchorsConfig, micro_batch_size: int
) -> tuple[list[TextBatch], int]:
    """`number` solved examples as batches, and the tokens of their text.

    purpose: what anchors are sampled for, by which their seeds differ.
    """
    text = run.text
    samples, names = [], []
    for place, example in draw(run, number).items():
        segments = text.example_segments(example)
        samples += segments
        # The first segment's name holds the place alone.
        names += [(place, segment) if segment else (place,) for segment in range(len(segments))]
    batches = [
        collate_text(
            [samples[i] for i in chosen],
            text.plan("fast"),
            text.block_size,
            text.pad_id,
            num_anchors=anchors.num_anchors,
            block_anchors=anchors.block_anchors,
            anchor_seeds=[run.seed_of(purpose, "anchors", step, *names[i]) for i in chosen],
        ).to(run.fabric.device)
        for chosen in pieces(len(samples), micro_batch_size)
    ]
    tokens = {"tokens": float(sum(len(p) + len(c) for p, c in samples))}
    return evened(run, batches), int(over_processes(run.fabric, tokens, "sum")["tokens"])


def advantages_of(run: Run, stage: StageConfig, rewards: Rewards) -> torch.Tensor:
    """[P, G] by the stage's rule, or its algorithm's."""
    batch = torch.cat(all_of(run.fabric, rewards.total))
    return stage.advantage_rule()(GroupRewards(rewards.total, rewards.outcomes, batch))


def rollout_batches(
    run: Run, stage: StageRun, step: int
) -> tuple[list[list[TextBatch]], dict[str, Any]]:
    """The policy's own rollouts, scored, with their advantages, as batches of each epoch over them.

    Solved examples of a step come before its rollouts, which reach every parameter, so that the
    last backward, in which processes reduce their gradients, does too.
    """
    groups = sample_groups(run, stage, step)
    advantages = advantages_of(run, stage.config, groups.rewards)
    config, micro_batch_size = stage.config.rollouts, stage.config.micro_batch_size
    metrics = rollout_metrics(run, groups, advantages, step)
    minibatches: list[list[TextBatch]] = []
    for number, share in enumerate(groups.shares * config.num_epochs):
        solved: list[TextBatch] = []
        if config.num_solved:
            purpose = f"{stage.name}/solved/{number}"
            solved, num_tokens = solved_batches(
                run, purpose, step, config.num_solved, config, micro_batch_size
            )
            metrics["num_text_tokens"] += num_tokens
        anchor_seed = run.seed_of(stage.name, "anchors", step, number)
        batches = [
            collate(run, stage, groups, advantages, segments, anchor_seed)
            for segments in micro_batches(groups, share, micro_batch_size)
        ] or [without_rows(collate(run, stage, groups, advantages, [0], anchor_seed))]
        batches = evened(run, batches)
        if config.recompute_old:
            batches = [replayed(run, stage, batch) for batch in batches]
        minibatches.append([*solved, *batches])
    return minibatches, metrics


def micro_batches(groups: Groups, share: list[int], size: int) -> list[list[int]]:
    """Segments of the groups' rollouts in runs of at most `size`, the short ones together, so that
    little is padding. All segments of a rollout are in one run, be they more than that.
    """
    rollouts, group_size = groups.rollouts, groups.rollouts.group_size
    rows = [group * group_size + i for group in share for i in range(group_size)]
    longest = [int(rollouts.out.lengths[rollouts.segments_of(row)].max()) for row in rows]
    batches: list[list[int]] = []
    for _, row in sorted(zip(longest, rows, strict=True), key=lambda pair: pair[0]):
        segments = rollouts.segments_of(row)
        if batches and (not size or len(batches[-1]) + len(segments) <= size):
            batches[-1] += segments
        else:
            batches.append(list(segments))
    return batches


def collate(
    run: Run,
    stage: StageRun,
    groups: Groups,
    advantages: torch.Tensor,
    segments: list[int],
    anchor_seed: int,
) -> RolloutBatch:
    """The chosen segments as a batch.

    anchor_seed: samples the anchors of slow rollouts where `num_anchors` limits them.
    """
    text, config, rollouts = run.text, stage.config.rollouts, groups.rollouts
    if config.mode == "slow":
        batch = collate_slow_rollouts(
            rollouts.prompts,
            rollouts.out,
            advantages.flatten(),
            segments,
            plan=text.plan("fast"),
            block_size=text.block_size,
            pad_id=text.pad_id,
            owners=rollouts.owners,
            num_anchors=config.num_anchors,
            block_anchors=config.block_anchors,
            anchor_seed=anchor_seed,
        )
    else:
        batch = collate_rollouts(
            rollouts.prompts,
            rollouts.out,
            advantages.flatten(),
            segments,
            block_size=text.block_size,
            pad_id=text.pad_id,
            owners=rollouts.owners,
        )
    return batch.to(run.fabric.device)


def replayed(run: Run, stage: StageRun, batch: RolloutBatch) -> RolloutBatch:
    """The batch with the `old` of its rows under the weights as they are now."""

    def stats(model: Any) -> dict[str, RowStats]:
        scored = replay_batch(
            model,
            batch,
            channel_gradient=stage.config.channel_gradient,
            use_head=stage.config.objective.uses_head,
            impl=run.config.kernels,
        )
        return scored.stats(run.config.decoding.sampler())

    old = within(stage.module, stats)
    return replace(
        batch,
        main=replace(batch.main, old=old["main"].logprob),
        head=replace(batch.head, old=old["head"].logprob),
    )


def rollout_metrics(
    run: Run, groups: Groups, advantages: torch.Tensor, step: int
) -> dict[str, Any]:
    """What all that was sampled measures on all processes, the groups left out included."""
    parts = all_of(run.fabric, (groups, advantages))
    found = [groups for groups, _ in parts]
    whole = Groups(
        join_rollouts([part.rollouts for part in found]),
        join_rewards([part.rewards for part in found]),
        [sum(shares, []) for shares in zip(*(part.shares for part in found), strict=True)],
        max(part.seconds for part in found),
    )
    advantages = torch.cat([part for _, part in parts])
    return on_first_process(run.fabric, lambda: metrics_of(run, whole, advantages, step))


def metrics_of(run: Run, groups: Groups, advantages: torch.Tensor, step: int) -> dict[str, Any]:
    """What groups measure."""
    rollouts, rewards, limit = groups.rollouts, groups.rewards, run.config.decoding.max_new_tokens
    cut = 1 - rollouts.out.finished[rollouts.last].float().mean()
    if cut == 1 and run.task.judges:
        run.console.print(
            f"[yellow]warning: all {len(rollouts)} rollouts of step {step + 1} were cut at "
            f"decoding.max_new_tokens={limit}; none can be right"
        )
    lengths = rollouts.total(rollouts.out.lengths)
    metrics = reward_metrics(rewards, advantages) if run.task.judges else {}
    metrics |= {
        "groups/sampled": len(rewards.outcomes),
        "groups/informative": int(informative(rewards.outcomes).sum()),
        "groups/used": sum(map(len, groups.shares)),
        "completions/mean_length": float(lengths.mean()),
        "completions/clipped_ratio": float(cut),
        "passes": float(rollouts.total(rollouts.out.passes).mean()),
        "rollout_time": groups.seconds,
        "num_text_tokens": float(lengths.sum()) + sum(map(len, rollouts.prompts)),
    }
    if run.text.segments.max_segments > 1:
        metrics |= segment_metrics(rollouts)
    for term, values in rewards.terms.items():
        metrics[f"reward/{term}"] = float(values.mean())
    true = true_step_share([rollouts], run.task, run.text)
    if true is not None:
        metrics["true_steps"] = true
    drift = unigram_drift([rollouts], run.text)
    if drift is not None:
        metrics["unigram_drift"] = drift
    return metrics


def reward_metrics(rewards: Rewards, advantages: torch.Tensor) -> dict[str, float]:
    """How many rollouts are right, how much groups vary, and the share without an advantage."""
    return {
        "reward": float(rewards.outcomes.mean()),
        "reward_std": float(rewards.outcomes.std(1, correction=0).mean()),
        "frac_reward_zero_std": float((advantages == 0).all(1).float().mean()),
    }


def segment_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Segments and forced tokens of a rollout, and how its memory was edited: means over rollouts.

    `memory/ignored`: lines of summaries that changed nothing. `memory/characters`: of the file in
    the end.
    """
    number = len(rollouts)
    ends = [rollouts.memories[segment] for segment in rollouts.last]
    return {
        "segments": len(rollouts.prompts) / number,
        "completions/forced_tokens": int((rollouts.out.slots == FORCED).sum()) / number,
        "memory/edits": sum(memory.num_edits for memory in ends) / number,
        "memory/ignored": sum(memory.num_ignored for memory in ends) / number,
        "memory/characters": sum(len(memory.text) for memory in ends) / number,
    }
