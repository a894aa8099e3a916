"""Recall of a head: the messages after positions that resemble the anchor's."""

import pytest
import torch

from mtp.modeling.heads import HeadConfig, Recall

K, WIDTH = 3, 32


def copier():
    """Looks for the very message of the anchor, with one head, and gives messages as they are."""
    recall = Recall(HeadConfig(num_slots=K, hidden_size=WIDTH, num_attention_heads=1, recall=True))
    with torch.no_grad():
        for proj in (recall.q_proj, recall.k_proj, recall.v_proj, recall.o_proj):
            proj.weight.copy_(torch.eye(WIDTH))
        recall.q_norm.weight.fill_(3.0)
    return recall


def rows(*ids):
    """[1, T, WIDTH]: a message of norm sqrt(WIDTH) for each id, orthogonal to the others."""
    return torch.eye(WIDTH)[list(ids)][None] * WIDTH**0.5


@torch.no_grad()
def test_slots_go_on_with_what_followed_the_same_message():
    text = rows(7, 1, 2, 3, 4, 9, 8, 1)
    recalled = copier()(text)[0, -1]
    assert torch.allclose(recalled, rows(2, 3, 4)[0], atol=1e-3)


@torch.no_grad()
def test_only_what_main_has_read_is_recalled():
    recalled = copier()(rows(1, 1, 1))[0, -1]
    assert torch.allclose(recalled[:2], rows(1, 1)[0], atol=1e-3)
    assert torch.equal(recalled[2], torch.zeros(WIDTH))
    # A message like no other: weights are spread over all positions, and over nothing.
    assert copier()(rows(1, 2, 3, 4, 5))[0, -1, 0].norm() < rows(1).norm()


@pytest.mark.parametrize("num_behind", [0, 4])
@torch.no_grad()
def test_a_pass_recalls_what_the_whole_text_does(num_behind):
    torch.manual_seed(0)
    recall = Recall(HeadConfig(num_slots=K, hidden_size=WIDTH, num_attention_heads=4, recall=True))
    messages = torch.randn(5, 9 + num_behind, WIDTH)
    anchors = torch.tensor([8, 0, 1, 2, 5])
    keys, values = recall.states(messages)
    row = torch.arange(5)
    step = recall.step(messages[row, anchors], anchors, keys, values)
    assert torch.allclose(step, recall(messages)[row, anchors], atol=1e-5)
