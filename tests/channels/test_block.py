"""The greedy answer after a sampled thought."""

import pytest
import torch

from mtp.channels import build_channel
from mtp.channels.channel import WriteOptions
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
