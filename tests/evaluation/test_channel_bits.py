"""Bits of the channel: heads that ignore or copy their message, and sums done by hand."""

import copy
import math
import random

import pytest
import torch
from helpers import tiny_model
from toy import PHASES

from mtp.evaluation import channel
from mtp.evaluation.channel import (
    Anchors,
    channel_metrics,
    mixture_gain,
    other_anchors,
    over_problems,
    sampled_anchors,
    score_blocks,
    slot_stats,
    summarise,
)
from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.phases import Phase
from mtp.modeling.sampler import Sampler
from mtp.rollouts.new_tokenizers import character_tokenizer
from mtp.rollouts.prompt_format import PromptFormat
from mtp.rollouts.rollout import DecodingConfig, Rollouts, sample
from mtp.tasks.running_sum import RunningSumConfig

TEXT = PromptFormat(character_tokenizer("0123456789+=;", ["<think>", "</think>"]), PHASES, 4)
TASK = RunningSumConfig(num_terms=2).build()
EXAMPLES = [TASK.example("test", i) for i in range(6)]
DECODING = DecodingConfig(phases=PHASES, max_new_tokens=12)


def test_a_head_that_ignores_its_message_gets_exactly_nothing_from_it():
    deaf = copy.deepcopy(tiny_model())
    for parameter in deaf.mtp_head.message.parameters():
        parameter.data.zero_()
    found = channel_metrics(deaf, TEXT, EXAMPLES, DECODING, temperature=1.0, num_others=3)
    for name in ("same", "other", "zero"):
        assert found[f"channel_{name}_bits"] == 0.0
        assert set(found[f"channel_{name}_bits_by_slot"]) <= {0.0, None}
    assert found["channel_least_bits"] == pytest.approx(0.0, abs=1e-9)
    used = channel_metrics(tiny_model(), TEXT, EXAMPLES, DECODING, temperature=1.0, num_others=3)
    assert used["channel_other_bits"] > 0.01
    assert used["channel_least_bits"] <= used["channel_limit_bits"]


@torch.no_grad()
def test_scores_are_those_under_which_the_tokens_were_sampled():
    model = tiny_model(type="eavesdrop that recalls")
    seeds = torch.arange(6)
    options = DecodeOptions(sampler=Sampler(temperature=0.7), max_new_tokens=12, seeds=seeds)
    anchors = sampled_anchors(model, TEXT, EXAMPLES, options)
    out = sample(model, TEXT, EXAMPLES, TEXT.plan("fast"), options).out
    output = model.output_layers()[1]
    own, entropy = slot_stats(model, anchors, anchors.context, output, options.sampler, "auto")
    assert float(own.sum()) == pytest.approx(float(out.logprobs[out.slots > 0].sum()), abs=1e-3)
    assert int(anchors.kept.sum()) == int((out.slots > 0).sum())
    assert bool((entropy[anchors.kept] > 0).all())
    assert bool((entropy[~anchors.kept] == 0).all())


def test_a_head_that_copies_its_message_gets_all_of_it():
    """Sixteen messages name two tokens of four each: 4 bits, a quarter of them by chance."""
    error, number = 1e-9, 4
    contents = torch.cartesian_prod(torch.arange(number), torch.arange(number))
    anchors = Anchors(
        context=[1.0 + contents],
        slot_inputs=torch.zeros(16, 2, dtype=torch.long),
        targets=contents,
        kept=torch.ones(16, 2, dtype=torch.bool),
        problems=torch.arange(16),
        entropy=torch.full((16,), math.log(8)),
    )

    def scored(context):
        is_said = context[0] - 1 == contents
        logprob = torch.where(is_said, math.log(1 - error), math.log(error / 3)).double()
        logprob = torch.where(context[0] == 0, -math.log(number), logprob)
        return logprob, torch.full((16, 2), math.log(2), dtype=torch.float64)

    found = summarise(anchors, score_blocks(scored, anchors, num_others=15, seed=1))
    assert found["channel_least_bits"] == pytest.approx(4.0, abs=1e-6)
    assert found["channel_least_bits_by_slot"] == pytest.approx([2.0, 2.0], abs=1e-6)
    assert found["channel_limit_bits"] == pytest.approx(4.0)
    assert found["channel_zero_bits"] == pytest.approx(4.0, abs=1e-6)
    # Of the 15 others, 12 name another token in a slot.
    per_slot = 12 / 15 * math.log2((1 - error) / (error / 3))
    assert found["channel_same_bits"] == pytest.approx(2 * per_slot)
    assert found["channel_other_bits"] == pytest.approx(2 * per_slot)
    assert found["block_entropy_bits"] == pytest.approx(3 + 1 + 1)
    assert found["block_entropy_bits_by_slot"] == pytest.approx([3, 1, 1])
    assert found["token_entropy_bits"] == pytest.approx(3)
    assert found["channel_coverage"] == 1.0


def test_slots_of_the_mixture_add_up_to_the_block():
    """Own: 1/2 * 1/2. Other: 1/4 * 1. Mixture of slot 1: 3/8; of the block: 1/4."""
    own = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).double().log()
    others = torch.tensor([[[0.25, 1.0]], [[1.0, 1.0]]]).double().log()
    found = mixture_gain(own, others, torch.tensor([[True], [False]]))
    assert found[0].tolist() == pytest.approx([math.log(0.5 / 0.375), math.log(0.375 / 0.5)])
    assert bool(found[1].isnan().all()), "no other message"


def test_other_messages_are_of_the_class_and_of_other_problems():
    labels, problems = [7, 7, 7, 8, 7], [0, 0, 1, 1, 2]
    chosen = other_anchors(labels, problems, 3, random.Random(1)).tolist()
    assert [sorted(row) for row in chosen] == [
        [-1, 2, 4], [-1, 2, 4], [0, 1, 4], [-1, -1, -1], [0, 1, 2],
    ]  # fmt: skip


def test_means_are_over_problems():
    nats = math.log(2) * torch.tensor([1.0, 3.0, 4.0, math.nan]).double()
    center, (low, high) = over_problems(nats, torch.tensor([0, 0, 1, 2]))
    assert (center, low, high) == (pytest.approx(3), 0.0, pytest.approx(3 + 12.7062))
    assert over_problems(nats[3:], torch.tensor([2])) == (None, None)


def test_equal_segments_keep_their_own_problems(monkeypatch):
    """Two segments of the first problem are the same text; the third is the other problem's."""
    batch = sample(tiny_model(), TEXT, EXAMPLES[:2], TEXT.plan("fast"), DecodeOptions(
        sampler=Sampler(temperature=1.0), max_new_tokens=12, seeds=torch.arange(2)
    ))  # fmt: skip
    twice = Rollouts(
        batch.examples, 1, [batch.prompts[i] for i in (0, 0, 1)],
        batch.out.select([0, 0, 1]), [0, 0, 1], [batch.memories[i] for i in (0, 0, 1)],
    )  # fmt: skip
    counts = [
        len(sampled_anchors_of(monkeypatch, batch.of_examples([number]))) for number in range(2)
    ]
    found = sampled_anchors_of(monkeypatch, twice)
    assert found.problems.bincount().tolist() == [2 * counts[0], counts[1]]


def sampled_anchors_of(monkeypatch, batch):
    """The anchors of these rollouts."""
    monkeypatch.setattr(channel, "sample", lambda *given: batch)
    options = DecodeOptions(sampler=Sampler(temperature=1.0), max_new_tokens=12)
    with torch.no_grad():
        return sampled_anchors(tiny_model(), TEXT, batch.examples, options)


def test_heads_that_read_more_than_a_message_are_refused():
    model = tiny_model(type="eagle3")
    with pytest.raises(ValueError, match="got head.type=eagle3, which also reads main's features"):
        channel_metrics(model, TEXT, EXAMPLES, DECODING, temperature=1.0)


def test_rollouts_without_a_token_of_the_head_are_refused():
    slow = {"thought": Phase(opened_by="<think>"), "answer": Phase(opened_by="</think>")}
    text = PromptFormat(TEXT.tokenizer, slow, 4)
    with pytest.raises(ValueError, match="no block of these rollouts keeps one"):
        channel_metrics(tiny_model(), text, EXAMPLES, DECODING, temperature=1.0)
