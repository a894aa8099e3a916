"""Reduced tasks on which each channel learns what a model without it cannot."""

import pytest
from helpers import run_config

from mtp.channels.cells import MORE, TASKS
from mtp.channels.measure import measure_message
from mtp.channels.saving import load_channel
from mtp.reports.json_lines import read_records
from mtp.trainer import train

REDUCED = [
    "evaluation.num_problems=128",
    "evaluation.num_interim_problems=128",
    "fabric.accelerator=cpu",
    "fabric.num_threads=1",
]


SHORT = ["stages.main.steps=800", "stages.main.evaluate_every=0"]
LEARN = {
    "no_thought": SHORT,
    "token": SHORT,
    "block": ["stages.main.evaluate_every=0", "head.num_slots=2"],
    "soft": SHORT,
    "multiplex": SHORT,
    "gated": [*SHORT, "stages.rl.steps=10"],
    "latent": [*MORE["pointers", "latent"], "stages.main.evaluate_every=0"],
}
"""Overrides of the channels of one model, beside those of the table's task."""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", list(LEARN))
def test_thoughts_of_every_channel_follow_the_pointers(name, tmp_path):
    """Guessing one of seven other nodes gives 14 %, and so does an answer without a thought."""
    folder = tmp_path / "run"
    run = configured(folder, name, *TASKS["pointers"], *LEARN[name])
    last = train(run)["stages"][-1]
    found = [last[key] for key in ("accuracy", "fast_accuracy", "slow_accuracy") if key in last]
    accuracy = next(value for value in found if value is not None)
    if name == "no_thought":
        assert accuracy <= 0.3
    else:
        assert accuracy >= 0.9


@pytest.mark.slow
@pytest.mark.long
def test_hidden_vectors_search_a_graph_and_an_answer_at_once_does_not(tmp_path):
    """Guessing one of two candidates gives 50 %; two vectors follow the two inner layers."""
    short = ["stages.main.steps=2000", "stages.main.evaluate_every=0"]
    (without,) = train(configured(tmp_path / "without", "no_thought", *short))["stages"]
    (latent,) = train(configured(tmp_path / "latent", "latent", "stages.main.evaluate_every=0"))[
        "stages"
    ]
    assert without["accuracy"] <= 0.65
    assert latent["accuracy"] >= 0.95 and latent["thought_passes"] == 2


def configured(folder, name, *overrides):
    return run_config(folder, f"experiment=channels/{name}", *REDUCED, *overrides)


def trained(folder, name, *overrides):
    """Summary of the only stage, interim accuracies by step, and bits of the messages."""
    run = configured(folder, name, *overrides)
    (summary,) = train(run)["stages"]
    records = read_records(folder / "metrics.jsonl")
    interim = {r["step"]: r["eval/accuracy"] for r in records if "eval/accuracy" in r}
    model, fmt, channel = load_channel(folder / "stages" / "main")
    bits = measure_message(
        model,
        fmt,
        channel,
        run.task.build(),
        num_problems=64,
        batch_size=64,
        max_new_tokens=run.decoding.max_new_tokens,
    )
    return summary, interim, bits


@pytest.mark.slow
def test_a_fuser_between_two_frozen_models_passes_on_what_the_receiver_lacks(tmp_path):
    """The receiver alone guesses one of seven nodes; the fuser begins with a message of zeros."""
    more = ["stages.main.steps=240", "stages.main.evaluate_every=110"]
    summary, interim, bits = trained(tmp_path, "kv", *more, "channel.options.text_steps=110")
    assert interim[110] <= 0.35
    assert summary["accuracy"] >= 0.9
    assert summary["passes"] == 1 + 8  # `ab;bc</think>c<eos>`
    assert bits["message_swap_bits"] >= 2 and bits["message_zero_bits"] >= 2


@pytest.mark.slow
def test_vectors_between_segments_carry_the_node_that_was_reached(tmp_path):
    more = ["task.hops=4", "decoding.segments.max_segments=2", "stages.main.evaluate_every=0"]
    summary, _, bits = trained(tmp_path / "with", "vector_memory", *more, "stages.main.steps=300")
    assert summary["accuracy"] >= 0.9
    assert bits["message_swap_bits"] >= 2
    without, _, _ = trained(tmp_path / "without", "no_memory", *more, "stages.main.steps=200")
    assert without["accuracy"] <= 0.4
