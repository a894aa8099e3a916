"""Shifts, document boundaries and masks: the index of every op, against the rule written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mtp_kernels import shifted_targets
from mtp_kernels.linear_kl.plan import shifted_index


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    slots=st.integers(1, 5),
    shift=st.integers(1, 4),
    data=st.data(),
)
def test_slot_j_at_t_meets_the_token_at_t_plus_shift_plus_j(batch, length, slots, shift, data):
    def drawn(values: st.SearchStrategy) -> torch.Tensor:
        row = st.lists(values, min_size=length, max_size=length)
        return torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))

    document, mask = drawn(st.integers(0, 2)), drawn(st.booleans())
    tokens = torch.arange(batch * length).view(batch, length)
    target = torch.full((batch, length, slots), -100)
    teacher = torch.full((batch, length, slots), -1)
    for b in range(batch):
        for t in range(length):
            for j in range(slots):
                u = t + shift + j  # the token; the teacher's row before it predicts the same
                if u < length and document[b, u] == document[b, t] and mask[b, u]:
                    target[b, t, j] = tokens[b, u]
                v = u - 1
                if v < length and document[b, v] == document[b, t] and mask[b, v]:
                    teacher[b, t, j] = b * length + v
    made = shifted_targets(tokens, slots, shift=shift, document=document, mask=mask)
    assert torch.equal(made, target)
    shape = (batch, length, slots)
    assert torch.equal(shifted_index(shape, shift, document, mask, torch.device("cpu")), teacher)


def test_the_documented_example():
    target = shifted_targets(torch.tensor([[5, 6, 7, 8]]), 2, ignore_index=0)
    assert target.tolist() == [[[6, 7], [7, 8], [8, 0], [0, 0]]]


def test_wrong_arguments_say_what_is_expected():
    with pytest.raises(ValueError, match=r"tokens must be \[B, T\]"):
        shifted_targets(torch.arange(4), 2)
    with pytest.raises(ValueError, match="shift must be >= 0"):
        shifted_targets(torch.zeros(1, 4).long(), 2, shift=-1)
