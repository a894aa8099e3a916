"""The greedy answer after a sampled thought, and the cost of training."""

import pytest
import torch
from mtp_kernels import dispatch

from mtp.channels import build_channel
from mtp.channels.channel import WriteOptions
from mtp.channels.measure import training_cost
from mtp.modeling.sampler import Sampler


@pytest.mark.parametrize("name", ["token", "block"])
def test_thought_and_answer_share_the_limit_of_a_text(name, built, task):
    """Main has positions for the prompt and `max_new_tokens`, and for no more."""
    model, fmt = built
    channel = build_channel(name, {}, model)
    with torch.no_grad():
        model.lm_head.weight[fmt.delimiter_id("</think>")] += 0.3
    examples = [task.example("test", i) for i in range(48)]
    options = WriteOptions(sampler=Sampler(), max_new_tokens=16, seed=1)
    closed = [o for o in channel.write(model, fmt, examples, options) if o.vectors is not None]
    lengths = [len(output.vectors) + len(output.text) for output in closed]
    assert max(lengths) == 16 and min(len(output.vectors) for output in closed) < 8


@pytest.mark.parametrize("name", ["token", "block"])
def test_the_cost_of_training_counts_logits_that_an_operator_makes(name, built, task, monkeypatch):
    model, fmt = built
    channel, examples = build_channel(name, {}, model), [task.example("train", i) for i in range(8)]

    def flops(direct_numel: int) -> float:
        monkeypatch.setattr(dispatch, "DIRECT_NUMEL", direct_numel)
        return training_cost(model, fmt, channel, examples, step=0).flops_per_example

    assert flops(0) == flops(1 << 30)


def test_the_cost_of_training_is_that_of_the_anchors_that_a_run_has(built, task):
    model, fmt = built
    examples = [task.example("train", i) for i in range(8)]

    def flops(name: str, **options: int) -> float:
        channel = build_channel(name, options, model)
        return training_cost(model, fmt, channel, examples, step=0).flops_per_example

    token, one, all_of_them = flops("token"), flops("block", num_anchors=1), flops("block")
    assert token < one < all_of_them
    assert flops("token", num_anchors=1) == token
    assert flops("block", num_anchors=99) == all_of_them
