"""Times on paper, worked by hand on a machine of round numbers."""

from dataclasses import replace

import pytest

from mtp.plan.memory import Layout, Workload
from mtp.plan.shapes import MAINS, HeadShape, MainShape, head_for
from mtp.plan.time import (
    MACHINES,
    Machine,
    Rates,
    asynchronous_step,
    pass_parts,
    pass_time,
    step_time,
    training_parts,
)

MAIN = MainShape(10, 20, 2, 10, 10, 1, 50, True)
"""Layers: 4 * 100 + 3 * 200 = 1,000 weights in products each; output matrix: 500."""
HEAD = HeadShape("parallel", 1, 4, 1, 1, 1, num_taps=1)
"""40 + 16 + 4 + 40 = 100 weights."""
LOAD = Workload(MAIN, HEAD, rollouts=8, group_size=8, prompt_tokens=10, new_tokens=20,
                micro_batch=8, precision="32-true", reference=False)  # fmt: skip
EXACT = Rates(1.0, 1.0, 1.0, 1.0, 0)
MACHINE = Machine("round", 1e3, 1e6, 1e12, 1e3, 1e2, 0.5)


def test_a_pass_takes_its_products_or_its_reads():
    parts = pass_parts(LOAD, Layout(), MACHINE, EXACT, rows=1, context=0)
    # Two tokens are fed: 2 * 2 * 2,000; the head: 2 * 100; both rows of the output: 2 * 2 * 500.
    assert parts["FLOPs"] == pytest.approx((8000 + 200 + 2000) / 1e3)
    assert parts["memory"] == pytest.approx(4 * (2000 + 500 + 100) / 1e6)
    assert parts["launches"] == 0
    assert pass_time(parts) == parts["FLOPs"]
    slow = pass_parts(LOAD, Layout(), replace(MACHINE, flops=1e9), EXACT, 1, 0)
    assert pass_time(slow) == slow["memory"]
    launched = pass_parts(LOAD, Layout(), MACHINE, replace(EXACT, launches_per_layer=20), 1, 0)
    assert pass_time(launched) == 20 * 2 * 0.5


def test_an_eavesdropper_reads_the_output_matrix_for_each_slot():
    head = replace(HEAD, kind="eavesdrop", num_slots=3)
    load = replace(LOAD, head=head)
    parts = pass_parts(load, Layout(), MACHINE, EXACT, 1, 0)
    read = 2000 + 4 * 500 + 3 * head.parameters(MAIN)
    assert parts["memory"] == pytest.approx(4 * read / 1e6)


@pytest.mark.parametrize("kind", ["parallel", "eavesdrop"])
def test_a_pass_of_one_token_does_not_run_the_head(kind):
    load = replace(LOAD, head=replace(HEAD, kind=kind), tokens_per_pass=1.0)
    parts = pass_parts(load, Layout(), MACHINE, EXACT, rows=1, context=0)
    assert parts["FLOPs"] == pytest.approx((2 * 2000 + 2 * 500) / 1e3)
    assert parts["memory"] == pytest.approx(4 * (2000 + 500) / 1e6)


def test_training_counts_three_products_of_layers_and_four_of_the_output_layer():
    parts = training_parts(LOAD, Layout(), MACHINE, EXACT)
    texts = 8 * 30
    forward = 2 * texts * 2000 + 2 * texts * 30 * 10 * 2
    head, output = 2 * (8 * 20 / 2) * 100, 2 * 8 * 20 * 500
    assert parts["FLOPs"] == pytest.approx((3 * forward + 3 * head + 4 * output) / 1e3)
    again = training_parts(replace(LOAD, gradient_checkpointing=True), Layout(), MACHINE, EXACT)
    assert again["FLOPs"] - parts["FLOPs"] == pytest.approx(forward / 1e3)
    # Weights read and written, gradients read, two states read and written.
    assert parts["memory"] == pytest.approx(7 * 4 * (2000 + 40 + 510 + 100) / 1e6)


def test_weights_in_shards_are_received_in_every_pass_or_once():
    load = replace(LOAD, rollouts=16)
    layer = step_time(load, Layout(2, "fsdp2", "layer"), MACHINE, EXACT)
    whole = step_time(load, Layout(2, "fsdp2", "whole"), MACHINE, EXACT)
    one = step_time(load, Layout(2), MACHINE, EXACT)
    received = 4 * (2000 + 40) / 2 / 1e3
    assert one.passes == 10
    assert whole.rollouts - one.rollouts == pytest.approx(received)
    assert layer.one_pass == max(one.one_pass, received)


def test_asynchronous_rollouts_take_the_longer_part_and_the_sending():
    main = MAINS["1b"]
    load = Workload(main, head_for(main), rollouts=1024, new_tokens=1024)
    machine, rates = MACHINES["h100"], Rates()
    found = asynchronous_step(load, Layout(64), machine, rates)
    assert found is not None and 0 < found.samplers < 64
    sent = 2 * main.parameters / (rates.network * min(machine.link, 8 * machine.network))
    assert found.step == pytest.approx(max(found.rollouts, found.training) + sent)
    assert asynchronous_step(load, Layout(1), machine, rates) is None
    # What bounds a step of 70 B is the gathering of its weights in every pass.
    big = MAINS["70b"]
    load = Workload(big, head_for(big), rollouts=1024)
    step = step_time(load, Layout(1024, "fsdp2", "layer"), machine, rates)
    assert step.bound == "rollouts: network"
