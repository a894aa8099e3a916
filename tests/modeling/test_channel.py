"""Gradients: three paths, of which the channel can be scaled or closed."""

import pytest
import torch
from helpers import CLOSE, EOS, HEADS, PAD, tiny_model

from mtp.modeling.phases import PhasePlan
from mtp.modeling.versions import set_activation_checkpointing
from mtp.training.batch import within_draft_vocabulary
from mtp.training.collate import collate_text
from mtp.training.objectives import ObjectiveConfig
from mtp.training.objectives.head_ce import HeadCE
from mtp.training.objectives.main_ce import MainCE
from mtp.training.objectives.scored import replay_batch
from mtp.training.objectives.stream import StreamInputs

PLAN = PhasePlan(keep=[4, 1], opened_by=[None, CLOSE], eos_ids=[EOS])
BATCH = collate_text([([5, 6], [7, 8, 9, 10, CLOSE, 11, EOS]), ([3], [4, 5])], PLAN, 4, PAD)


def gradients(model, objective, channel_gradient):
    model.zero_grad()
    batch = within_draft_vocabulary(BATCH, model.mtp_head.draft_tokens)
    scored = replay_batch(
        model, batch, channel_gradient=channel_gradient, use_head=objective.uses_head
    )
    terms = objective.terms(StreamInputs(scored, batch))
    sum(term.weight * term.total for term in terms.values()).backward()
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_closed_channel_gives_main_no_gradient_and_an_open_one_does(family, head, shared, tied):
    model = tiny_model(family, type=head, shared_embeddings=shared, tied=tied)
    objective = ObjectiveConfig(head_ce=HeadCE(weight=1.0))
    closed = gradients(model, objective, 0.0)
    opened = gradients(model, objective, 1.0)
    for name, grad in closed.items():
        if name.startswith("mtp_head."):
            assert grad is not None and grad.abs().sum() > 0, name
            assert torch.equal(grad, opened[name])
        else:
            assert grad is None, name
    layers = [name for name in opened if name.startswith("model.layers.")]
    assert layers and all(opened[name].abs().sum() > 0 for name in layers)
    uses_matrix = opened["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert (uses_matrix is not None) == ((shared and "drafts" not in head) or tied)


def test_the_channel_scales_linearly():
    model = tiny_model().double()
    objective = ObjectiveConfig(head_ce=HeadCE(weight=1.0))
    whole, half = gradients(model, objective, 1.0), gradients(model, objective, 0.5)
    for name, grad in whole.items():
        factor = 1.0 if name.startswith("mtp_head.") else 0.5
        assert torch.allclose(half[name], factor * grad, rtol=1e-9, atol=1e-12), name


def test_mains_own_stream_gives_the_head_none():
    found = gradients(tiny_model(), ObjectiveConfig(main_ce=MainCE(weight=1.0)), 1.0)
    assert all((g is None) == n.startswith("mtp_head.") for n, g in found.items())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_recomputing_layers_in_the_backward_changes_no_gradient(family):
    objective = ObjectiveConfig(main_ce=MainCE(weight=1.0), head_ce=HeadCE(weight=1.0))
    model = tiny_model(family).train()
    plain = gradients(model, objective, 1.0)
    set_activation_checkpointing(model, True)
    recomputed = gradients(model, objective, 1.0)
    for name, grad in plain.items():
        assert torch.allclose(grad, recomputed[name], atol=1e-5), name
