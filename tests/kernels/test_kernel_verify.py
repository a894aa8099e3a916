"""`linear_verify`: what it keeps is distributed as main's own samples."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import chi_square_is_plausible, operands
from mtp_kernels import linear_logprob, linear_sample, linear_verify

PATHS = ("torch", "triton")
ALL = ("reference", *PATHS)


def drafts(num: int, slots: int, vocab: int, temperature: float = 1.0):
    """(main's hidden and weight, drafts, their hidden and weight): head and main differ."""
    hidden, weight = (t.detach() * 0.5 for t in operands((num, slots + 1), vocab, 8, torch.float32))
    draft_hidden, draft_weight = (
        t.detach() * 0.5 for t in operands((num, slots), vocab, 6, torch.float32)
    )
    position = torch.arange(num)[:, None] * 100 + torch.arange(slots)
    draft = linear_sample(
        draft_hidden, draft_weight, seed=5, position=position, temperature=temperature
    ).token
    return hidden, weight, draft, draft_hidden, draft_weight


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("impl", PATHS)
def test_every_path_agrees_with_the_reference(impl, temperature):
    case = drafts(40, 3, 75, temperature)
    case[2][3, 1:] = -100
    case[2][4] = -100
    arguments = {"seed": 5, "position": torch.arange(40) * 100, "temperature": temperature}
    ours = linear_verify(*case, impl=impl, **arguments)
    reference = linear_verify(*case, impl="reference", **arguments)
    assert torch.equal(ours.num_accepted, reference.num_accepted)
    assert torch.equal(ours.token, reference.token)
    torch.testing.assert_close(ours.logprob, reference.logprob, atol=1e-5, rtol=1e-5)
    assert ours.num_accepted[3] <= 1
    assert ours.num_accepted[4] == 0


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", PATHS)
@settings(max_examples=8, deadline=None)
@given(num=st.integers(1, 12), slots=st.integers(1, 4), vocab=st.integers(1, 80), data=st.data())
def test_any_shape_and_length_of_draft(impl, num, slots, vocab, data):
    case = drafts(num, slots, vocab)
    draft = case[2]
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, slots), min_size=num, max_size=num)))
    draft[torch.arange(slots) >= lengths[:, None]] = -100
    arguments = {"seed": 5, "position": torch.arange(num) * 100}
    ours = linear_verify(*case, impl=impl, **arguments)
    reference = linear_verify(*case, impl="reference", **arguments)
    assert (ours.num_accepted <= lengths).all()
    same = (ours.num_accepted == reference.num_accepted) & (ours.token == reference.token)
    assert (~same).sum() <= 1  # a ratio or two scores may be a rounding apart
    torch.testing.assert_close(ours.logprob[same], reference.logprob[same], atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("chunked", "tall_tiles")
@pytest.mark.parametrize("impl", ALL)
def test_the_first_kept_token_is_distributed_as_main(impl):
    num, vocab = (4000 if impl == "triton" else 20_000), 50
    one = drafts(1, 1, vocab)
    hidden, draft_hidden = (one[n].expand(num, -1, -1) for n in (0, 3))
    position = torch.arange(num)
    draft = linear_sample(draft_hidden, one[4], seed=5, position=position[:, None]).token
    out = linear_verify(
        hidden, one[1], draft, draft_hidden, one[4], seed=5, position=position, impl=impl
    )
    first = torch.where(out.num_accepted == 1, draft[:, 0], out.token)
    every = one[0][0, :1].expand(vocab, -1)
    main = linear_logprob(every, one[1], torch.arange(vocab)).logprob
    assert chi_square_is_plausible(first.bincount(minlength=vocab).float(), main.exp())
    torch.testing.assert_close(out.logprob[:, 0], main[first], atol=1e-5, rtol=1e-5)
    kept = (out.num_accepted == 1).float().mean()
    proposal = linear_logprob(one[3][0].expand(vocab, -1), one[4], torch.arange(vocab)).logprob
    overlap = torch.minimum(main.exp(), proposal.exp()).sum()  # the chance to be accepted
    assert abs(kept - overlap) < 5 * (0.25 / num) ** 0.5


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", ALL)
def test_a_draft_of_main_itself_is_accepted_whole(impl):
    hidden, weight = (t.detach() for t in operands((20, 4), 50, 8, torch.float32))
    position = torch.arange(20) * 10
    draft = linear_sample(
        hidden[:, :3], weight, seed=1, position=position[:, None] + torch.arange(3)
    ).token
    out = linear_verify(hidden, weight, draft, hidden[:, :3], seed=1, position=position, impl=impl)
    assert (out.num_accepted == 3).all()
    scored = linear_logprob(hidden, weight, torch.cat((draft, out.token[:, None]), 1))
    torch.testing.assert_close(out.logprob, scored.logprob, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", PATHS)
def test_forbidden_ids_by_a_bias_of_minus_infinity(impl):
    """All but the first of three tiles of the vocabulary are forbidden, in both distributions."""
    case = drafts(10, 2, 300)
    case[2].remainder_(100)
    bias = torch.zeros(300)
    bias[100:] = -torch.inf
    arguments = {"seed": 5, "position": torch.arange(10) * 100, "bias": bias, "draft_bias": bias}
    ours = linear_verify(*case, impl=impl, **arguments)
    reference = linear_verify(*case, impl="reference", **arguments)
    for value, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    assert (ours.token < 100).all()


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("impl", ALL)
def test_at_temperature_zero_the_longest_greedy_prefix_is_kept(impl):
    hidden = torch.eye(4)[None].expand(2, -1, -1).contiguous()  # main says 0, 1, 2, 3
    draft = torch.tensor([[0, 1, 3], [2, 1, 2]])
    out = linear_verify(
        hidden,
        torch.eye(4) * 5,
        draft,
        torch.zeros(2, 3, 4),
        seed=0,
        position=torch.tensor([0, 0]),
        temperature=0.0,
        impl=impl,
    )
    assert out.num_accepted.tolist() == [2, 0]
    assert out.token.tolist() == [2, 0]
    assert (out.logprob[0, 3:] == 0).all()
    assert (out.logprob[1, 1:] == 0).all()


def test_wrong_shapes_say_what_is_expected():
    case = drafts(2, 3, 20)
    with pytest.raises(ValueError, match=r"hidden must be \[N, K \+ 1, D\]"):
        linear_verify(case[0][:, :3], *case[1:], seed=0, position=torch.arange(2))
    with pytest.raises(ValueError, match=r"position must be \[N\]"):
        linear_verify(*case, seed=0, position=torch.zeros(2, 3))


@pytest.mark.parametrize("impl", ALL)
def test_the_default_drafter_has_the_bias_of_its_weight(impl):
    """Drafts of main's own distribution are accepted, whatever the bias."""
    hidden, weight, bias = torch.randn(40, 3, 8), torch.randn(25, 8), 3 * torch.randn(25)
    position = torch.arange(40)
    steps = position[:, None] + torch.arange(2)
    draft = linear_sample(hidden[:, :2], weight, seed=5, position=steps, bias=bias).token
    found = linear_verify(
        hidden, weight, draft, hidden[:, :2], seed=6, position=position, bias=bias, impl=impl
    )
    assert found.num_accepted.tolist() == [2] * 40
