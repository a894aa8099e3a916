"""Noise that is a function of a row's seed and a position: the batch has no say in it."""

import pytest
import torch
from helpers import CLOSE, EOS, PAD, PLAN, tiny_model

from mtp.modeling.decode import decode
from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.phases import PhasePlan
from mtp.modeling.records import pad
from mtp.modeling.sampler import HEAD, MAIN, SEGMENT, Sampler, mix, pick, uniforms

WORD = 2**64
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12], [4, 4]]
SEEDS = torch.tensor([3, 2**62, 17, 0])


def splitmix(seed: int, counter: int, stream: int) -> int:
    """The hash by Python's whole numbers."""

    def mixed(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
        return z ^ (z >> 31)

    step = 0x9E3779B97F4A7C15
    return mixed((mixed((seed + stream * step) % WORD) + counter * step) % WORD)


@pytest.mark.parametrize(
    ("seed", "counter", "stream"), [(0, 0, 1), (5, 77, 2), (2**63 - 2, 4096, 4), (99, 1, 3)]
)
def test_the_hash_is_splitmix64(seed, counter, stream):
    got = mix(torch.tensor([seed]), torch.tensor([counter]), stream)
    assert int(got) % WORD == splitmix(seed, counter, stream)
    assert int(mix(torch.tensor([seed]), counter, stream)) % WORD == splitmix(seed, counter, stream)


def test_uniforms_are_uniform_and_streams_differ():
    first, second = (uniforms(torch.arange(300)[:, None], torch.arange(300), s) for s in (1, 2))
    for noise in (first, second):
        assert abs(float(noise.mean()) - 0.5) < 0.005
        assert abs(float(noise.var()) - 1 / 12) < 0.001
        assert float(noise.min()) > 0 and float(noise.max()) < 1
    both = torch.stack([first.flatten(), second.flatten()])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.01


def test_a_token_is_picked_by_inversion():
    weights = torch.tensor([0.0, 2.0, 0.0, 1.0, 1.0, 0.0])
    at = torch.tensor([1e-9, 0.49, 0.51, 0.74, 0.76, 1 - 1e-12], dtype=torch.float64)
    assert pick(weights.expand(6, 6), at).tolist() == [1, 1, 3, 3, 4, 4]


def test_a_probability_that_is_not_finite_is_an_error():
    with pytest.raises(RuntimeError, match="inf or nan"):
        pick(torch.tensor([0.5, torch.nan]), torch.tensor(0.5, dtype=torch.float64))


PLANS = {
    "fast": PLAN,
    "verified": PhasePlan(
        keep=[4, 1], opened_by=[None, CLOSE], eos_ids=[EOS], verified=[True, False]
    ),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("type", ["eavesdrop", "parallel"])
@pytest.mark.parametrize("impl", [None, "torch"])
def test_a_row_writes_the_same_in_any_batch(plan, type, impl):
    model = tiny_model(type=type)

    def written(rows):
        tokens, lengths = pad([PROMPTS[row] for row in rows], PAD)
        options = DecodeOptions(
            sampler=Sampler(temperature=1.2), max_new_tokens=16, seeds=SEEDS[rows], impl=impl
        )
        out = decode(model, tokens, lengths, PLANS[plan], options)
        return [out.completion(row) for row in range(len(rows))]

    together = written([0, 1, 2, 3])
    assert len({tuple(text) for text in together}) == 4
    assert [written([row])[0] for row in range(4)] == together
    assert written([3, 1]) == [together[3], together[1]]


def test_copies_of_a_prompt_have_noise_of_their_own():
    model = tiny_model()
    tokens, lengths = pad(PROMPTS[:1], PAD)
    options = DecodeOptions(max_new_tokens=12, seeds=SEEDS)
    out = decode(model, tokens, lengths, PLAN, options, num_return_sequences=4)
    assert len({tuple(out.completion(row)) for row in range(4)}) == 4


def test_seeds_of_segments_differ():
    assert int(mix(SEEDS[:1], 1, SEGMENT)) != int(mix(SEEDS[:1], 2, SEGMENT)) != int(SEEDS[0])
    assert MAIN != HEAD


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": SEEDS, "generator": torch.Generator()}, "seeds must be left out beside a gen"),
        ({"seeds": SEEDS[:2]}, "seeds must be one for each of 4 rows, got"),
    ],
)
def test_seeds_that_do_not_fit_are_refused(options, message):
    tokens, lengths = pad(PROMPTS, PAD)
    with pytest.raises(ValueError, match=message):
        decode(tiny_model(), tokens, lengths, PLAN, DecodeOptions(max_new_tokens=4, **options))


def test_a_process_that_is_done_stays_in_step_until_all_are():
    """Another process has passes left: this one runs main as often, with nothing to write."""
    model, passes = tiny_model(), []
    model.model.register_forward_hook(lambda *given: passes.append(1))
    left = iter([True] * 40)
    asked = []

    def any_continues(continues):
        asked.append(continues)
        return continues or (len(asked) < 30 and next(left))

    tokens, lengths = pad(PROMPTS, PAD)
    options = DecodeOptions(max_new_tokens=8, seeds=SEEDS, any_continues=any_continues)
    out = decode(model, tokens, lengths, PLAN, options)
    alone = decode(model, tokens, lengths, PLAN, DecodeOptions(max_new_tokens=8, seeds=SEEDS))
    assert out.tokens.equal(alone.tokens)
    assert len(asked) == 30 and asked[-20:] == [False] * 20
    assert len(passes) == 30 + int(alone.passes.max())
