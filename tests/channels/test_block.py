"""The greedy answer after a sampled thought."""

import pytest
import torch

from mtp.channels import build_channel
from mtp.channels.block import continuations
from mtp.channels.channel import WriteOptions
from mtp.modeling.decode import decode
from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.sampler import Sampler


def test_each_text_goes_on_to_its_own_limit(built, task):
    """As if it were decoded alone; some texts end before their limits, and 0 adds nothing."""
    model, fmt = built
    with torch.no_grad():
        model.lm_head.weight[fmt.eos_id] += 0.3
    plan = fmt.plan("slow").as_last_segment()
    options = DecodeOptions(sampler=Sampler(temperature=0), max_new_tokens=1, pad_id=fmt.pad_id)
    texts = [
        [*fmt.prompt_ids(task.example("test", i).prompt), *fmt.thought_ids("")] for i in range(24)
    ]
    limits = [i % 9 for i in range(24)]
    found = continuations(model, texts, limits, plan, options)
    for text, limit, rest in zip(texts, limits, found, strict=True):
        if limit == 0:
            assert rest == []
            continue
        alone = DecodeOptions(
            sampler=Sampler(temperature=0), max_new_tokens=limit, pad_id=fmt.pad_id
        )
        row = torch.tensor([text])
        expected = decode(model, row, torch.tensor([len(text)]), plan, alone).completion(0)
        assert rest == expected
    ended = [rest[-1] == fmt.eos_id for rest in found if rest]
    assert 0 < sum(ended) < len(ended)


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
