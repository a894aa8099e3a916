"""Groups of rollouts that a policy learns from: sampled until enough of them are informative.

A group whose raw outcomes all agree has no advantage: its replay would cost as much as another's
and teach nothing. DAPO's dynamic sampling (Yu et al. 2025) leaves such groups out and samples more.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .modeling.decode_options import DecodeOptions
from .modeling.memory import Memory
from .modeling.records import Decoded, pad
from .rollouts.advantage import informative
from .rollouts.reward import Rewards, score
from .rollouts.rollout import Rollouts, join_rollouts
from .run import Run, StageRun, next_examples, training_example
from .tasks.base import Example
from .tasks.projects import own_places
from .training.remote_sampler import RemoteSampler, Request
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
    """Seconds of sampling, or of waiting for the process that samples, without scoring."""


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
        began = time.monotonic()
        if run.ahead is None:
            asked = ask(run, stage, step, number)
            examples, part = asked.examples, sampled_here(run, stage, asked.request)
        else:
            examples, part = run.ahead.take(run, stage, step)
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
                impl=run.config.kernels,
            )
        rewards.append(scored)
        num_informative = sum(int(informative(one.credits).sum()) for one in rewards)
        found = over_processes(run.fabric, {"informative": float(num_informative)}, "sum")
        if found["informative"] >= config.num_prompts:
            break
    scored = join_rewards(rewards)
    is_informative = dict(zip(places, informative(scored.credits).tolist(), strict=True))
    used = choose(config, merged(all_of(run.fabric, is_informative)))
    index = {place: group for group, place in enumerate(places)}
    places_of = shares(used, config.num_minibatches) if used else []
    mine = [[index[place] for place in share if place in index] for share in places_of]
    return Groups(join_rollouts(parts), scored, mine, seconds)


@dataclass
class Asked:
    """The prompts of one round, and the request for their rollouts."""

    begin: int
    """Position of the first prompt of all processes in the run's data."""
    examples: dict[int, Example]
    """This process's prompts, by their place among those of all processes."""
    request: Request


def ask(run: Run, stage: StageRun, step: int, number: int = 0) -> Asked:
    """The next prompts of a step's round, and what to sample for them."""
    config, begin = stage.config.rollouts, run.progress.position
    examples = next_examples(run, config.num_prompts)
    purpose = (stage.name, step, number) if number else (stage.name, step)
    seeds = run.row_seeds(config.num_prompts * config.group_size, *purpose)
    options = DecodeOptions(
        sampler=run.config.decoding.sampler(),
        max_new_tokens=run.config.decoding.max_new_tokens,
        seeds=seeds.view(-1, config.group_size)[list(examples)].flatten(),
        impl=run.config.kernels,
        compiler=run.config.decoding.compiler(),
    )
    plan = run.fmt.plan(config.mode)
    request = Request(list(examples.values()), plan, options, config.group_size)
    return Asked(begin, examples, request)


def sampled_here(run: Run, stage: StageRun, request: Request) -> Rollouts:
    """The rollouts of a request, sampled by this process."""
    in_step = passes_in_step(run.fabric, stage.module)
    request = replace(request, options=replace(request.options, any_continues=in_step))
    return within(stage.module, lambda model: request.sample(model, run.fmt))


@dataclass
class Ahead:
    """Rollouts that another process samples, those of the next step among them if `lag` is 1.

    The rollouts of step n + 1 are asked for before the update of step n, so they are sampled by
    the weights of step n. A checkpoint holds them, since a resumed run has those weights no more.
    """

    sampler: RemoteSampler
    lag: int
    asked: dict[int, tuple[Asked, Any]] = field(default_factory=dict)
    """Requests by step, each with what the sampler gave for it."""
    restored: dict[int, tuple[dict[int, Example], Rollouts]] = field(default_factory=dict)
    """Prompts and rollouts of a checkpoint, by step."""

    def take(self, run: Run, stage: StageRun, step: int) -> tuple[dict[int, Example], Rollouts]:
        """Prompts and rollouts of a step; then the next step's are asked for."""
        if step in self.restored:
            found = self.restored.pop(step)
        else:
            if step not in self.asked:
                self._ask(run, stage, step)
            asked, handle = self.asked.pop(step)
            found = asked.examples, self.sampler.result(handle)
        if self.lag and step + 1 < stage.config.steps:
            self._ask(run, stage, step + 1)
        return found

    def _ask(self, run: Run, stage: StageRun, step: int) -> None:
        asked = ask(run, stage, step)
        self.asked[step] = asked, self.sampler.submit(asked.request, run.model)

    def state(self, run: Run) -> list[dict[str, Any]]:
        """The rollouts that were asked for, of all processes, as a checkpoint holds them."""
        states = []
        for step, (asked, handle) in self.asked.items():
            parts = all_of(run.fabric, (list(asked.examples), self.sampler.result(handle)))
            joined = join_rollouts([rollouts for _, rollouts in parts])
            tokens, lengths = pad(joined.prompts, 0)
            states.append(
                {
                    "step": step,
                    "begin": asked.begin,
                    "places": [place for places, _ in parts for place in places],
                    "group_size": joined.group_size,
                    "prompts": tokens,
                    "prompt_lengths": lengths,
                    "out": vars(joined.out),
                    "owners": joined.owners,
                    "memories": [
                        vars(memory) | {"entries": dict(memory.entries)}
                        for memory in joined.memories
                    ],
                }
            )
        return states

    def restore(self, run: Run, states: list[dict[str, Any]]) -> None:
        """Take this process's share of the rollouts of a checkpoint."""
        rank, world = run.fabric.global_rank, run.fabric.world_size
        for state in states:
            places = state["places"]
            lengths = state["prompt_lengths"].tolist()
            rollouts = Rollouts(
                [training_example(run, state["begin"] + place) for place in places],
                state["group_size"],
                [row[:n].tolist() for row, n in zip(state["prompts"], lengths, strict=True)],
                Decoded(**state["out"]),
                state["owners"],
                [Memory(**memory) for memory in state["memories"]],
            )
            own = own_places(len(places), run.task.project_size, rank, world)
            mine = [places.index(place) for place in own]
            chosen = rollouts.of_examples(mine)
            examples = {places[i]: rollouts.examples[i] for i in mine}
            self.restored[state["step"]] = examples, chosen


@contextmanager
def rollouts_ahead(run: Run, stage: StageRun) -> Iterator[None]:
    """Within, rollouts come from another process, if the stage's `rollouts.lag` asks for one."""
    lag = stage.config.rollouts.lag
    if lag is None:
        yield
        return
    run.ahead = Ahead(RemoteSampler(run.fabric, run.model, run.fmt, run.config.fabric), lag)
    try:
        run.ahead.restore(run, run.restored_rollouts)
        run.restored_rollouts = []
        yield
    finally:
        run.ahead.sampler.close()
        run.ahead = None


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


def join_rewards(parts: list[Rewards]) -> Rewards:
    """Rewards of several rounds as one."""
    return Rewards(
        torch.cat([part.outcomes for part in parts]),
        torch.cat([part.credits for part in parts]),
        torch.cat([part.total for part in parts]),
        {name: torch.cat([part.terms[name] for part in parts]) for name in parts[0].terms},
        [one for part in parts for one in part.scored],
    )
