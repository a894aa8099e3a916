"""Shaping terms apart from the outcome, time limits, and measures of thoughts, worked by hand."""

import logging
import time
from collections import Counter
from copy import copy
from dataclasses import replace

import pytest
import torch
from mtp_kernels import linear_logprob

from mtp.evaluation.evaluate import budget_metrics, thought_tokens_per_pass
from mtp.groups import Groups
from mtp.hub.build import ModelConfig, build_model
from mtp.modeling.heads import HeadConfig
from mtp.modeling.phases import Phase
from mtp.modeling.records import Decoded
from mtp.modeling.segments import SegmentSettings
from mtp.reports.tables import passes_text
from mtp.rollouts import legibility
from mtp.rollouts.advantage import GroupRewards, group_std
from mtp.rollouts.legibility import (
    jensen_shannon,
    mean_nats_of_rollouts,
    reference_metrics,
    thought_nats,
    thought_passes,
    unigram_drift,
)
from mtp.rollouts.reward import RewardConfig, score
from mtp.rollouts.rollout import DecodingConfig, Rollouts
from mtp.steps import extra_rows, function_metrics
from mtp.tasks.base import Attempt, Example, Scored, Task
from mtp.tasks.reward_functions import RewardFunction
from mtp.tasks.running_sum import RunningSumConfig
from mtp.tasks.weighted_rewards import WeightedRewards

TASK = RunningSumConfig().build()
DECODING = DecodingConfig(
    phases={
        "thought": Phase(mode="fast", opened_by="<think>"),
        "answer": Phase(mode="slow", opened_by="</think>"),
    },
    max_new_tokens=12,
)
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
torch.manual_seed(0)
MODEL, TEXT = build_model(
    ModelConfig(config={**SHAPE, **HEADS, "max_position_embeddings": 64}),
    HeadConfig(num_slots=2, hidden_size=8, num_attention_heads=2, intermediate_size=8),
    DECODING,
    TASK,
)
EXAMPLE = Example("10+20+30=", "60", "10+20=30;30+30=60")


def written(*completions: list[int]) -> Rollouts:
    """Rollouts of one group, whose blocks hold three tokens."""
    lengths = torch.tensor([len(ids) for ids in completions])
    width = int(lengths.max())
    tokens = torch.tensor([ids + [TEXT.pad_id] * (width - len(ids)) for ids in completions])
    at = torch.arange(width)
    slots = torch.where(at < lengths[:, None], at % 3, -1)
    finished = torch.tensor([ids[-1] == TEXT.eos_id for ids in completions])
    out = Decoded(tokens, slots, torch.zeros(tokens.shape), lengths, -(-lengths // 3), finished)
    prompts = [TEXT.prompt_ids(EXAMPLE.prompt)] * len(completions)
    return Rollouts([EXAMPLE], len(completions), prompts, out)


def ids(text: str) -> list[int]:
    return TEXT.tokenizer.encode(text, add_special_tokens=False)


RIGHT = TEXT.completion_ids("30", "60")  # 3 + </think> is three tokens, the answer and <eos> three
WRONG = TEXT.completion_ids("3", "61")
ENDLESS = ids("3+3+3+3+3+3+")


def test_shaping_terms_by_hand():
    config = RewardConfig(pass_cost=0.1, token_cost=0.01, format_cost=0.5, overlong_buffer=8)
    rewards = score(TASK, TEXT, written(RIGHT, WRONG, ENDLESS), config, max_new_tokens=12)
    assert rewards.outcomes.tolist() == [[1.0, 0.0, 0.0]]
    expected = {
        "passes": [-0.2, -0.2, -0.4],
        "tokens": [-0.06, -0.05, -0.12],
        "format": [0.0, 0.0, -0.5],
        "overlong": [-2 / 8, -1 / 8, -1.0],  # lengths 6, 5 and 12 against 12 - 8
    }
    assert rewards.terms.keys() == expected.keys()
    for name, values in expected.items():
        assert rewards.terms[name][0].tolist() == pytest.approx(values), name
    assert torch.allclose(rewards.total, rewards.outcomes + sum(rewards.terms.values()))


def test_a_right_answer_after_a_longer_thought_than_the_budget_counts_as_wrong():
    long = TEXT.completion_ids("30+3", "60")  # its thought is five tokens, two passes of three
    batch = written(RIGHT, long, WRONG)
    assert thought_passes(batch, TEXT).tolist() == [1.0, 2.0, 1.0]
    for budget, outcomes in ((0, [1.0, 1.0, 0.0]), (1, [1.0, 0.0, 0.0]), (2, [1.0, 1.0, 0.0])):
        rewards = score(TASK, TEXT, batch, RewardConfig(thought_budget=budget), max_new_tokens=12)
        assert rewards.outcomes.tolist() == [outcomes]
        assert rewards.total.tolist() == [outcomes] and not rewards.terms
    figures = budget_metrics([batch], TASK, TEXT, (1, 2))
    assert figures["fast_thought_passes"] == pytest.approx(4 / 3)
    assert figures["accuracy_by_budget"] == pytest.approx([1 / 3, 2 / 3])


def test_a_verified_pass_of_a_thought_holds_the_drafts_that_main_accepted():
    """Five tokens of thought in two passes: two drafts and main's own, a draft and the closer."""
    batch = written(TEXT.completion_ids("30+3", "60"))
    length = int(batch.out.lengths)
    accepted = torch.tensor([[1, 2, 0, 1, 0] + [0] * (length - 5)])
    slots = torch.zeros_like(accepted)
    batch.out = replace(batch.out, slots=slots, accepted=accepted)
    assert thought_passes(batch, TEXT).tolist() == [2.0]
    assert thought_tokens_per_pass([batch], TEXT) == 2.5
    for budget, outcome in ((1, 0.0), (2, 1.0)):
        rewards = score(TASK, TEXT, batch, RewardConfig(thought_budget=budget), max_new_tokens=12)
        assert rewards.outcomes.tolist() == [[outcome]]
    assert passes_text(batch, 0, TEXT) == "30+|3</think>|6|0|<eos>"


def test_credits_are_means_of_later_outcomes_where_problems_share_a_memory():
    """One project of two problems, one rollout of each: right, then wrong at a cost of 0.5."""
    batch = written(RIGHT, ENDLESS)
    batch.examples, batch.group_size = [EXAMPLE, replace(EXAMPLE, place=1)], 1
    shared = copy(TEXT)
    shared.segments = SegmentSettings(max_segments=2, memory_scope="shared")
    config = RewardConfig(format_cost=0.5)
    alone = score(TASK, TEXT, batch, config, max_new_tokens=12)
    assert alone.outcomes.tolist() == alone.credits.tolist() == [[1.0], [0.0]]
    assert alone.total.tolist() == [[1.0], [-0.5]]
    rewards = score(TASK, shared, batch, config, max_new_tokens=12)
    assert rewards.outcomes.tolist() == [[1.0], [0.0]]
    assert rewards.credits.tolist() == [[0.5], [0.0]]
    assert rewards.total.tolist() == [[0.25], [-0.5]]


def test_no_shaping_term_makes_an_unsolved_group_teach():
    config = RewardConfig(pass_cost=0.1, format_cost=0.5)
    rewards = score(TASK, TEXT, written(WRONG, ENDLESS), config, max_new_tokens=12)
    assert rewards.total.std() > 0.1
    given = GroupRewards(rewards.total, rewards.outcomes, rewards.total)
    assert group_std(given).tolist() == [[0.0, 0.0]]


def test_the_legibility_cost_is_the_mean_nats_of_a_rollouts_own_thought():
    batch = written(RIGHT, WRONG)
    rewards = score(
        TASK, TEXT, batch, RewardConfig(legibility_cost=2.0), max_new_tokens=12, reference=MODEL
    )
    for row, thought in enumerate((ids("30") + ids("</think>"), ids("3") + ids("</think>"))):
        text = torch.tensor([batch.prompts[row] + thought])
        with torch.no_grad():
            logprob = MODEL(text).logits.log_softmax(-1)[0, -len(thought) - 1 : -1]
        nats = -logprob.gather(-1, torch.tensor(thought)[:, None]).mean()
        assert rewards.terms["legibility"][0, row].item() == pytest.approx(
            -2 * float(nats), rel=1e-4
        )


def test_reference_figures_by_slot_add_up_to_the_mean():
    batch = written(RIGHT, WRONG)
    measured = thought_nats(batch, TEXT, MODEL)
    assert measured.rollouts.tolist() == [0, 0, 0, 1, 1]
    assert measured.slots.tolist() == [0, 1, 2, 0, 1]
    metrics = reference_metrics([thought_nats(batch, TEXT, MODEL)], 3)
    by_slot = [metrics[f"reference_nats_slot_{slot}"] for slot in range(3)]
    mean = (2 * by_slot[0] + 2 * by_slot[1] + by_slot[2]) / 5
    assert metrics["reference_nats_per_token"] == pytest.approx(mean, rel=1e-5)
    assert len(mean_nats_of_rollouts(batch, TEXT, MODEL)) == 2


def test_nats_are_computed_with_the_implementation_that_is_asked_for(monkeypatch):
    asked = []

    def scored(*given, impl, **options):
        asked.append(impl)
        return linear_logprob(*given, impl=impl, **options)

    monkeypatch.setattr(legibility, "linear_logprob", scored)
    costs = RewardConfig(legibility_cost=2.0)
    given = {"max_new_tokens": 12, "reference": MODEL}
    score(TASK, TEXT, written(RIGHT, WRONG), costs, impl="reference", **given)
    score(TASK, TEXT, written(RIGHT, WRONG), costs, **given)
    assert asked == ["reference", "auto"]


def test_drift_by_hand():
    assert jensen_shannon(Counter("aab"), Counter("aabaab")) == pytest.approx(0.0)
    assert jensen_shannon(Counter("a"), Counter("b")) == pytest.approx(1.0)
    # middle (3/4, 1/4): half of log2(4/3), half of (1/2 log2(2/3) + 1/2 log2(2))
    assert jensen_shannon(Counter("a"), Counter("ab")) == pytest.approx(0.3112781, rel=1e-5)
    solved = TEXT.completion_ids(EXAMPLE.thought, EXAMPLE.answer)
    assert unigram_drift([written(solved)], TEXT) == pytest.approx(0.0)
    assert unigram_drift([written(RIGHT)], TEXT) > 0.1


def test_a_reward_that_hangs_is_worth_nothing_and_is_reported_once(caplog):
    def reward(call):
        while call.attempt.answer == "loop":
            try:
                time.sleep(0.001)
            except Exception:
                continue
        return 1.0

    functions = [RewardFunction("slow", reward, float)]
    verifier = WeightedRewards(functions, seconds=0.05)
    with caplog.at_level(logging.WARNING):
        scored = verifier([Attempt(EXAMPLE, answer) for answer in ("loop", "loop", "60")])
    assert [one.score for one in scored] == [0.0, 0.0, 1.0]
    assert len(caplog.records) == 1
    assert "slow took over task.reward_seconds=0.05" in caplog.text
    with pytest.raises(ValueError, match="task.reward_seconds must be above 0"):
        WeightedRewards(functions, seconds=0)


class Graded(Task):
    """A task whose score is the share of the answer's digits, with what it was given."""

    name = "graded"

    def __init__(self):
        self.given = []

    def size(self, split):
        return 1

    def example(self, split, index):
        return EXAMPLE

    def scores(self, attempts):
        self.given += attempts
        return [
            Scored(len(a.answer) / 4, parts={"length": len(a.answer), "other": None},
                   metrics=[("digits", len(a.answer))], extra={"said": a.answer})
            for a in attempts
        ]  # fmt: skip


def test_the_raw_score_is_a_term_of_the_reward():
    """Rewards get the whole completion's tokens; a rollout without an answer is not scored."""
    task, config = Graded(), RewardConfig(score_weight=0.5)
    batch = written(RIGHT, ENDLESS, TEXT.completion_ids("3", "6161"))
    rewards = score(task, TEXT, batch, config, max_new_tokens=12)
    assert rewards.outcomes.tolist() == [[0.0, 0.0, 1.0]]
    assert rewards.total.tolist() == [[0.25, 0.0, 1.5]]
    assert [a.completion_ids for a in task.given] == [RIGHT, TEXT.completion_ids("3", "6161")]
    assert [one and one.score for one in rewards.scored] == [0.5, None, 1.0]
    groups = Groups(batch, rewards, [[0]], 0.0)
    assert function_metrics([one for one in rewards.scored if one is not None]) == {
        "rewards/length/mean": 3.0,
        "rewards/length/std": 1.0,
        "rewards/digits": 3.0,
    }
    row = {"prompt": EXAMPLE.prompt, "other": None}
    assert extra_rows(groups) == [
        {**row, "score": 0.5, "length": 2, "said": "60"},
        {**row, "score": 1.0, "length": 4, "said": "6161"},
    ]
