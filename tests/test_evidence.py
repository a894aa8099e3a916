"""Reduced versions of the studies of docs/evidence.md."""

from pathlib import Path

import pytest
from helpers import run_config

from mtp.trainer import train

pytestmark = [pytest.mark.slow, pytest.mark.long]

SUMS = [
    "task.num_terms=2",
    "decoding.max_new_tokens=24",
    "evaluation.num_problems=256",
    "head.taps=[1,3,4]",
    "head.hidden_size=64",
    "head.intermediate_size=128",
]
TEACHER = [
    "task.num_train=1000",
    "model.config.hidden_size=64",
    "model.config.intermediate_size=192",
    "model.config.initializer_range=0.06",
    "stages.main.steps=400",
    "stages.main.evaluate_every=0",
    "stages.head.steps=0",
    "stages.joint.steps=300",
    "stages.joint.stop_accuracy=0",
    "stages.joint.evaluate_every=0",
]


def stages_of(folder: Path, *overrides: str) -> list[dict]:
    """Summaries of the stages of a run in a folder."""
    fixed = ["fabric.accelerator=cpu", "fabric.num_threads=1"]
    return train(run_config(folder, *overrides, *fixed))["stages"]


def test_english_thoughts_are_written_in_blocks(tmp_path):
    """The head of a frozen main fails at them, and joint training opens the channel."""
    short = [f"stages.{stage}.evaluate_every=0" for stage in ("main", "head", "joint")]
    given = ["evaluation.num_problems=128", "stages.joint.stop_accuracy=0", "stages.rl.steps=0"]
    main, head, joint = stages_of(tmp_path, "experiment=gsm_symbolic_tiny", *short, *given)
    assert main["slow_accuracy"] >= 0.8
    assert main["empty_thought_accuracy"] <= 0.3 and main["wrong_thought_accuracy"] <= 0.3
    assert head["fast_accuracy"] <= 0.2
    assert joint["slow_accuracy"] >= 0.8
    assert joint["fast_accuracy"] >= 0.5
    assert joint["thought_tokens_per_pass"] >= 4.0


def test_the_reward_adds_to_what_imitation_of_an_imperfect_teacher_gives(tmp_path):
    """From one model that imitation has opened, with the same rates, steps and rollouts."""
    start = tmp_path / "start"
    teacher, joint = stages_of(start, "experiment=imperfect_teacher/start", *SUMS, *TEACHER)
    assert teacher["slow_accuracy"] <= 0.8

    def after(source: Path, arm: str, name: str, steps: int) -> dict:
        (stage,) = stages_of(
            tmp_path / name,
            f"experiment=imperfect_teacher/{arm}",
            *SUMS,
            f"model.source={source}",
            f"evaluation.reference={start / 'stages' / 'main'}",
            f"stages.rl.steps={steps}",
            "stages.rl.evaluate_every=0",
        )
        return stage

    opened = after(start / "stages" / "joint", "kl_only", "opened", 400)
    assert opened["fast_accuracy"] >= joint["fast_accuracy"] + 0.1
    source = tmp_path / "opened" / "stages" / "rl"
    imitation = after(source, "kl_only", "imitation", 500)
    reward = after(source, "reward_kl_0.03", "reward", 500)
    assert reward["fast_accuracy"] >= imitation["fast_accuracy"] + 0.1
    assert reward["fast_accuracy"] >= teacher["slow_accuracy"] + 0.05
    assert reward["true_steps"] >= imitation["true_steps"]
