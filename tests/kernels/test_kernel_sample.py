"""`linear_sample`: tokens follow the distribution and depend on their key only."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import chi_square_is_plausible, operands
from mtp_kernels import configs, linear_logprob, linear_sample
from mtp_kernels.linear_sample.reference import keep_likely
from mtp_kernels.noise import philox

PATHS = ("torch", "triton")


@pytest.mark.usefixtures("chunked", "tall_tiles")
@pytest.mark.parametrize("vocab", [7, 32, 75], ids=["smaller", "equal", "larger than a tile"])
@pytest.mark.parametrize("impl", ["reference", *PATHS])
def test_draws_follow_the_distribution(impl, vocab):
    hidden, weight, bias = operands((1,), vocab, 4, torch.float32, bias=True)
    draws = 4000 if impl == "triton" else 20_000
    rows = hidden.detach().expand(draws, -1)
    scaling = {"temperature": 1.5, "softcap": 4.0, "bias": bias.detach()}
    out = linear_sample(rows, weight, seed=7, position=torch.arange(draws), impl=impl, **scaling)
    every = hidden.detach().expand(vocab, -1)
    logprob = linear_logprob(every, weight, torch.arange(vocab), **scaling).logprob.detach()
    assert chi_square_is_plausible(out.token.bincount(minlength=vocab).float(), logprob.exp())
    torch.testing.assert_close(out.logprob, logprob[out.token], atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", PATHS)
def test_every_path_draws_the_reference_tokens(impl, dtype):
    hidden, weight = operands((9, 5), 101, 24, dtype)
    position = torch.arange(5) + 100 * torch.arange(9)[:, None] + 2**33
    seed = torch.arange(9)[:, None] - 2**40
    ours = linear_sample(hidden, weight, seed=seed, position=position, impl=impl)
    reference = linear_sample(hidden, weight, seed=seed, position=position, impl="reference")
    share = (ours.token == reference.token).float().mean()
    assert share == 1 if dtype == torch.float32 else share > 0.9


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", PATHS)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 40),
    vocab=st.integers(1, 80),
    depth=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.5, 1.7]),
    first=st.integers(0, 2**40),
)
def test_any_shape_temperature_and_position(impl, rows, vocab, depth, temperature, first):
    hidden, weight = (t.detach() for t in operands((rows,), vocab, depth, torch.float32))
    keys = {"seed": first - 7, "position": first + torch.arange(rows), "temperature": temperature}
    ours = linear_sample(hidden, weight, impl=impl, **keys)
    reference = linear_sample(hidden, weight, impl="reference", **keys)
    assert (ours.token != reference.token).sum() <= 1  # two scores may be a rounding apart
    scored = linear_logprob(hidden, weight, ours.token, temperature=temperature or 1.0)
    torch.testing.assert_close(ours.logprob, scored.logprob, atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("tile", [16, 64, 128])
def test_draws_do_not_depend_on_the_tile(tile, monkeypatch):
    hidden, weight = operands((5,), 101, 24, torch.float32)
    arguments = {"seed": 3, "position": torch.arange(5), "impl": "triton"}
    before = linear_sample(hidden, weight, **arguments)
    monkeypatch.setattr(configs, "INTERPRET", configs.Config(16, tile, 16, 1, 1))
    assert torch.equal(linear_sample(hidden, weight, **arguments).token, before.token)


@pytest.mark.parametrize("impl", ["reference", *PATHS])
def test_draws_do_not_depend_on_the_batch(impl, chunked):
    hidden, weight = operands((6,), 50, 8, torch.float32)
    seed, position = torch.arange(6), torch.arange(6) * 11
    whole = linear_sample(hidden, weight, seed=seed, position=position, impl=impl)
    for n in range(6):
        alone = linear_sample(
            hidden[n : n + 1], weight, seed=int(seed[n]), position=position[n : n + 1], impl=impl
        )
        assert alone.token[0] == whole.token[n]


@pytest.mark.parametrize("impl", ["reference", *PATHS])
def test_temperature_zero_takes_the_largest_logit_and_the_lower_of_ties(impl, chunked):
    hidden, weight = torch.ones(2, 4), torch.zeros(50, 4)
    weight[[17, 40]] = 1.0
    out = linear_sample(hidden, weight, seed=0, position=torch.arange(2), temperature=0, impl=impl)
    assert out.token.tolist() == [17, 17]
    expected = 4.0 - torch.tensor(2 * np.exp(4.0) + 48).log()
    torch.testing.assert_close(out.logprob, expected.float().expand(2))


def test_top_k_and_top_p_keep_what_they_say():
    x = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()
    kept = lambda k, p: (keep_likely(x, k, p) > -torch.inf)[0].tolist()  # noqa: E731
    assert kept(2, None) == [True, True, False, False, False]
    assert kept(None, 0.69) == [True, True, False, False, False]
    assert kept(None, 0.71) == [True, True, True, False, False]
    assert kept(2, 0.6) == [True, False, False, False, False]  # 0.5 / 0.7 reaches 0.6 alone
    assert kept(None, 1e-9) == [True, False, False, False, False]
    assert kept(99, 1.0) == [True] * 5


@pytest.mark.parametrize("impl", ["reference", *PATHS])
def test_filtered_draws_follow_the_renormalised_distribution(impl, chunked):
    hidden, weight = operands((1,), 40, 4, torch.float32)
    rows = hidden.detach().expand(5000, -1)
    out = linear_sample(
        rows, weight, seed=1, position=torch.arange(5000), top_k=6, top_p=0.9, impl=impl
    )
    x = keep_likely(hidden.detach() @ weight.detach().T, 6, 0.9)
    logprob = x.log_softmax(-1)[0]
    assert chi_square_is_plausible(out.token.bincount(minlength=40).float(), logprob.exp())
    torch.testing.assert_close(out.logprob, logprob[out.token], atol=1e-5, rtol=1e-5)


def test_noise_is_philox_with_seven_rounds():
    """Against an independent implementation of the paper's round in Python integers."""

    def words(seed: int, position: int, stream: int, block: int) -> list[int]:
        mask = 0xFFFFFFFF
        key = [seed & mask, (seed >> 32) & mask]
        c = [block, position & mask, (position >> 32) & mask, stream]
        for _ in range(7):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ key[0], p1 & mask, (p0 >> 32) ^ c[3] ^ key[1], p0 & mask]
            key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
        return c

    cases = [(0, 0, 0, 0), (-1, 2**40 + 3, 2, 37983), (2**62 + 5, 17, 1, 4)]
    for seed, position, stream, block in cases:
        ours = philox(torch.tensor([seed]), torch.tensor([position]), stream, torch.tensor([block]))
        assert ours[0, 0].tolist() == words(seed, position, stream, block)


@pytest.mark.parametrize("vocab", [49_152, 151_936])
def test_real_vocabularies(vocab):
    hidden, weight = (t.detach() for t in operands((10,), vocab, 16, torch.bfloat16))
    out = linear_sample(hidden, weight, seed=0, position=torch.arange(10))
    scored = linear_logprob(hidden, weight, out.token)
    # On a CPU, bfloat16 logits of about 10 are rounded by up to 0.03.
    torch.testing.assert_close(out.logprob, scored.logprob, atol=0.05, rtol=0)
    assert out.token.max() < vocab


def test_wrong_arguments_say_what_is_expected():
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4)
    cases = (
        ({"position": torch.arange(2)}, "position must have hidden's leading shape"),
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"top_k": 0}, "top_k must be >= 1"),
        ({"top_p": 0.0}, "top_p must be in"),
    )
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            linear_sample(hidden, weight, **{"seed": 0, "position": torch.arange(3), **arguments})
