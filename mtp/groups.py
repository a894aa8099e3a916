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
from .training.runtime import all_of, over_processes
from .training.sharding import whole
from .training.stage import RolloutsConfig
from .training.step_module import passes_in_step, within


@dataclass
class Groups:
    """The groups that this process sampled in one step, and the indices of those that are used."""

    rollouts: Rollouts
    """All rollouts: P prompts times G completions."""
    rewards: Rewards
    """[P, G]"""
    shares: list[list[int]]
    """Indices of the groups that each minibatch replays; no minibatch at all if no process has a
    group to learn from. A minibatch may have no group here and some on another process."""
    seconds: float
    """Seconds of sampling, without scoring."""


def sample_groups(run: Run, stage: StageRun, step: int) -> Groups:
    """Sample and score rollouts, in rounds, and choose the groups to learn from.

    Nothing of it depends on the number of processes: a rollout's noise follows from its prompt's
    place in the step, and groups are chosen among those of all processes in the order of places.
    """
    config = stage.config.rollouts
    parts: list[Rollouts] = []
    rewards: list[Rewards] = []
    places: list[int] = []
    seconds = 0.0
    for number in range(config.max_rounds):
        examples = next_examples(run, config.num_prompts)
        purpose = (stage.name, step, number) if number else (stage.name, step)
        seeds = run.row_seeds(config.num_prompts * config.group_size, *purpose)
        began = time.monotonic()
        part = within(
            stage.module,
            partial(
                sample,
                fmt=run.fmt,
                examples=list(examples.values()),
                plan=run.fmt.plan(config.mode),
                options=DecodeOptions(
                    sampler=run.config.decoding.sampler(),
                    max_new_tokens=run.config.decoding.max_new_tokens,
                    seeds=seeds.view(-1, config.group_size)[list(examples)].flatten(),
                    impl=run.config.kernels,
                    any_continues=passes_in_step(run.fabric, stage.module),
                ),
                group_size=config.group_size,
            ),
        )
        seconds += time.monotonic() - began
        parts.append(part)
        places += [number * config.num_prompts + place for place in examples]
        with whole(stage.reference, bool(stage.config.reward.legibility_cost)):
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
        found = over_processes(run.fabric, {"informative": float(num_informative)}, "sum")
        if found["informative"] >= config.num_prompts:
            break
    scored = join_rewards(rewards)
    is_informative = dict(zip(places, informative(scored.outcomes).tolist(), strict=True))
    used = choose(config, merged(all_of(run.fabric, is_informative)))
    index = {place: group for group, place in enumerate(places)}
    places_of = shares(used, config.num_minibatches) if used else []
    mine = [[index[place] for place in share if place in index] for share in places_of]
    return Groups(join_rollouts(parts), scored, mine, seconds)


def merged(parts: list[dict[int, bool]]) -> dict[int, bool]:
    """The groups of all processes, in the order of their places."""
    return dict(sorted(item for part in parts for item in part.items()))


def choose(config: RolloutsConfig, is_informative: dict[int, bool]) -> list[int]:
    """Places of the groups to learn from: all, or the first informative ones; none if none is.

    If there are fewer of them than optimizer steps, groups without advantage are added.
    """
    if not config.drop_uninformative:
        return list(is_informative)
    chosen = [place for place, informs in is_informative.items() if informs]
    if not chosen:
        return []
    others = [place for place, informs in is_informative.items() if not informs]
    chosen += others[: max(0, config.num_minibatches - len(chosen))]
    return chosen[: config.num_prompts]


def shares(items: list[int], number: int) -> list[list[int]]:
    """The items in `number` runs whose lengths differ by one at most."""
    bounds = [len(items) * i // number for i in range(number + 1)]
    return [items[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


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
        [one for part in parts for one in part.scored],
    )
