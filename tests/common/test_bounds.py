"""Every number of the config has bounds, and one that is out of them is refused by its key."""

import math
import types
import typing
from dataclasses import fields, is_dataclass, make_dataclass

import pytest
from test_config import mistake, run_config

from mtp.common.bounds import BOUNDS, bounded, check_numbers, join, numbers
from mtp.config import RunConfig
from mtp.tasks import TASK_CONFIGS


def parts(hint: object) -> list[object]:
    """The types that a hint is made of: of `list[int] | None` int and None's."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) in (list, dict, typing.Union):
        return [part for argument in typing.get_args(hint) for part in parts(argument)]
    return [hint]


def declared(cls: type, key: str = "") -> dict[str, set[str]]:
    """Bounds that each numeric field below a dataclass declares, by key."""
    found = {}
    hints = typing.get_type_hints(cls)
    for entry in fields(cls):
        name = join(key, entry.name)
        kinds = parts(hints[entry.name])
        if {int, float} & set(kinds):
            found[name] = set(BOUNDS) & set(entry.metadata)
        for kind in kinds:
            if is_dataclass(kind):
                found |= declared(kind, name)
    return found


@pytest.mark.parametrize("cls", [RunConfig, *TASK_CONFIGS.values()])
def test_every_number_declares_a_bound(cls):
    found = declared(cls)
    assert found, "no numeric field was found"
    assert [name for name, bounds in found.items() if not bounds] == []


def test_the_walk_reaches_every_part_of_the_config():
    found = declared(RunConfig)
    for key in ("seed", "head.taps", "decoding.phases.max_tokens", "stages.optimizers.main.lr"):
        assert key in found, key
    assert len(found) > 70


def test_numbers_at_their_bounds_are_taken_and_those_beyond_are_not():
    cases = [
        (bounded(1, at_least=0), [0, 2**31 - 1], {-1: "at least 0", 2**31: "at most 2147483647"}),
        (bounded(1.0, above=0), [1e-9, 1e9], {0.0: "above 0", 2e9: "at most 1000000000"}),
        (bounded(1.0, at_least=0, below=1), [0.0, 0.99], {1.0: "below 1", -0.1: "at least 0"}),
        (bounded(1, at_most=2**32 - 1), [2**32 - 1], {2**32: "at most 4294967295"}),
    ]
    for entry, good, bad in cases:
        made = make_dataclass("Made", [("size", type(entry.default), entry)])
        for value in good:
            check_numbers(made(value))
        for value, line in bad.items():
            with pytest.raises(ValueError, match=f"^size must be {line}, got {value}$"):
                check_numbers(made(value))
        for value in (math.nan, math.inf, -math.inf):
            with pytest.raises(ValueError, match=f"^size must be a finite number, got {value}$"):
                check_numbers(made(value))


def test_lists_and_open_mappings_are_walked_too():
    config = run_config("stages.rl.objective.head_ce.slot_weights=[1,2]")
    found = {name: value for name, value, _ in numbers(config)}
    assert found["stages.rl.objective.head_ce.slot_weights[1]"] == 2
    config.model.config["rope_theta"] = math.nan
    with pytest.raises(ValueError, match=r"^model.config.rope_theta must be a finite number"):
        config.validate()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("decoding.temperature=nan", "decoding.temperature must be a finite number, got nan"),
        ("decoding.temperature=inf", "decoding.temperature must be a finite number, got inf"),
        ("decoding.temperature=1e-30", "decoding.temperature must be 0 (greedy) or at least 0.001"),
        ("seed=-1", "seed must be at least 0, got -1"),
        ("seed=4294967296", "seed must be at most 4294967295, got 4294967296"),
        (
            "stages.rl.optimizers.main.warmup_steps=-3",
            "stages.rl.optimizers.main.warmup_steps must be at least 0",
        ),
        (
            "stages.rl.optimizers.main.lr=inf",
            "stages.rl.optimizers.main.lr must be a finite number, got inf",
        ),
        (
            "stages.rl.optimizers.main.clip_norm=nan",
            "stages.rl.optimizers.main.clip_norm must be a finite number",
        ),
        ("stages.rl.objective.policy.weight=-1", "stages.rl.objective.policy.weight must be at l"),
        ("stages.rl.reward.pass_cost=-0.1", "stages.rl.reward.pass_cost must be at least 0"),
        (
            "stages.rl.rollouts.group_size=0",
            "stages.rl.rollouts.group_size must be at least 1, got",
        ),
        ("checkpoint_minutes=nan", "checkpoint_minutes must be a finite number, got nan"),
        ("checkpoint_minutes=-1", "checkpoint_minutes must be at least 0, got -1"),
        ("fabric.devices=-1", "fabric.devices must be at least 1, got -1"),
        ("fabric.num_threads=-1", "fabric.num_threads must be at least 0, got -1"),
        ("fabric.accelerator=foo", "fabric.accelerator must be one of auto, cpu, gpu, cuda, mps,"),
        (
            "fabric.devices=3",
            "stages.main.examples.batch_size must be a multiple of the 3 processes",
        ),
        ("evaluation.num_samples=-1", "evaluation.num_samples must be at least 0, got -1"),
        ("logger.log_every=0", "logger.log_every must be at least 1, got 0"),
        ("+model.config.rms_norm_eps=inf", "model.config.rms_norm_eps must be a finite number"),
        ("decoding.phases.thought.max_tokens=0", "decoding.phases.thought.max_tokens must be at"),
        ("head.intermediate_size=0", "head.intermediate_size must be at least 1, got 0"),
    ],
)
def test_a_number_out_of_bounds_is_one_line_that_names_its_key(override, line):
    assert mistake(override).startswith(line)
