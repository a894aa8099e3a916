"""Streams, worked by hand, and the update that adds them up."""

import copy
import math

import pytest
import torch
from helpers import DRAFT, PAD, PLAN, SAMPLES, emitter, rollouts, tiny_model
from lightning.fabric import Fabric

from mtp.modeling.output_layer import OutputLayer
from mtp.modeling.sampler import Sampler
from mtp.training.algorithms import PolicyTokens, clipped
from mtp.training.collate import collate_rollouts, collate_text
from mtp.training.objectives import ObjectiveConfig, ReferenceRows, StreamInputs
from mtp.training.objectives.head_ce import HeadCE
from mtp.training.objectives.head_kl import HeadKL
from mtp.training.objectives.head_tv import HeadTV
from mtp.training.objectives.main_ce import MainCE
from mtp.training.objectives.policy import Policy
from mtp.training.objectives.preserve import Preserve
from mtp.training.objectives.reference_kl import ReferenceKL
from mtp.training.objectives.scored import replay_batch
from mtp.training.optimizers import OptimizerConfig, build_optimizer, split_parameters
from mtp.training.step_module import reference_rows, wrap
from mtp.training.update import update


def test_row_statistics_by_hand():
    stats = emitter([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], [1, 2]).stats()
    assert torch.allclose(stats.logprob.exp(), torch.tensor([0.25, 0.8]))
    entropy = 0.5 * math.log(2) + 0.5 * math.log(4)
    assert math.isclose(float(stats.entropy[0]), entropy, rel_tol=1e-5)


def test_cross_entropy_of_rows_by_hand():
    rows = emitter([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], [1, 2])
    out = rows.cross_entropy(torch.tensor([2.0, 0.5]))
    assert torch.allclose(out.loss, torch.tensor(-2 * math.log(0.25) - 0.5 * math.log(0.8)))
    assert torch.allclose(rows.cross_entropy().loss, torch.tensor(-math.log(0.25 * 0.8)))
    assert (out.argmax == rows.targets).tolist() == [False, True]


def test_kl_of_rows_by_hand():
    rows = emitter([[0.5, 0.5], [0.1, 0.9]], [0, 0])
    other = torch.tensor([[0.1, 0.9], [0.25, 0.75]]).log()
    forward = rows.kl(other, OutputLayer(torch.eye(2)), torch.tensor([1, 0]), reverse=False)
    reverse = rows.kl(other, OutputLayer(torch.eye(2)), torch.tensor([1, 0]), reverse=True)
    assert torch.allclose(forward, torch.tensor([0.25 * math.log(0.5) + 0.75 * math.log(1.5), 0.0]))
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert torch.allclose(reverse, torch.tensor([expected, 0.0]), atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "has_gradient"),
    [
        (1.0, 1.0, -1.0, True),
        (1.5, 1.0, -1.28, False),  # grown past 1 + clip_high: no more reward
        (1.5, -1.0, 1.5, True),  # a bad token grown likelier is pushed back without limit
        (0.5, 1.0, -0.5, True),
        (0.5, -1.0, 0.8, False),  # shrunk past 1 - clip_low: no more reward
    ],
)
def test_the_clipped_surrogate_by_hand(ratio, advantage, loss, has_gradient):
    logprob = torch.tensor([math.log(0.5 * ratio)], requires_grad=True)
    old = torch.tensor([math.log(0.5)])
    gain = clipped(
        PolicyTokens(
            logprob,
            old,
            torch.zeros(1),
            (logprob - old).exp(),
            torch.tensor([advantage]),
            0.2,
            0.28,
        )
    )
    assert math.isclose(-gain.item(), loss, rel_tol=1e-5)
    gain.sum().backward()
    assert bool(logprob.grad.abs() > 1e-6) == has_gradient


@pytest.mark.parametrize("channel_gradient", [1.0, 0.5])
def test_one_op_for_both_emitters_gives_what_two_give(channel_gradient):
    """With the channel half closed head and main differ in the matrix's gradient: then two ops."""
    results = []
    for together in (True, False):
        model, batch = tiny_model(), collate_text(SAMPLES, PLAN, 4, PAD)
        scored = replay_batch(model, batch, channel_gradient=channel_gradient, use_head=True)
        assert (scored.head.output is scored.main.output) == (channel_gradient == 1.0)
        stats = (
            scored.stats()
            if together
            else {"main": scored.main.stats(), "head": scored.head.stats()}
        )
        assert stats["main"] is scored.main.stats() and stats["head"] is scored.head.stats()
        (stats["main"].logprob.sum() + 2 * stats["head"].logprob.sum()).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([*stats["main"], *stats["head"], *grads])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_head_slot_weights_weigh_loss_and_count():
    model = tiny_model()
    batch = collate_text(SAMPLES, PLAN, 4, PAD)
    scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
    stream = HeadCE(weight=1.0, slot_weights=[1.0, 0.5, 0.0])
    nll = -scored.head.stats().logprob
    by_slot = [nll[batch.head.slots == slot].sum() for slot in (1, 2, 3)]
    counts = [int((batch.head.slots == slot).sum()) for slot in (1, 2, 3)]
    assert torch.allclose(
        stream.terms(StreamInputs(scored, batch))["head_ce"].total, by_slot[0] + by_slot[1] / 2
    )
    assert stream.counts(batch)["head_ce"] == counts[0] + counts[1] / 2
    with pytest.raises(ValueError, match="slot_weights must have 3 entries"):
        HeadCE(slot_weights=[1.0]).counts(batch)


def test_head_kl_compares_with_mains_row_for_the_same_token():
    model = tiny_model()
    batch = collate_text(SAMPLES, PLAN, 4, PAD)
    scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
    with torch.no_grad():
        teacher = model(batch.tokens).logits.log_softmax(-1).flatten(0, 1)[batch.head.positions]
    student = scored.head.output.logits(scored.head.hidden).log_softmax(-1)
    expected = torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="sum")
    assert torch.allclose(
        HeadKL(weight=1).terms(StreamInputs(scored, batch))["head_kl"].total, expected
    )
    model.zero_grad()
    model.lm_head.weight.grad = None
    HeadKL(weight=1).terms(StreamInputs(scored, batch))["head_kl"].total.backward()
    assert model.mtp_head.out_proj.weight.grad.abs().sum() > 0


def test_overlap_of_rows_by_hand(monkeypatch):
    """Row 1 of the other in two thirds, and the same in chunks of one row."""
    rows = emitter([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], [0, 0])
    other = torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.8, 0.0 + 1e-9]]).log()
    given = other, OutputLayer(torch.eye(3)), torch.tensor([1, 0])
    expected = torch.tensor([0.2 + 0.25, 0.1 + 0.1 + 0.5])
    assert torch.allclose(rows.overlap(*given, Sampler()), expected, atol=1e-6)
    monkeypatch.setattr("mtp.training.objectives.scored.OVERLAP_LOGITS", 3)
    assert torch.allclose(rows.overlap(*given, Sampler()), expected, atol=1e-6)
    likeliest = Sampler(top_k=1)  # 0 against 1, then 2 against 2
    assert rows.overlap(*given, likeliest).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("head", ["eavesdrop", "eagle3 that drafts"])
def test_head_tv_is_the_distance_of_the_heads_distribution_from_mains(head):
    """Both as the sampler makes them; no gradient flows into main's."""
    model = tiny_model(type=head)
    batch = collate_text(SAMPLES, PLAN, 4, PAD)
    sampler = Sampler(temperature=0.5)
    scored = replay_batch(model, batch, channel_gradient=0.0, use_head=True)
    with torch.no_grad():
        p = sampler.log_probs(model(batch.tokens).logits).exp().flatten(0, 1)[batch.head.positions]
        q = sampler.log_probs(scored.head.output.logits(scored.head.hidden)).exp()
    distance = (p - q).abs().sum(-1) / 2
    assert distance.min() > 0.01
    stream = HeadTV(weight=1.0, slot_weights=[1.0, 0.5, 0.25])
    term = stream.terms(StreamInputs(scored, batch, sampler))["head_tv"]
    weights = torch.tensor([1.0, 0.5, 0.25])[batch.head.slots - 1]
    assert torch.allclose(term.total, (weights * distance).sum(), rtol=1e-5)
    assert torch.allclose(torch.as_tensor(stream.counts(batch)["head_tv"]), weights.sum())
    total, count = term.metrics["head/acceptance"]
    assert float(total) / count == pytest.approx(1 - float(distance.mean()), abs=1e-5)
    term.total.backward()
    own = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert own and all(name.startswith("mtp_head") for name in own)


def test_head_tv_raises_the_share_of_drafts_that_verified_mode_accepts():
    """One distribution on each side: the head's rows move until main accepts nearly every draft."""
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    rows = emitter([[0.1, 0.2, 0.3, 0.4]], [0])
    logits = rows.hidden.clone().requires_grad_(True)
    rows.hidden = logits
    given = p, OutputLayer(torch.eye(4)), torch.tensor([0]), Sampler()
    assert rows.overlap(*given).item() == pytest.approx(0.6, abs=1e-6)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(1 - rows.overlap(*given).sum(), logits)
        with torch.no_grad():
            logits -= 0.1 * gradient
    assert rows.overlap(*given).item() > 0.98


def test_the_reference_kl_is_zero_for_main_at_the_reference_and_not_for_the_head():
    model = tiny_model()
    batch = collate_text(SAMPLES, PLAN, 4, PAD)
    scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
    hidden = scored.flat_hidden.detach()
    for reverse in (True, False):
        terms = ReferenceKL(weight=0.1, reverse=reverse).terms(
            StreamInputs(scored, batch, reference=ReferenceRows(hidden, model.output_layers()[0]))
        )
        assert abs(terms["reference_kl_main"].total.item()) < 1e-4
        assert terms["reference_kl_head"].total.item() > 1.0


def test_preserve_counts_every_written_position_once():
    """Also in a text that main wrote: its tokens are targets of several of the head's rows."""
    model, other = tiny_model(), tiny_model(seed=1)
    prompts, out, advantages = rollouts(model)
    with torch.no_grad():
        for main_wrote in (False, True):
            if main_wrote:
                batch = collate_text(SAMPLES, PLAN, 4, PAD)
                starts = [(len(p), len(c)) for p, c in SAMPLES]
            else:
                batch = collate_rollouts(prompts, out, advantages, [0, 1, 2, 3], 4, PAD)
                starts = [(len(p), int(n)) for p, n in zip(prompts, out.lengths, strict=True)]
            scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
            inputs = StreamInputs(scored, batch, reference=reference_rows(other, batch))
            log_q = model(batch.tokens).logits.log_softmax(-1)
            log_p = other(batch.tokens).logits.log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            written = [kl[row, a - 1 : a - 1 + n] for row, (a, n) in enumerate(starts)]
            stream = Preserve(weight=1.0)
            term = stream.terms(inputs)["preserve"]
            number = sum(map(len, written))
            assert number == stream.counts(batch)["preserve"] == term.metrics["preserve/kl"][1]
            assert torch.allclose(term.total, torch.cat(written).sum(), rtol=1e-4)


def test_small_slot_weights_do_not_shrink_the_loss():
    fabric = Fabric(accelerator="cpu", devices=1)
    losses = []
    for factor in (1.0, 1e-3):
        model = tiny_model()
        stream = HeadCE(weight=1.0, slot_weights=[factor, factor / 2, factor / 4])
        wrapped, parts = wrap(fabric, model), split_parameters(model)
        optimizers = {
            part: fabric.setup_optimizers(torch.optim.SGD(parts[part].values(), lr=0.0))
            for part in parts
        }
        metrics = update(
            fabric, wrapped, optimizers, [collate_text(SAMPLES, PLAN, 4, PAD)],
            ObjectiveConfig(head_ce=stream), clip_norms={"main": 1e9, "head": 1e9},
        )  # fmt: skip
        losses.append([metrics[name] for name in ("loss", "loss/head_ce", "head/grad_norm")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and min(losses[0]) > 0.1


OBJECTIVES = {
    "supervised": ObjectiveConfig(
        main_ce=MainCE(weight=1.0),
        head_ce=HeadCE(weight=0.7, slot_weights=[1.0, 0.8, 0.6]),
        head_kl=HeadKL(weight=0.3),
    ),
    "rl": ObjectiveConfig(policy=Policy(weight=1.0), reference_kl=ReferenceKL(weight=0.1)),
}


@pytest.mark.parametrize("head", ["eavesdrop", "eagle3 that drafts"])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_an_update_does_not_depend_on_the_size_of_micro_batches(kind, head):
    fabric = Fabric(accelerator="cpu", devices=1)
    after = {}
    for size in (4, 1):
        model, reference = tiny_model(type=head), tiny_model(seed=1)
        if kind == "rl":
            prompts, out, advantages = rollouts(model)
            batches = [
                collate_rollouts(prompts, out, advantages, list(range(at, at + size)), 4, PAD)
                for at in range(0, 4, size)
            ]
        else:
            samples = [*SAMPLES, ([7], [8, 8])]
            batches = [
                collate_text(samples[at : at + size], PLAN, 4, PAD) for at in range(0, 4, size)
            ]
        wrapped = wrap(fabric, model)
        parts = split_parameters(model)
        optimizers = {
            part: fabric.setup_optimizers(torch.optim.SGD(parts[part].values(), lr=0.1))
            for part in parts
        }
        metrics = update(
            fabric, wrapped, optimizers, batches, OBJECTIVES[kind],
            clip_norms={"main": 0.5, "head": 0.25}, reference=reference, check_gradients=True,
        )  # fmt: skip
        after[size] = (metrics, copy.deepcopy(model.state_dict()))
        if head == "eagle3 that drafts":
            targets = [token for batch in batches for token in batch.head.targets.tolist()]
            inside = [token for token in targets if token in DRAFT]
            outside = metrics["num_tokens/outside_draft_vocabulary"]
            assert outside == len(targets) - len(inside)
            assert (outside > 0) == (kind == "supervised")
            name = "reference_kl_head" if kind == "rl" else "head_kl"
            assert metrics[f"num_tokens/{name}"] == len(inside)
    whole, split = after[4], after[1]
    for name in whole[0]:
        assert math.isclose(whole[0][name], split[0][name], rel_tol=1e-3, abs_tol=1e-5), name
    for name, value in whole[1].items():
        assert torch.allclose(value, split[1][name], atol=1e-5), name
    assert whole[0]["main/grad_norm"] > 0.5 and whole[0]["head/grad_norm"] > 0.25


def test_main_and_head_are_clipped_apart():
    fabric = Fabric(accelerator="cpu", devices=1)
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    wrapped = wrap(fabric, model)
    parts = split_parameters(model)
    optimizers = {
        part: fabric.setup_optimizers(torch.optim.SGD(parts[part].values(), lr=1.0))
        for part in parts
    }
    clip_norms = {"main": 1e-3, "head": 1e-2}
    update(
        fabric, wrapped, optimizers, [collate_text(SAMPLES, PLAN, 4, PAD)],
        OBJECTIVES["supervised"], clip_norms=clip_norms,
    )  # fmt: skip
    moved = {"main": 0.0, "head": 0.0}
    for name, value in model.state_dict().items():
        part = "head" if name.startswith("mtp_head.") else "main"
        moved[part] += float((value - before[name]).square().sum())
    for part, square in moved.items():
        assert math.isclose(square**0.5, clip_norms[part], rel_tol=1e-2), part


def test_a_policy_step_makes_rewarded_tokens_of_both_emitters_likelier():
    fabric = Fabric(accelerator="cpu", devices=1)
    model = tiny_model()
    prompts, out, _ = rollouts(model)
    advantages = torch.tensor([1.0, 0.0, 0.0, 0.0])
    batch = collate_rollouts(prompts, out, advantages, [0, 1, 2, 3], 4, PAD)
    wrapped = wrap(fabric, model)
    parts = split_parameters(model)
    optimizers = {
        part: fabric.setup_optimizers(build_optimizer(parts[part], OptimizerConfig(lr=1e-3)))
        for part in parts
    }
    update(
        fabric, wrapped, optimizers, [batch], ObjectiveConfig(policy=Policy(weight=1.0)),
        clip_norms={"main": 1.0, "head": 1.0},
    )  # fmt: skip
    with torch.no_grad():
        scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
    main, head = batch.main.advantages > 0, batch.head.advantages > 0
    assert main.any() and head.any()
    assert (scored.main.stats().logprob[main] - batch.main.sampled[main]).mean() > 0
    assert (scored.head.stats().logprob[head] - batch.head.sampled[head]).mean() > 0
