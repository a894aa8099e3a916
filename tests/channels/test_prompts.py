"""Prompts of comparators are those of ordinary runs: with a system message and earlier turns."""

import pytest
from toy import build_toy, save_toy

from mtp.channels import WriteOptions, build_channel
from mtp.modeling.sampler import Sampler
from mtp.rollouts.prompt_format import PromptFormat
from mtp.tasks.base import Example

MESSAGES = [
    {"role": "system", "content": "Add one to it."},
    {"role": "user", "content": "The number is 4."},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "what is it?"},
]
EXAMPLE = Example("what is it?", "5", "4+1=5", messages=tuple(MESSAGES))


@pytest.fixture
def read(monkeypatch):
    """Conversations that prompts are made of."""
    found = []
    made = PromptFormat.conversation_ids
    monkeypatch.setattr(
        PromptFormat,
        "conversation_ids",
        lambda self, given: found.append(given) or made(self, given),
    )
    return found


@pytest.mark.parametrize("name", ["token", "block", "soft", "multiplex", "gated", "latent"])
def test_all_turns_are_read(name, tmp_path, read):
    model, fmt = build_toy(save_toy(tmp_path))
    channel = build_channel(name, {"levels": 1} if name == "latent" else {}, model)
    loss = channel.supervised_loss(model, fmt, [EXAMPLE], step=0, seed=1)
    (output,) = channel.write(model, fmt, [EXAMPLE], WriteOptions(sampler=Sampler(), seed=1))
    if output.vectors is not None:
        channel.answer_inputs(model, fmt, EXAMPLE, output, output.vectors)
    assert loss.requires_grad and len(read) >= 2
    assert all(given == MESSAGES for given in read)
