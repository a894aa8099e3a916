"""Rows of a batch, worked by hand."""

import torch
from helpers import CLOSE, EOS, PAD, VOCABULARY
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp.modeling.phases import PhasePlan
from mtp.modeling.records import Decoded
from mtp.training.collate import collate_main_rollouts, collate_rollouts, collate_text


def test_rollout_rows_by_hand():
    # Prompt 5 6; blocks [7 8 9] (kept whole, K = 2), [10 2] (cut at the delimiter), [11], [1].
    tokens = torch.tensor([[7, 8, 9, 10, CLOSE, 11, EOS]])
    slots = torch.tensor([[0, 1, 2, 0, 1, 0, 0]])
    logprobs = -torch.arange(1.0, 8.0)[None]
    out = Decoded(
        tokens, slots, logprobs, torch.tensor([7]), torch.tensor([4]), torch.tensor([True])
    )
    batch = collate_rollouts([[5, 6]], out, torch.tensor([0.5]), [0], 3, PAD)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 10, CLOSE, 11, EOS]]
    assert batch.main.positions.tolist() == [1, 4, 6, 7]
    assert batch.main.targets.tolist() == [7, 10, 11, EOS]
    assert batch.main.sampled.tolist() == [-1, -4, -6, -7]
    assert batch.anchors.tolist() == [1, 4]
    assert batch.slot_inputs.tolist() == [[7, 8], [10, CLOSE]]
    assert batch.head.outputs.tolist() == [0, 1, 2]
    assert batch.head.targets.tolist() == [8, 9, CLOSE]
    assert batch.head.slots.tolist() == [1, 2, 1]
    assert batch.head.positions.tolist() == [2, 3, 5]
    assert batch.head.anchors.tolist() == [1, 1, 4]
    assert batch.main.outputs.tolist() == batch.main.anchors.tolist() == [1, 4, 6, 7]
    assert batch.head.sampled.tolist() == [-2, -3, -5]
    assert batch.head.advantages.tolist() == [0.5] * 3


def test_supervised_rows_by_hand():
    # K = 2, prompt 5, completion 6 7 CLOSE 8 EOS: the head writes up to CLOSE, never behind it.
    plan = PhasePlan(keep=[3, 1], opened_by=[None, CLOSE], eos_ids=[EOS])
    batch = collate_text([([5], [6, 7, CLOSE, 8, EOS])], plan, 3, PAD)
    assert batch.main.positions.tolist() == [0, 1, 2, 3, 4]
    assert batch.main.targets.tolist() == [6, 7, CLOSE, 8, EOS]
    assert batch.anchors.tolist() == [0, 1]
    assert batch.slot_inputs.tolist() == [[6, 7], [7, CLOSE]]
    assert batch.head.targets.tolist() == [7, CLOSE, CLOSE]
    assert batch.head.slots.tolist() == [1, 2, 1]
    assert batch.head.positions.tolist() == [1, 2, 2]


@settings(max_examples=100, deadline=None)
@given(
    samples=st.lists(
        st.tuples(
            st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=5),
            st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9),
        ),
        min_size=1,
        max_size=5,
    ),
    num_anchors=st.integers(0, 4),
)
def test_every_supervised_row_predicts_the_token_that_follows_in_its_own_text(samples, num_anchors):
    plan = PhasePlan(keep=[4, 1], opened_by=[None, CLOSE], eos_ids=[EOS])
    seeds = range(len(samples))
    batch = collate_text(samples, plan, 4, PAD, num_anchors=num_anchors, anchor_seeds=seeds)
    flat, time = batch.tokens.flatten(), batch.tokens.shape[1]
    assert len(batch.main) == sum(len(c) for _, c in samples)
    assert torch.equal(flat[batch.main.positions + 1], batch.main.targets)
    assert torch.equal(flat[batch.head.positions + 1], batch.head.targets)
    if num_anchors:
        per_row = torch.bincount(batch.anchors // time, minlength=len(samples))
        assert per_row.max() <= num_anchors
    for row, position in zip(
        batch.head.outputs.tolist(), batch.head.positions.tolist(), strict=True
    ):
        anchor = int(batch.anchors[row // 3])
        sample, at = divmod(anchor, time)
        prompt, completion = samples[sample]
        assert position == anchor + row % 3 + 1
        assert position // time == sample
        assert len(prompt) - 1 <= at and position % time + 1 < len(prompt) + len(completion)
        between = flat[anchor + 1 : position + 1].tolist()
        assert CLOSE not in between and EOS not in between


def test_the_anchors_of_a_sequence_do_not_depend_on_the_batch():
    plan = PhasePlan(keep=[4, 1], opened_by=[None, CLOSE], eos_ids=[EOS])
    samples = [([5], list(range(3, 20 - i))) for i in range(6)]
    given = {"num_anchors": 3}

    def anchors(rows):
        chosen, seeds = [samples[i] for i in rows], [100 + i for i in rows]
        batch = collate_text(chosen, plan, 4, PAD, anchor_seeds=seeds, **given)
        row, at = batch.anchors // batch.tokens.shape[1], batch.anchors % batch.tokens.shape[1]
        return {i: at[row == number].tolist() for number, i in enumerate(rows)}

    whole = anchors(range(6))
    assert whole == anchors([4, 5]) | anchors([0]) | anchors([3, 1, 2])
    assert all(len(found) == 3 for found in whole.values())
    assert len({tuple(found) for found in whole.values()}) > 3, "each sequence has its own"


def test_the_anchors_of_a_slow_rollout_do_not_depend_on_the_batch():
    lengths = torch.tensor([12, 12, 7, 12])
    tokens = torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
    tokens[1] = tokens[0]
    out = Decoded(
        tokens, torch.zeros(4, 12, dtype=torch.long), torch.zeros(4, 12), lengths, lengths,
        torch.ones(4, dtype=torch.bool),
    )  # fmt: skip
    plan = PhasePlan(keep=[4], opened_by=[None], eos_ids=[EOS])

    def anchors(rows, seed=7):
        batch = collate_main_rollouts(
            [[5]] * 4, out, torch.zeros(4), rows, plan, 4, PAD, num_anchors=3, anchor_seed=seed
        )
        width = batch.tokens.shape[1]
        found = {}
        rows_of_text = batch.anchors[batch.head.outputs // 3].tolist()
        for row, rollout in zip(rows_of_text, batch.head.rollouts.tolist(), strict=True):
            found.setdefault(rows[rollout], set()).add(row % width)
        return found

    whole = anchors([0, 1, 2, 3])
    assert whole == anchors([3, 0]) | anchors([2]) | anchors([1])
    assert whole[0] == whole[1] != whole[3], "equal texts have equal anchors"
    assert whole != anchors([0, 1, 2, 3], seed=8)
