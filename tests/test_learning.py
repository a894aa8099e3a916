"""The default experiment at a reduced size, on sums of two terms, still learns."""

import pytest
from helpers import run_config

from mtp.trainer import train

REDUCED = [
    "task.num_terms=2",
    "evaluation.num_problems=256",
    "model.config.hidden_size=64",
    "model.config.num_hidden_layers=4",
    "model.config.intermediate_size=192",
    "model.config.initializer_range=0.06",
    "head.hidden_size=64",
    "head.intermediate_size=128",
    "head.taps=null",
    "stages.main.steps=550",
    "stages.main.evaluate_every=0",
    "stages.main.optimizers.main.lr=3e-3",
    "stages.head.steps=150",
    "stages.head.evaluate_every=0",
    "stages.joint.examples.block_anchors=true",
    "stages.joint.steps=400",
    "stages.joint.stop_accuracy=0",
    "stages.joint.evaluate_every=0",
    "stages.joint.optimizers.main.lr=3e-3",
    "stages.joint.optimizers.main.decay=cosine",
    "stages.joint.optimizers.head.lr=3e-3",
    "stages.joint.optimizers.head.decay=cosine",
    *(
        f"stages.{stage}.optimizers.{part}.algorithm=adamw"
        for stage, part in (
            ("main", "main"),
            ("head", "head"),
            ("joint", "main"),
            ("joint", "head"),
        )
    ),
    "stages.joint.optimizers.main.final_lr_ratio=0.1",
    "stages.joint.optimizers.head.final_lr_ratio=0.1",
    "stages.rl.steps=8",
    "stages.rl.rollouts.num_prompts=16",
    "stages.rl.rollouts.group_size=8",
    "stages.rl.evaluate_every=0",
]


@pytest.mark.slow
@pytest.mark.long
def test_the_channel_opens_where_main_learns_with_the_head_and_not_where_it_is_frozen(tmp_path):
    summary = train(run_config(tmp_path, *REDUCED))
    main, head, joint, rl = summary["stages"]
    assert main["slow_accuracy"] >= 0.9
    assert main["empty_thought_accuracy"] <= 0.1
    assert main["wrong_thought_accuracy"] <= 0.1
    assert head["fast_accuracy"] <= 0.25
    assert joint["fast_accuracy"] >= 0.8
    assert joint["slow_accuracy"] >= 0.9
    assert joint["slow_passes"] / joint["fast_passes"] >= 2.0
    assert rl["fast_accuracy"] >= 0.8
    assert rl["slow_accuracy"] >= 0.9
