"""`generate` with `mtp_mode` and transformers' processors, criteria, streamers and pipelines."""

import threading

import pytest
import torch
from helpers import CLOSE, EOS, HEADS, PAD, tiny_model
from transformers import (
    LogitsProcessor,
    MaxTimeCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from mtp.rollouts.new_tokenizers import character_tokenizer

TOKENIZER = character_tokenizer("0123456789+=;abcdef", ["<think>", "</think>"])
PROMPT = torch.tensor([[5, 6, 7, 9]])
MODES = ["fast", "slow", "verified"]


def make(head="eavesdrop", close=CLOSE):
    """A model that mostly says 5 or 6, with a thought and an answer."""
    model = tiny_model(type=head)
    with torch.no_grad():
        model.lm_head.weight[5:7] *= 6
    model.generation_config.mtp_phases = [
        {"name": "thought", "mode": "fast", "opened_by": None},
        {"name": "answer", "mode": "slow", "opened_by": close},
    ]
    return model


def written(model, ids=PROMPT, **given):
    given = {"max_new_tokens": 20, **given}
    return model.generate(ids, **given)[:, ids.shape[1] :].tolist()


class Ban(LogitsProcessor):
    """Forbids a token, and remembers the texts that it was given."""

    def __init__(self, token):
        self.token, self.texts = token, []

    def __call__(self, input_ids, scores):
        self.texts += input_ids.tolist()
        return scores.index_fill(1, torch.tensor([self.token]), -torch.inf)


class StopAt(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("mode", ["slow", "verified"])
def test_a_processor_changes_main_as_in_stock_generate(mode):
    model = make()
    penalty = [RepetitionPenaltyLogitsProcessor(9.0)]
    mine = written(model, mtp_mode=mode, logits_processor=penalty)
    assert mine == written(model, logits_processor=penalty, do_sample=False)
    assert mine != written(model, do_sample=False)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("mode", MODES)
def test_a_processor_sees_every_slot_with_the_text_before_it(head, mode):
    model, ids = make(head), torch.tensor([[PAD, PAD, 5, 6], [8, 4, 9, 10]])
    mask = ids != PAD
    assert any(6 in row for row in written(model, ids, attention_mask=mask, mtp_mode=mode))
    ban = Ban(6)
    out = model.generate(
        ids, attention_mask=mask, mtp_mode=mode, max_new_tokens=12, logits_processor=[ban],
        return_dict_in_generate=True,
    )  # fmt: skip
    assert 6 not in out.sequences[:, 4:].flatten().tolist()
    seen = {tuple(t for t in text if t != PAD) for text in ban.texts}
    for prompt, row, slots in zip([(5, 6), (8, 4, 9, 10)], out.sequences, out.slots, strict=True):
        text = row[4:][slots >= 0].tolist()
        for end in range(len(text)):
            assert (*prompt, *(t for t in text[:end] if t != PAD)) in seen


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("mode", MODES)
def test_a_processor_sees_no_text_that_has_ended_or_holds_no_draft(head, mode):
    """Without the padding token, which no row says, a text holds what its row may say."""
    model = make(head)
    model.generation_config.update(eos_token_id=EOS, pad_token_id=PAD)
    ids = torch.tensor([[5, 6, 7, 9], [8, 4, 9, 10], [9, 9, 9, 9], [3, 4, 5, 6]])
    ban, generator = Ban(PAD), torch.Generator().manual_seed(3)
    out = written(
        model, ids, mtp_mode=mode, logits_processor=[ban], do_sample=True, temperature=3.0,
        generator=generator,
    )  # fmt: skip
    assert len({row.index(EOS) if EOS in row else len(row) for row in out}) > 1
    assert not {EOS, PAD} & {token for text in ban.texts for token in text}


@pytest.mark.parametrize("mode", MODES)
def test_a_block_is_cut_where_a_criterion_says_stop(mode):
    model = make()
    whole = written(model, mtp_mode=mode)[0]
    for token in set(whole):
        out = model.generate(
            PROMPT, mtp_mode=mode, max_new_tokens=20, stopping_criteria=[StopAt(token)],
            return_dict_in_generate=True,
        )  # fmt: skip
        assert out.sequences[0, 4:].tolist() == whole[: whole.index(token) + 1]
        assert out.finished.tolist() == [True]
    stopped = written(model, mtp_mode=mode, stopping_criteria=[MaxTimeCriteria(0.0)])
    assert stopped == [whole[:1]]


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("mode", MODES)
def test_a_streamer_gets_the_prompt_and_then_block_after_block(head, mode):
    streamer = Recorder()
    out = make(head).generate(
        PROMPT, mtp_mode=mode, max_new_tokens=20, streamer=streamer, return_dict_in_generate=True
    )
    assert streamer.ended
    assert streamer.parts[0] == PROMPT[0].tolist()
    assert sum(streamer.parts, []) == out.sequences[0].tolist()
    assert len(streamer.parts) - 1 == int(out.passes[0])
    # Main happens to accept no token of the draft vocabulary here.
    if mode == "fast" or (mode == "verified" and "drafts" not in head):
        assert max(map(len, streamer.parts[1:])) > 1


def test_text_streamers_of_transformers_print_the_text(capsys):
    model, given = make(), {"mtp_mode": "fast", "max_new_tokens": 20}
    text = TOKENIZER.decode(model.generate(PROMPT, **given)[0, 4:])
    model.generate(PROMPT, streamer=TextStreamer(TOKENIZER, skip_prompt=True), **given)
    assert capsys.readouterr().out == text + "\n"
    streamer = TextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=model.generate, args=(PROMPT,), kwargs={"streamer": streamer, **given}
    )
    thread.start()
    assert "".join(streamer) == text
    thread.join()


def test_a_batch_may_mix_modes():
    model, ids = make(), torch.tensor([[PAD, 5, 6, 7], [8, 4, 9, 10], [PAD, PAD, PAD, 9]])
    mixed = written(model, ids, attention_mask=ids != PAD, mtp_mode=MODES)
    for row, mode in enumerate(MODES):
        alone = written(model, ids[row : row + 1][ids[row : row + 1] != PAD][None], mtp_mode=mode)
        assert mixed[row][: len(alone[0])] == alone[0]


def test_fewer_slots_and_a_thought_budget_are_asked_for_by_request():
    model = make()
    given = {"max_new_tokens": 20, "return_dict_in_generate": True}
    out = model.generate(PROMPT, mtp_mode="fast", mtp_k=2, **given)
    assert int(out.slots.max()) == 2
    out = model.generate(PROMPT, mtp_mode="fast", max_thought_tokens=5, **given)
    assert out.sequences[0, 4 + 5] == CLOSE
    assert out.slots[0, 5] == -2 and (out.slots[0, 6:] <= 0).all()


def test_pipelines_decode_with_the_head():
    model = make()
    model.generation_config.update(eos_token_id=EOS, pad_token_id=PAD)
    pipe = pipeline("text-generation", model=model, tokenizer=TOKENIZER)
    given = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    for mode in MODES:
        ids = TOKENIZER("1+2=", return_tensors="pt").input_ids
        expected = TOKENIZER.decode(
            written(model, ids, mtp_mode=mode, max_new_tokens=12)[0], skip_special_tokens=True
        )
        assert pipe("1+2=", mtp_mode=mode, **given)[0]["generated_text"] == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mtp_mode": "warp"}, "mtp_mode must be one of"),
        ({"mtp_mode": ["fast", "slow"]}, r"one per row \(1\), got 2"),
        ({"mtp_k": 4}, "between 1 and the head's 3 slots, got 4"),
        ({"mtp_k": 0}, "between 1 and the head's 3 slots, got 0"),
        ({"max_thought_tokens": 0}, "max_thought_tokens must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"num_beams": 4}, "num_beams"),
        ({"penalty": 2}, "does not support .'penalty'."),
        ({"do_sample": True, "top_p": 0.0}, "top_p must be above 0"),
        ({"attention_mask": torch.zeros(1, 4)}, "row without a token"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_pass(given, message, monkeypatch):
    model = make()
    monkeypatch.setattr(type(model), "main_states", None)
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, **{"mtp_mode": "fast", **given})


def test_what_only_the_config_asks_for_is_refused_too(monkeypatch):
    model = make()
    monkeypatch.setattr(type(model), "main_states", None)
    model.generation_config.guidance_scale = 1.2
    with pytest.raises(ValueError, match="guidance_scale must be 1 with mtp_mode, got 1.2"):
        model.generate(PROMPT, mtp_mode="slow")
    model = make(close=40)
    with pytest.raises(ValueError, match="phase token 40 is not in the model's vocabulary of 23"):
        model.generate(PROMPT, mtp_mode="slow")
    with pytest.raises(ValueError, match="one sequence at a time, got 2"):
        model.generate(PROMPT.repeat(2, 1), mtp_mode="slow", streamer=Recorder())
