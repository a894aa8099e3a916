"""Groups of rollouts that a policy learns from: sampled until enough of them are informative.

A group whose raw outcomes all agree has no advantage: its replay would cost as much as another's
and teach nothing. DAPO's dynamic sampling (Yu et al. 2025) leaves such groups out and samples more.
"""

import time
from dataclasses import dataclass
from functools import partial

import torch

from .modeling.decode_options import DecodeOptions
from .modeling.records import Decoded
from .rollouts.advantage import informative
from .rollouts.reward import Rewards, score
from .rollouts.rollout import Rollouts, sample
from .run import Run, StageRun, next_examples
from .training.runtime import over_processes
from .training.stage import RolloutsConfig
from .training.step_module import within


@dataclass
class Groups:
    """The groups that one step sampled, and the indices of those that it uses."""

    rollouts: Rollouts
    """All rollouts: P prompts times G completions."""
    rewards: Rewards
    """[P, G]"""
    used: list[int]
    """Indices of the groups that are replayed, at most the stage's share of this process."""
    seconds: float
    """Seconds of sampling, without scoring."""


def sample_groups(run: Run, stage: StageRun, step: int) -> Groups:
    """Sample and score rollouts, in rounds, and choose the groups to learn from."""
    config = stage.config.rollouts
    parts: list[Rollouts] = []
    rewards: list[Rewards] = []
    seconds = 0.0
    share = config.num_prompts // run.fabric.world_size
    for number in range(config.max_rounds):
        examples = next_examples(run, config.num_prompts)
        purpose = (stage.name, step, number) if number else (stage.name, step)
        began = time.monotonic()
        part = within(
            stage.module,
            partial(
                sample,
                fmt=run.fmt,
                examples=examples,
                plan=run.fmt.plan(config.mode),
                options=DecodeOptions(
                    sampler=run.config.decoding.sampler(),
                    max_new_tokens=run.config.decoding.max_new_tokens,
                    generator=run.generator(*purpose),
                    impl=run.config.kernels,
                ),
                group_size=config.group_size,
            ),
        )
        seconds += time.monotonic() - began
        parts.append(part)
        scored = score(
            run.task,
            run.fmt,
            part,
            stage.config.reward,
            max_new_tokens=run.config.decoding.max_new_tokens,
            reference=stage.reference,
        )
        rewards.append(scored)
        num_informative = sum(int(informative(r.outcomes).sum()) for r in rewards)
        is_short = {"short": float(num_informative < share)}
        if not over_processes(run.fabric, is_short, "sum")["short"]:
            break
    scored = join_rewards(rewards)
    used = list(range(len(scored.outcomes)))
    if config.drop_uninformative:
        used = choose(run, config, informative(scored.outcomes))[:share]
    return Groups(join_rollouts(parts), scored, used, seconds)


def choose(run: Run, config: RolloutsConfig, is_informative: torch.Tensor) -> list[int]:
    """Informative groups; empty if no process has any.

    A process with fewer informative groups than its number of optimizer steps adds groups without
    advantage, so that all processes take the same number of steps.
    """
    chosen: list[int] = is_informative.nonzero()[:, 0].tolist()
    if not over_processes(run.fabric, {"chosen": float(len(chosen))}, "sum")["chosen"]:
        return []
    missing = max(0, config.num_minibatches - len(chosen))
    return chosen + (~is_informative).nonzero()[:missing, 0].tolist()


def join_rollouts(parts: list[Rollouts]) -> Rollouts:
    """Rollouts of several rounds as one."""
    if len(parts) == 1:
        return parts[0]
    begins = [sum(map(len, parts[:number])) for number in range(len(parts))]
    return Rollouts(
        [example for part in parts for example in part.examples],
        parts[0].group_size,
        [prompt for part in parts for prompt in part.prompts],
        Decoded.join([part.out for part in parts], pad_id=0),
        [begin + i for begin, part in zip(begins, parts, strict=True) for i in part.owners],
        [memory for part in parts for memory in part.memories],
    )


def join_rewards(parts: list[Rewards]) -> Rewards:
    """Rewards of several rounds as one."""
    return Rewards(
        torch.cat([part.outcomes for part in parts]),
        torch.cat([part.total for part in parts]),
        {name: torch.cat([part.terms[name] for part in parts]) for name in parts[0].terms},
    )
