"""Options of `generate` with `mtp_mode`: each is supported or refused by name, none ignored."""

import inspect

import pytest
import torch
from helpers import CLOSE, EOS, PAD, tiny_model
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    MinNewTokensLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
)

from mtp.modeling.modeling_mtp import LlamaMTPForCausalLM
from mtp.modeling.requests import OPTIONS, Kind
from mtp.modeling.versions import VERSION
from mtp.rollouts.new_tokenizers import character_tokenizer

TOKENIZER = character_tokenizer("0123456789+=;abcdef", ["<think>", "</think>"])
PROMPT = torch.tensor([[5, 6, 7, 9]])
PADDED = torch.tensor([[PAD, PAD, 5, 6], [8, 4, 9, 10]])
MODES = ["fast", "slow", "verified"]
PHASES = [
    {"name": "thought", "mode": "fast", "opened_by": None},
    {"name": "answer", "mode": "slow", "opened_by": CLOSE},
]


def make(**settings):
    model = tiny_model(**settings)
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    model.generation_config.mtp_phases = PHASES
    return model


def written(model, ids=PROMPT, **given):
    given = {"mtp_mode": "fast", "max_new_tokens": 20, **given}
    return model.generate(ids, **given)[:, ids.shape[1] :].tolist()


def routes(model, name, value):
    """A call that asks for an option as an argument, in a given config, in the model's config."""
    given, own = GenerationConfig(), GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    own.mtp_phases = PHASES
    yield {name: value}
    setattr(given, name, value)
    yield {"generation_config": given}
    model.generation_config = own
    setattr(own, name, value)
    yield {}


def test_every_field_of_transformers_is_classified():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    arguments = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    others = {"input_ids", "attention_mask", "tokenizer", "assistant_tokenizer"}
    assert fields | arguments <= set(OPTIONS), "say in requests_mtp.OPTIONS what becomes of it"
    if VERSION >= (5, 23):  # older versions have fewer
        assert set(OPTIONS) <= fields | arguments | others | {"trust_remote_code"}


@pytest.mark.parametrize("name", [n for n, o in OPTIONS.items() if o.kind is not Kind.SUPPORTED])
def test_what_asks_for_nothing_is_accepted_and_the_rest_honoured_or_refused(name, monkeypatch):
    model, option = make(), OPTIONS[name]
    plain = written(model, max_new_tokens=4)
    for value in {None: 0, **dict.fromkeys(option.neutral)}:
        for given in routes(model, name, value):
            assert written(model, max_new_tokens=4, **given) == plain
    if option.kind is Kind.PROCESSED:
        return
    if option.kind is Kind.IDLE:
        assert written(model, max_new_tokens=4, **{name: 7}) == plain
        return
    samples = {"do_sample": True} if option.kind is Kind.SAMPLING else {}
    if samples:
        assert written(model, max_new_tokens=4, **{name: 0.5}) == plain
    monkeypatch.setattr(type(model), "main_states", None)
    for given in routes(model, name, 7):
        where = "" if name in given else "generation_config."
        with pytest.raises(ValueError, match=rf"^{where}{name} must be .* with mtp_mode, got 7; "):
            written(model, **given, **samples)


STOCKS_OWN = {
    "min_length": 17,
    "min_new_tokens": 9,
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 8,
    "exponential_decay_length_penalty": (3, 1.5),
    "repetition_penalty": 9.0,
    "no_repeat_ngram_size": 2,
    "remove_invalid_values": True,
    "bad_words_ids": [[5], [6, 6]],
    "sequence_bias": [[[6], -90.0], [[5, 5], -90.0]],
    "suppress_tokens": [5, 6],
    "begin_suppress_tokens": [5, 6],
}


def test_what_processors_do_is_tested_for_each():
    assert set(STOCKS_OWN) == {n for n, o in OPTIONS.items() if o.kind is Kind.PROCESSED}


@pytest.mark.parametrize("name", STOCKS_OWN)
def test_what_processors_do_is_that_of_stock_generate(name):
    model = make()
    with torch.no_grad():
        model.lm_head.weight[5:7] *= 6
        model.lm_head.weight[EOS] *= 4
    ids, mask = PADDED, PADDED != PAD
    if name == "forced_bos_token_id":
        ids, mask = ids[1:, :1], mask[1:, :1]  # it is the second token of a text
    given = {"attention_mask": mask, "max_new_tokens": 20, name: STOCKS_OWN[name]}
    stock = model.generate(ids, mtp_mode="stock", **given)
    for mode in ("slow", "verified"):
        assert torch.equal(model.generate(ids, mtp_mode=mode, **given), stock)
    fast = model.generate(ids, mtp_mode="fast", **given)
    del given[name]
    if name != "remove_invalid_values":
        assert not torch.equal(model.generate(ids, mtp_mode="slow", **given), stock)
        assert not torch.equal(model.generate(ids, mtp_mode="fast", **given), fast)


@pytest.mark.parametrize("least", [0, 2])
def test_min_new_tokens_overrides_a_configs_min_length(least):
    model = make()
    model.generation_config.min_length = 20
    with torch.no_grad():
        model.lm_head.weight[EOS] = model.lm_head.weight[5] * 3
    stock = model.generate(PROMPT, max_new_tokens=30, mtp_mode="stock", min_new_tokens=least)
    assert stock.shape[1] < 20
    for mode in ("slow", "verified"):
        out = model.generate(PROMPT, max_new_tokens=30, mtp_mode=mode, min_new_tokens=least)
        assert torch.equal(out, stock)


def test_the_length_that_is_asked_for_counts():
    model = make()
    with torch.no_grad():
        model.lm_head.weight[EOS] = 0

    def length(**given):
        return model.generate(PROMPT, mtp_mode="fast", **given).shape[1]

    assert length(max_length=40) == 40
    assert length(max_length=40, max_new_tokens=3) == 7
    assert length(generation_config=GenerationConfig(max_length=11)) == 11
    assert length() == 4 + 256
    model.generation_config.max_new_tokens = 6
    assert length() == 10 and length(max_length=9) == 9
    with pytest.raises(ValueError, match="max_length must be above the 4 tokens of the prompts"):
        length(max_length=4)
    with pytest.raises(ValueError, match="max_length=9 must be left out where a text has several"):
        model.generation_config.mtp_phases = SUMMARIES
        model.generate_segments(PROMPT, tokenizer=TOKENIZER, max_segments=2, max_length=9)
    with pytest.raises(ValueError, match="min_new_tokens must be left out where a text has sever"):
        model.generate_segments(PROMPT, tokenizer=TOKENIZER, max_segments=2, min_new_tokens=9)


SUMMARIES = [
    {"name": "thought", "mode": "fast", "opened_by": 3},
    {"name": "summary", "mode": "slow", "opened_by": 17, "closed_by": 18},
    {"name": "answer", "mode": "slow", "opened_by": CLOSE},
]


@pytest.mark.parametrize("mode", MODES)
def test_stop_strings_and_max_time_stop(mode):
    model = make()
    whole = written(model, mtp_mode=mode)[0]
    token = whole[5]
    text = TOKENIZER.decode([token])
    stopped = written(model, mtp_mode=mode, stop_strings=[text], tokenizer=TOKENIZER)
    assert stopped == [whole[: whole.index(token) + 1]]
    with pytest.raises(ValueError, match="stop_strings=.* needs tokenizer="):
        written(model, mtp_mode=mode, stop_strings=text)
    assert written(model, mtp_mode=mode, max_time=1e-9) == [whole[:1]]


def test_a_given_config_is_filled_up_by_the_models():
    model = make()
    whole = written(model)[0]
    model.generation_config.eos_token_id = [EOS, whole[2]]
    model.generation_config.num_beams = None
    assert written(model, generation_config=GenerationConfig(do_sample=False)) == [whole[:3]]
    config = GenerationConfig(eos_token_id=whole[1])
    assert written(model, generation_config=config) == [whole[: whole.index(whole[1]) + 1]]
    assert len(written(model, eos_token_id=None)[0]) == 20
    config.mtp_phases = [{"name": "answer", "mode": "slow", "opened_by": None}]
    slow = written(model, mtp_mode="slow", eos_token_id=None)
    assert written(model, generation_config=config, eos_token_id=None) == slow
    config.mtp_mod = "fast"
    with pytest.raises(ValueError, match="generation_config.mtp_mod is no setting"):
        model.generate(PROMPT, generation_config=config)


def test_the_mode_of_the_generation_config_is_the_default(tmp_path):
    model = make()
    ids, given = PROMPT, {"max_new_tokens": 20}
    by_mode = {mode: model.generate(ids, mtp_mode=mode, **given) for mode in ("fast", "slow")}
    assert not torch.equal(by_mode["fast"], by_mode["slow"])
    assert torch.equal(model.generate(ids, **given), by_mode["slow"])
    config = GenerationConfig(mtp_mode="fast", **given)
    assert torch.equal(model.generate(ids, config), by_mode["fast"])
    model.generation_config.mtp_mode = "fast"
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path)
    assert torch.equal(model.generate(ids, **given), by_mode["fast"])
    assert torch.equal(model.generate(ids, mtp_mode="slow", **given), by_mode["slow"])
    assert torch.equal(
        model.generate(ids, GenerationConfig(mtp_mode="slow", **given)), by_mode["slow"]
    )
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(ids, num_beams=2, **given)
    beams = model.generate(ids, mtp_mode="stock", num_beams=2, num_return_sequences=2, **given)
    assert len(beams) == 2
    model.generation_config.mtp_k = 1
    out = model.generate(ids, return_dict_in_generate=True, **given)
    assert int(out.slots.max()) == 1
    model.generation_config.max_thought_tokens = 3
    assert model.generate(ids, **given)[0, 4 + 3] == CLOSE
    found = model.search(ids, config={"n": 1}, do_sample=True, **given)
    assert int(found.slots.max()) == 1
    model.generation_config.mtp_mode = "stock"
    model.generation_config.max_thought_tokens = None
    assert torch.equal(model.generate(ids, **given), by_mode["slow"])
    found = model.search(ids, config={"n": 1}, do_sample=True, **given)
    assert int(found.slots.max()) == 0
    with pytest.raises(ValueError, match="got 'stock', which is for generate alone; use slow"):
        model.search(ids, config={"n": 1}, mtp_mode="stock", do_sample=True, **given)


@pytest.mark.parametrize("pad", [PAD, 20, None])
def test_processors_see_the_padding_that_the_caller_wrote(pad):
    """Without a pad_token_id they must not see the end token in its place."""
    model = make()
    model.generation_config.pad_token_id = pad
    model.lm_head.weight.data[EOS] *= 3
    ids = torch.where(PADDED == PAD, PAD if pad is None else pad, PADDED)
    mask = (PADDED != PAD).long()
    given = {"no_repeat_ngram_size": 1, "max_new_tokens": 10}
    stock = model.generate(ids, attention_mask=mask, mtp_mode="stock", **given)[:, 4:].tolist()
    slow = model.generate(ids, attention_mask=mask, mtp_mode="slow", **given)[:, 4:].tolist()
    alone = model.generate(ids[:1, 2:], mtp_mode="slow", **given)[0, 2:].tolist()
    assert slow == stock
    if pad is None:  # the end token follows at once, and is not in the padding
        assert slow[0][: len(alone)] == alone and alone[-1] == EOS


def test_a_given_repetition_penalty_counts_no_padding():
    model = make()
    model.generation_config.eos_token_id = None
    model.lm_head.weight.data[20] *= 2
    ids, mask = torch.where(PADDED == PAD, 20, PADDED), (PADDED != PAD).long()

    def with_penalty(**given):
        penalty = [RepetitionPenaltyLogitsProcessor(5.0)]
        given |= {"mtp_mode": "slow", "logits_processor": penalty, "max_new_tokens": 8}
        return model.generate(**given)

    padded = with_penalty(inputs=ids, attention_mask=mask)[0, 4:].tolist()
    assert padded == with_penalty(inputs=ids[:1, 2:])[0, 2:].tolist()
    assert 20 in padded


@pytest.mark.parametrize("name", ["mtp_k", "max_thought_tokens", "generator"])
def test_arguments_of_a_mode_are_refused_without_one(name):
    value = torch.Generator() if name == "generator" else 1
    for mode in (None, "stock"):
        with pytest.raises(ValueError, match=f"{name} must be left out if mtp_mode is"):
            make().generate(PROMPT, mtp_mode=mode, **{name: value})


@pytest.mark.parametrize("pad", [PAD, EOS, None])
def test_a_mask_is_inferred_as_in_stock_generate(pad):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 23, (2, 10), generator=generator)
    ids[0, :3] = PAD if pad is None else pad
    model = make()
    model.generation_config.pad_token_id = pad
    stock = model.generate(ids, max_new_tokens=30, mtp_mode="stock")
    assert torch.equal(model.generate(ids, max_new_tokens=30, mtp_mode="slow"), stock)
    for mode in MODES:
        out = written(model, ids, mtp_mode=mode)
        mask = torch.ones_like(ids) if pad != PAD else ids.ne(PAD).long()
        assert out == written(model, ids, mtp_mode=mode, attention_mask=mask)
        other = ids.ne(ids[0, 0]).long() if pad != PAD else torch.ones_like(ids)
        assert out != written(model, ids, mtp_mode=mode, attention_mask=other)


@pytest.mark.parametrize("top_k", [None, 3, 50, 0])
def test_sampled_slow_text_is_that_of_stock_generate(top_k):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.02, eos_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    model = LlamaMTPForCausalLM(config).eval()
    model.generation_config.mtp_phases = PHASES
    given = {"do_sample": True, "max_new_tokens": 60, "temperature": 1.3}
    given |= {} if top_k is None else {"top_k": top_k}
    texts = []
    for mode in ("stock", "slow"):
        torch.manual_seed(1)
        texts.append(model.generate(PROMPT, mtp_mode=mode, **given))
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    "rule",
    [{"min_p": 0.3}, {"typical_p": 0.6}, {"epsilon_cutoff": 0.1}, {"eta_cutoff": 0.9}],
)
def test_rules_that_drop_unlikely_tokens_are_those_of_stock_generate(rule):
    model = make()
    given = {"do_sample": True, "max_new_tokens": 60, "temperature": 1.3, "top_p": 0.95}
    texts = []
    for more in ({"mtp_mode": "stock"} | rule, {"mtp_mode": "slow"} | rule, {"mtp_mode": "slow"}):
        torch.manual_seed(1)
        texts.append(model.generate(PROMPT, **given, **more).tolist())
    assert texts[0] == texts[1] != texts[2]


def test_min_p_of_almost_1_leaves_the_likeliest_token_of_each_slot():
    model = make()
    given = {"do_sample": True, "min_p": 0.999, "return_dict_in_generate": True}
    for mode in MODES:
        out = model.generate(PROMPT, mtp_mode=mode, max_new_tokens=20, **given)
        assert out.sequences[:, 4:].tolist() == written(model, mtp_mode=mode)
        assert out.logprobs.abs().max() == 0


@pytest.mark.parametrize("mode", ["slow", "fast"])
def test_a_repetition_penalty_does_not_count_padding(mode):
    """A row beside a longer one has the text that it has alone, though its padding is EOS."""
    model = make()
    mask = PADDED != PAD
    ids = torch.where(mask, PADDED, EOS)
    given = {"mtp_mode": mode, "repetition_penalty": 1.7, "pad_token_id": EOS}
    both = written(model, ids, attention_mask=mask, **given)
    rows = zip(ids, mask, strict=True)
    alone = [written(model, row[kept][None], **given)[0] for row, kept in rows]
    assert [text[: len(own)] for text, own in zip(both, alone, strict=True)] == alone


@pytest.mark.parametrize("mode", ["slow", "verified", "fast"])
def test_a_repetition_penalty_counts_a_first_token_that_is_the_padding_token(mode):
    """GPT-2's BOS, EOS and padding are one token."""
    model = make()
    model.lm_head.weight.data[EOS] *= 2
    ids = torch.tensor([[EOS, EOS, EOS, 5, 6], [EOS, 8, 4, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    given = {"attention_mask": mask, "repetition_penalty": 3.0, "pad_token_id": EOS}
    both = written(model, ids, mtp_mode=mode, **given)
    del given["attention_mask"]
    alone = written(model, ids[:1, 2:], mtp_mode=mode, **given)[0]
    assert both[0][: len(alone)] == alone


class EachSaid:
    """A criterion like lm-eval's: keeps which rows have said a token, and stops once all have."""

    def __init__(self, token, num_rows, width):
        self.token, self.width, self.done, self.shapes = token, width, [False] * num_rows, []

    def __call__(self, input_ids, scores, **kwargs):
        self.shapes.append(list(input_ids.shape))
        said = (input_ids[:, self.width :] == self.token).any(1).tolist()
        self.done = [done or now for done, now in zip(self.done, said, strict=True)]
        return all(self.done)


THREE = torch.tensor([[PAD, PAD, 5, 6], [8, 4, 9, 10], [5, 6, 7, 8]])


@pytest.mark.parametrize("mode", [*MODES, ["fast", "slow", "verified"]])
def test_a_criterion_may_know_rows_by_their_index(mode):
    model = make()
    model.lm_head.weight.data[EOS] = 0
    given = {"mtp_mode": mode, "attention_mask": THREE != PAD, "max_new_tokens": 24}
    whole, limits = written(model, THREE, **given), [3, 11, 7]

    def stop(input_ids, scores, **kwargs):
        return input_ids.shape[1] - 4 >= torch.tensor(limits)

    out = model.generate(THREE, stopping_criteria=[stop], return_dict_in_generate=True, **given)
    for row, limit in enumerate(limits):
        cut = out.sequences[row, 4:].tolist()
        assert cut == whole[row][:limit] + [PAD] * (len(cut) - limit)
        assert (out.slots[row] != -1).tolist() == [i < limit for i in range(len(cut))]
    assert out.finished.all()


@pytest.mark.parametrize("mode", [*MODES, ["fast", "slow", "verified"]])
def test_a_criterion_may_count_on_all_rows_in_every_call(mode):
    model = make()
    model.lm_head.weight.data[EOS] = 0
    given = {"mtp_mode": mode, "attention_mask": THREE != PAD, "max_new_tokens": 24}
    whole = written(model, THREE, **given)
    common = set(whole[0]) & set(whole[1]) & set(whole[2])
    assert common
    for token in common:
        criterion, last = EachSaid(token, 3, 4), max(row.index(token) for row in whole) + 1
        text = written(model, THREE, stopping_criteria=[criterion], **given)
        assert text == [row[:last] for row in whole]
        assert criterion.shapes == [[3, 4 + n] for n in range(1, last + 1)]


def test_a_row_is_given_texts_of_its_own_width():
    model = make()
    with torch.no_grad():
        model.lm_head.weight[EOS] = 9 * model.lm_head.weight[5]
        model.model.norm.weight.abs_()
    ids = torch.tensor([[PAD, PAD, 5, 6], [8, 4, 9, 10], [5, 6, 7, 8], [4, 4, 9, 9]])
    mask = ids != PAD

    class Always:
        """The end is what everybody wants to say."""

        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, EOS] += 100
            scores[:, CLOSE] -= 100
            return scores

    for modes in (["slow", "fast", "verified", "fast"], ["fast"] * 4):
        least = MinNewTokensLengthLogitsProcessor(4, 34, EOS)
        given = {"mtp_mode": modes, "max_new_tokens": 50, "logits_processor": [Always(), least]}
        out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **given)
        assert (out.slots >= 0).sum(1).tolist() == [35] * 4
        widths = []

        def wide(input_ids, scores, widths=widths, **kwargs):
            widths.append(input_ids.shape)
            return torch.full((len(input_ids),), input_ids.shape[1] >= 20)

        given["stopping_criteria"] = [wide]
        out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **given)
        assert (out.slots >= 0).sum(1).tolist() == [16] * 4
        assert sum(rows for rows, _ in widths) == 4 * 16  # asked once for each token
    slow = model.generate(
        ids, mtp_mode="slow", attention_mask=mask, max_new_tokens=50, min_length=30
    )
    stock = model.generate(ids, attention_mask=mask, max_new_tokens=50, min_length=30)
    assert torch.equal(slow, stock)


def test_processors_that_cannot_know_their_row_are_refused(monkeypatch):
    model = make()
    monkeypatch.setattr(type(model), "main_states", None)
    by_row = PrefixConstrainedLogitsProcessor(lambda row, ids: [5], 1)
    for processor in (by_row, EncoderNoRepeatNGramLogitsProcessor(2, PROMPT)):
        with pytest.raises(ValueError, match="identifies rows by number"):
            written(model, PROMPT.repeat(2, 1), logits_processor=[processor])
    mark = SynthIDTextWatermarkLogitsProcessor(3, [1, 2], 16, 0, 8, torch.device("cpu"))
    with pytest.raises(ValueError, match="relies on one call per token"):
        written(model, logits_processor=[mark])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 4, 32)}, "does not support .'inputs_embeds'."),
        ({"position_ids": torch.arange(4)[None]}, "does not support .'position_ids'."),
        ({"inputs": PROMPT}, "input_ids must be left out if inputs is given"),
        ({"input_ids": PROMPT[0]}, r"input_ids must be token ids .* got torch.int64 \[4\]"),
        (
            {"attention_mask": torch.ones(1, 5)},
            r"attention_mask must have the shape .* got \[1, 5\]",
        ),
    ],
)
def test_inputs_that_cannot_be_read_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        make().generate(**{"input_ids": PROMPT, "mtp_mode": "slow", **given})
