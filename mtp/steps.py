"""The batches of one step: solved examples, or the policy's own rollouts with their advantages."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch

from .groups import Groups, join_rewards, sample_groups
from .modeling.records import FORCED
from .rollouts.advantage import GroupRewards, informative
from .rollouts.legibility import step_metrics, unigram_drift
from .rollouts.reward import Rewards
from .rollouts.rollout import Rollouts, join_rollouts
from .run import Run, StageRun, next_examples
from .tasks.base import Scored
from .training.batch import AnyBatch, RolloutBatch, TextBatch, without_rows
from .training.collate import collate_main_rollouts, collate_rollouts, collate_text
from .training.objectives.scored import RowStats, replay_batch
from .training.runtime import all_of, on_first_process, over_processes
from .training.stage import AnchorsConfig, StageConfig
from .training.step_module import within


def step_batches(
    run: Run, stage: StageRun, step: int
) -> tuple[list[list[TextBatch]], dict[str, Any]]:
    """The micro-batches of each optimizer step, for this process, and metrics of sampling.

    No optimizer step at all if uninformative groups are dropped and there are no others.
    """
    config, examples = stage.config, stage.config.examples
    if config.kind == "rl":
        return rollout_batches(run, stage, step)
    batches, num_tokens = solved_batches(
        run,
        stage.name,
        step,
        examples.batch_size,
        examples,
        config.micro_batch_size,
        length_window=examples.length_window,
    )
    return [batches], {"num_text_tokens": num_tokens}


def pieces(number: int, size: int) -> list[list[int]]:
    """0..number-1 in lists of length `size`; 0: one list."""
    size = size or number
    return [list(range(at, min(at + size, number))) for at in range(0, number, size)]


def evened(run: Run, batches: list[AnyBatch]) -> list[AnyBatch]:
    """The micro-batches, after enough of them without rows for all processes to have equally many.

    Under a strategy that gathers weights in every forward all processes must run equally many.
    """
    most = over_processes(run.fabric, {"number": float(len(batches))}, "max")["number"]
    return [without_rows(batches[-1])] * (int(most) - len(batches)) + batches


def solved_batches(
    run: Run,
    purpose: str,
    step: int,
    number: int,
    anchors: AnchorsConfig,
    micro_batch_size: int,
    *,
    length_window: int = 0,
) -> tuple[list[TextBatch], int]:
    """`number` solved examples as batches, and the number of tokens of their text.

    purpose: part of the seeds of the anchors, so that anchors of different purposes differ;
    length_window: as in `next_examples`.
    """
    fmt = run.fmt
    samples, names = [], []
    for place, example in next_examples(run, number, length_window).items():
        segments = fmt.example_segments(example)
        samples += segments
        # The first segment's name holds the place alone.
        names += [(place, segment) if segment else (place,) for segment in range(len(segments))]
    batches = [
        collate_text(
            [samples[i] for i in chosen],
            fmt.plan("fast"),
            fmt.block_size,
            fmt.pad_id,
            num_anchors=anchors.num_anchors,
            block_anchors=anchors.block_anchors,
            anchor_seeds=[run.seed_of(purpose, "anchors", step, *names[i]) for i in chosen],
        ).to(run.fabric.device)
        for chosen in pieces(len(samples), micro_batch_size)
    ]
    tokens = {"tokens": float(sum(len(p) + len(c) for p, c in samples))}
    return evened(run, batches), int(over_processes(run.fabric, tokens, "sum")["tokens"])


def advantages_of(run: Run, stage: StageConfig, groups: Groups) -> torch.Tensor:
    """[P, G] advantages by the stage's rule, or its algorithm's."""
    rewards = groups.rewards
    batch = torch.cat(all_of(run.fabric, rewards.total))
    return stage.advantage_rule()(GroupRewards(rewards.total, rewards.credits, batch))


def rollout_batches(
    run: Run, stage: StageRun, step: int
) -> tuple[list[list[TextBatch]], dict[str, Any]]:
    """The policy's own rollouts, scored, with their advantages, as batches of each epoch over them.

    Supervised micro-batches come first, see `Step.reaches_all`.
    """
    groups = sample_groups(run, stage, step)
    advantages = advantages_of(run, stage.config, groups)
    config, micro_batch_size = stage.config.rollouts, stage.config.micro_batch_size
    metrics = rollout_metrics(run, stage.name, groups, advantages, step)
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
    """Segments of the groups' rollouts in lists of at most `size`, sorted by length to reduce
    padding.

    All segments of a rollout are in one list, even if there are more than `size`.
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

    anchor_seed: seed of the anchors of slow and verified rollouts if `num_anchors` limits them.
    """
    fmt, config, rollouts = run.fmt, stage.config.rollouts, groups.rollouts
    if config.mode != "fast":
        batch = collate_main_rollouts(
            rollouts.prompts,
            rollouts.out,
            advantages.flatten(),
            segments,
            plan=fmt.plan("verified" if config.mode == "verified" else "fast"),
            block_size=fmt.block_size,
            pad_id=fmt.pad_id,
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
            block_size=fmt.block_size,
            pad_id=fmt.pad_id,
            owners=rollouts.owners,
        )
    return batch.to(run.fabric.device)


def replayed(run: Run, stage: StageRun, batch: RolloutBatch) -> RolloutBatch:
    """The batch with `old` recomputed under the current weights."""

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
    run: Run, stage: str, groups: Groups, advantages: torch.Tensor, step: int
) -> dict[str, Any]:
    """Metrics of all rollouts that all processes sampled, those of unused groups included.

    Columns that reward functions logged are written to the log's details.
    """
    parts = all_of(run.fabric, (groups, advantages))
    found = [groups for groups, _ in parts]
    whole = Groups(
        join_rollouts([part.rollouts for part in found]),
        join_rewards([part.rewards for part in found]),
        [sum(shares, []) for shares in zip(*(part.shares for part in found), strict=True)],
        max(part.seconds for part in found),
    )
    advantages = torch.cat([part for _, part in parts])

    def measured() -> dict[str, Any]:
        extra = extra_rows(whole)
        if extra:
            at = {"stage": stage, "step": step + 1}
            run.log.detail("rewards", [at | row for row in extra], run.progress.global_step + 1)
        return metrics_of(run, whole, advantages, step)

    return on_first_process(run.fabric, measured)


def metrics_of(run: Run, groups: Groups, advantages: torch.Tensor, step: int) -> dict[str, Any]:
    """Metrics of groups of rollouts."""
    rollouts, rewards, limit = groups.rollouts, groups.rewards, run.config.decoding.max_new_tokens
    cut = 1 - rollouts.out.finished[rollouts.last].float().mean()
    if cut == 1 and run.task.has_verifier:
        run.console.print(
            f"[yellow]warning: all {len(rollouts)} rollouts of step {step + 1} were cut at "
            f"decoding.max_new_tokens={limit}, so none has an answer; raise it"
        )
    lengths = rollouts.total(rollouts.out.lengths)
    metrics = reward_metrics(rewards, advantages) if run.task.has_verifier else {}
    metrics |= {
        "groups/sampled": len(rewards.outcomes),
        "groups/informative": int(informative(rewards.credits).sum()),
        "groups/used": sum(map(len, groups.shares)),
        "completions/mean_length": float(lengths.mean()),
        "completions/clipped_ratio": float(cut),
        "passes": float(rollouts.total(rollouts.out.passes).mean()),
        "rollout_time": groups.seconds,
        "num_text_tokens": float(lengths.sum()) + sum(map(len, rollouts.prompts)),
    }
    if run.fmt.segments.max_segments > 1:
        metrics |= segment_metrics(rollouts)
    for term, values in rewards.terms.items():
        metrics[f"reward/{term}"] = float(values.mean())
    metrics |= function_metrics([one for one in rewards.scored if one is not None])
    steps = step_metrics([rollouts], run.task, run.fmt)
    metrics |= {name: value for name, value in steps.items() if value is not None}
    drift = unigram_drift([rollouts], run.fmt)
    if drift is not None:
        metrics["unigram_drift"] = drift
    return metrics


def reward_metrics(rewards: Rewards, advantages: torch.Tensor) -> dict[str, float]:
    """Accuracy of the rollouts, its deviation within groups, and the share of groups without
    advantage.
    """
    return {
        "reward": float(rewards.outcomes.mean()),
        "reward_std": float(rewards.outcomes.std(1, correction=0).mean()),
        "frac_reward_zero_std": float((advantages == 0).all(1).float().mean()),
    }


def function_metrics(scored: list[Scored]) -> dict[str, float]:
    """Mean and deviation of each reward function over the answers that it applies to, and means of
    the metrics that the functions logged.
    """
    metrics: dict[str, float] = {}
    for name in dict.fromkeys(name for one in scored for name in one.parts):
        found = [v for one in scored if (v := one.parts.get(name)) is not None]
        if found:
            values = torch.tensor(found, dtype=torch.float64)
            metrics[f"rewards/{name}/mean"] = float(values.mean())
            metrics[f"rewards/{name}/std"] = float(values.std(correction=0))
    logged: defaultdict[str, list[float]] = defaultdict(list)
    for one in scored:
        for name, value in one.metrics:
            logged[name].append(value)
    return metrics | {f"rewards/{name}": sum(v) / len(v) for name, v in sorted(logged.items())}


def extra_rows(groups: Groups) -> list[dict[str, Any]]:
    """Rows of the columns that reward functions logged, one per answer that has some."""
    rows = []
    for row, one in enumerate(groups.rewards.scored):
        if one is not None and one.extra:
            prompt = groups.rollouts.example(row).shown
            rows.append({"prompt": prompt, "score": one.score, **one.parts, **one.extra})
    return rows


def segment_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Means over rollouts: segments, forced tokens, and edits of the memory.

    `memory/ignored`: lines of summaries that changed nothing. `memory/characters`: size of the last
    memory file.
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
