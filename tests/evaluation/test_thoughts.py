"""Records of rollouts: scores of tokens, passes, phases, steps and mistakes, by hand."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import CLOSE, EOS, PAD, rollouts, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toy import build_toy, save_toy
from transformers import PreTrainedTokenizerFast

from mtp.evaluation.evaluate import evaluate, wrong_thoughts
from mtp.evaluation.thoughts import (
    _texts,
    choose,
    first_mistake,
    mistake,
    outcome_rows,
    phase_starts,
    thought_rows,
)
from mtp.evaluation.token_scores import TokenScores, token_scores
from mtp.modeling.phases import PhasePlan
from mtp.reports.page.slots import slot_means
from mtp.rollouts.rollout import DecodingConfig, Rollouts, pass_starts
from mtp.rollouts.tokenization import text_pieces
from mtp.tasks.base import Example, Step
from mtp.tasks.running_sum import RunningSumConfig


class Format:
    """The two settings of a text format that scores depend on."""

    block_size, pad_id = 4, PAD


@pytest.fixture(scope="module")
def sampled():
    model = tiny_model()
    prompts, out, _ = rollouts(model)
    return model, Rollouts([Example("", "")] * 4, 1, prompts, out)


@pytest.mark.parametrize("pieces", [8192, 30])
def test_scores_are_those_of_the_distributions_that_tokens_were_sampled_from(
    sampled, pieces, monkeypatch
):
    """A replay gives the entropy and likeliest tokens of each sampled token's own distribution."""
    monkeypatch.setattr("mtp.evaluation.token_scores.TOKENS_AT_ONCE", pieces)
    model, batch = sampled
    scores = token_scores(model, batch, [0, 1, 2, 3], Format(), use_head=True, reference=model)
    found = {0: 0, 1: 0}
    for row, score in enumerate(scores):
        text = torch.tensor([batch.prompts[row] + batch.out.completion(row)])
        with torch.no_grad():
            rows = model.replay(text)
            main = rows.main_output.logits(rows.main_hidden[0]).log_softmax(-1)
        start = len(batch.prompts[row])
        for token, slot in enumerate(batch.out.slots[row, : int(batch.out.lengths[row])].tolist()):
            id, logprob = int(text[0, start + token]), float(batch.out.logprobs[row, token])
            by_id = dict(score.alternatives[token])
            if id in by_id:
                found[min(slot, 1)] += 1
                assert by_id[id] == pytest.approx(logprob, abs=1e-4)
            else:
                assert logprob <= min(by_id.values()) + 1e-4
            expected = main[start + token - 1]
            assert score.reference[token] == pytest.approx(float(expected[id]), abs=1e-4)
            assert score.reference_likeliest[token] == int(expected.argmax())
            if slot == 0:
                entropy = -float((expected.exp() * expected).sum())
                assert score.entropy[token] == pytest.approx(entropy, abs=1e-4)
                assert score.main[token] is None and score.message[token] is None
            else:
                assert score.main[token] == pytest.approx(float(expected[id]), abs=1e-4)
                assert score.main_likeliest[token] == int(expected.argmax())
    assert min(found.values()) > 3


def test_the_message_matters_to_a_head_that_reads_it_and_not_to_one_that_cannot(sampled):
    model, batch = sampled
    used = [
        v for s in token_scores(model, batch, [0, 1], Format(), use_head=True) for v in s.message
    ]
    assert max(abs(v) for v in used if v is not None) > 1e-3
    deaf = copy.deepcopy(model)
    for parameter in deaf.mtp_head.message.parameters():
        parameter.data.zero_()
    scores = token_scores(deaf, batch, [0, 1], Format(), use_head=True)
    assert {v for s in scores for v in s.message if v is not None} == {0.0}


def test_passes_and_phases_of_each_mode():
    plan = PhasePlan(keep=[4, 1], opened_by=[None, CLOSE], eos_ids=[EOS])
    ids, slots = [5, 6, 7, 8, CLOSE, 9, EOS], [0, 1, 2, 0, 1, 0, 0]
    assert pass_starts(slots, [0] * 7) == [0, 3, 5, 6]
    assert phase_starts(ids, plan) == [(0, 0), (5, 1)]
    assert phase_starts([5, CLOSE], plan) == [(0, 0)], "nothing is written after it"
    # Verified: main accepts two drafts and adds a token; then none; then a draft that closes, and
    # main's own token after it in the same pass.
    accepted = [1, 2, 0, 0, 1, 0, 0]
    assert pass_starts([0] * 7, accepted) == [0, 3, 4, 6]


def test_a_wrong_thought_leaves_room_for_the_answer(tmp_path):
    """A thought after which no answer fits would count as one that gives no right answer."""
    _, text = build_toy(save_toy(tmp_path))
    short, other = Example("1+1=", "2", "1+1=2"), Example("3+3=", "6", "3+3=6")
    longer = Example("2+2=", "4", "2+2=4;1+1=2;2+2=4")
    task = RunningSumConfig().build()
    examples = [short, longer, other]
    room = len(text.completion_ids(other.thought, other.answer))
    assert room < len(text.completion_ids(longer.thought, longer.answer))
    found = wrong_thoughts(examples, [], task, text, room)
    given = [text.thought_ids(example.thought) for example in (other, other, short)]
    assert found == given
    assert wrong_thoughts(examples, [], task, text, room - 1) is None


@pytest.mark.parametrize("mode", ["fast", "slow", "verified"])
def test_as_many_passes_begin_as_the_sampler_counted(tmp_path, mode):
    from mtp.evaluation.evaluate import decode_all, held_out

    model, text = build_toy(save_toy(tmp_path))
    task = RunningSumConfig().build()
    decoding = DecodingConfig(phases=text.phases, max_new_tokens=20)
    (batch,) = decode_all(model, text, held_out(task, 6), mode, decoding, 8)
    for row in range(6):
        starts = batch.pass_starts(row)
        assert len(starts) == int(batch.out.passes[row])


def test_rollouts_of_an_evaluation_as_records(tmp_path):
    """Texts of byte-level tokens join to the whole; the first problems and the wrong ones stay."""
    model, text = build_toy(save_toy(tmp_path))
    task = RunningSumConfig().build()
    decoding = DecodingConfig(phases=text.phases, max_new_tokens=12)
    _, decoded = evaluate(
        model, text, task, decoding, num_problems=6, batch_size=4, use_head=True, controls=False
    )
    lengths = [len(b.completion(r)) for b in decoded["fast"] for r in range(len(b))]
    given = {"stage": "rl", "max_tokens": sum(lengths[:4]) + 1}
    rows = thought_rows(model, decoded, task, text, ends_stage=True, reference=model, **given)
    assert [row["problem"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows:
        batch = decoded["fast"][row["problem"] // 4]
        ids = batch.completion(row["problem"] % 4)
        assert "".join(row["tokens"]) == text.tokenizer.decode(ids)
        columns = ("tokens", "slots", "logprob", "entropy", "reference")
        assert {len(row[name]) for name in columns} == {len(ids)}
        assert row["right"] is False and row["mistake"]["kind"] in ("step", "missing")
        heads = [slot > 0 for slot in row["slots"]]
        assert [value is not None for value in row["agrees"]] == heads
    most = 8 * (sum(lengths[:2]) + 1)
    few = thought_rows(model, decoded, task, text, ends_stage=False, stage="rl", max_tokens=most)
    assert [row["problem"] for row in few] == [0, 1, 2]
    assert "reference" not in few[0]
    assert thought_rows(model, decoded, task, text, ends_stage=True, stage="rl", max_tokens=0) == []
    outcomes = outcome_rows(decoded, task, text, "rl")
    assert [(row["mode"], row["right"]) for row in outcomes] == [
        ("slow", "0" * 6),
        ("fast", "0" * 6),
    ]
    assert outcomes[0]["problems"] == outcomes[1]["problems"]


def test_agreement_is_of_tokens_and_not_of_their_texts():
    """A token's own text lacks the space that it has within a text."""
    core = Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1, "</s>": 2}, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    scores = TokenScores.empty(3, has_reference=False)
    scores.main_likeliest = [None, 1, 0]
    columns = _texts(scores, [0, 1, 1], SimpleNamespace(tokenizer=tokenizer))
    assert columns["main_likeliest"] == [None, "cat", "the"]
    assert text_pieces(tokenizer, [0, 1, 1]) == ["the", " cat", " cat"]
    row = {
        "stage": "rl", "ends_stage": True, "mode": "fast", "tokens": ["the", " cat", " cat"],
        "slots": [0, 1, 2], "phases": [[0, "thought", "fast"]], "agrees": columns["agrees"],
    }  # fmt: skip
    (found,) = slot_means([row], [])
    assert found["agreement"] == [None, 1.0, 0.0]


def test_wrong_rollouts_are_kept_before_right_ones(monkeypatch):
    right = [True, True, True, False, True, False, True]
    monkeypatch.setattr("mtp.evaluation.thoughts._right", lambda b, row, t, f: right[row])

    class Out:
        lengths = torch.full((7,), 10)

    class Batch:
        out = Out()

        def __len__(self):
            return 7

        def total(self, values):
            return values

    assert choose([Batch()], None, None, 40, True) == [0, 1, 3, 5]
    assert choose([Batch()], None, None, 60, True) == [0, 1, 2, 3, 5, 4]
    assert choose([Batch()], None, None, 160, False) == [0, 1]


def test_the_first_mistake_of_a_step_is_the_character_that_differs():
    assert first_mistake(Step(10, 19, False, "93+63=156"), "93+63=162") == 17
    assert first_mistake(Step(0, 9, True, "93+63=156"), "93+63=156") is None
    assert first_mistake(Step(0, 4, False, "1+1=2"), "1+1=") == 4, "it ends too early"
    assert first_mistake(Step(3, 8, False), "1+1=3") == 7, "complete with its last character"
    assert first_mistake(Step(3, 8, True), "1+1=2") is None


def test_the_first_mistake_of_a_rollout():
    example, phases = Example("1+1=", "12"), [[0, "thought", "fast"], [3, "answer", "slow"]]
    tokens = ["1+1", "=3", "</think>", " 1", "3", "<eos>"]
    wrong = ((0, 2, False, "1+1=2"), 1)
    found = mistake(example, "13", False, [wrong], tokens, phases)
    assert found == {"token": 1, "kind": "step", "written": "1+1=3", "expected": "1+1=2"}
    fine = ((0, 2, True, None), -1)
    found = mistake(example, "13", False, [fine], tokens, phases)
    assert found == {"token": 4, "kind": "answer", "written": "13", "expected": "12"}
    assert mistake(example, None, False, [fine], tokens, phases)["kind"] == "missing"
    assert mistake(example, "12", True, [fine], tokens, phases) is None


def test_steps_of_a_running_sum_have_the_solvers_step_at_their_place():
    task = RunningSumConfig().build()
    example = Example("93+63+48=", "204", "93+63=156;156+48=204")
    steps = task.steps(example, "93+63=162;162+48=210;1")
    assert [(s.start, s.end, s.is_true, s.expected) for s in steps] == [
        (0, 9, False, "93+63=156"),
        (10, 20, True, "156+48=204"),
        (21, 22, False, None),
    ]
    assert task.true_steps("93+63=162;162+48=210;1") == (1, 3)
