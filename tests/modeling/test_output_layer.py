"""An output layer's bias, scale and softcap count wherever its logits do, made or not."""

import pytest
import torch
from helpers import tiny_model

from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.output_layer import OutputLayer
from mtp.modeling.phases import PhasePlan, PlanTables
from mtp.modeling.sampler import Sampler
from mtp.modeling.sampler import verify as verify_logits
from mtp.modeling.token_sampling import TokenSampler
from mtp.training.objectives.scored import OutputRows, Scored

VOCABULARY, WIDTH, NUM_ROWS = 17, 6, 5
LAYERS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "scale": 3.0, "softcap": 1.5},
}


def layer(fields, dtype=torch.float64, seed=0, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCABULARY, width, dtype=dtype, generator=generator)
    bias = torch.randn(VOCABULARY, dtype=dtype, generator=generator)
    given = fields | {"bias": bias.requires_grad_() if fields.get("bias") else None}
    return OutputLayer(weight.requires_grad_(), **given)


def by_definition(output, hidden):
    logits = output.scale * torch.nn.functional.linear(hidden, output.weight)
    logits = logits if output.bias is None else logits + output.bias
    return logits if output.softcap is None else output.softcap * (logits / output.softcap).tanh()


def rows_of(fields, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + 100)
    hidden = torch.randn(NUM_ROWS, WIDTH, dtype=dtype, generator=generator).requires_grad_()
    targets = torch.randint(VOCABULARY, (NUM_ROWS,), generator=generator)
    return OutputRows(hidden, layer(fields, dtype, seed), targets)


def same_gradients(value, expected, tensors):
    """Both values are equal, and their gradients by the tensors."""
    torch.testing.assert_close(value, expected, check_dtype=False)
    tensors = [t for t in tensors if t is not None]
    grads = torch.autograd.grad(value, tensors)
    for one, two in zip(grads, torch.autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fields", LAYERS.values(), ids=LAYERS)
def test_logits_follow_the_definition(fields, dtype):
    rows = rows_of(fields, dtype=dtype)
    expected = by_definition(rows.output, rows.hidden)
    torch.testing.assert_close(rows.output.logits(rows.hidden), expected)
    assert rows.output.detach().logits(rows.hidden.detach()).requires_grad is False


@pytest.mark.parametrize("fields", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=0.7), Sampler(top_k=4)])
def test_replayed_statistics_follow_the_definition(sampler, fields):
    rows = rows_of(fields, dtype=torch.float32 if sampler.truncates else torch.float64)
    stats = rows.stats(sampler)
    logits = by_definition(rows.output, rows.hidden)
    if sampler.truncates:
        kth = logits.topk(sampler.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    log_probs = (logits / sampler.temperature).log_softmax(-1)
    chosen = log_probs.gather(1, rows.targets[:, None])[:, 0]
    entropy = torch.special.entr(log_probs.exp()).sum(1)
    torch.testing.assert_close(stats.entropy, entropy.detach(), check_dtype=False)
    used = chosen.isfinite()
    tensors = (rows.hidden, rows.output.weight, rows.output.bias)
    same_gradients(stats.logprob[used].sum(), chosen[used].sum(), tensors)


@pytest.mark.parametrize("fields", LAYERS.values(), ids=LAYERS)
def test_cross_entropy_follows_the_definition(fields):
    rows = rows_of(fields)
    weights = torch.linspace(0.5, 2.0, NUM_ROWS, dtype=torch.float64)
    log_probs = by_definition(rows.output, rows.hidden).log_softmax(-1)
    expected = -(weights * log_probs.gather(1, rows.targets[:, None])[:, 0]).sum()
    tensors = (rows.hidden, rows.output.weight, rows.output.bias)
    same_gradients(rows.cross_entropy(weights).loss, expected, tensors)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("other", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("fields", LAYERS.values(), ids=LAYERS)
def test_divergences_follow_the_definition_whatever_both_layers_are(fields, other, reverse):
    rows, teacher = rows_of(fields, dtype=torch.float32), rows_of(other, 1, dtype=torch.float32)
    index = torch.tensor([4, 0, 1, 1, 3])
    fixed, hidden = teacher.output.detach(), teacher.hidden.detach()
    log_q = by_definition(rows.output, rows.hidden).log_softmax(-1)
    log_p = by_definition(fixed, hidden[index]).log_softmax(-1)
    first, second = (log_q, log_p) if reverse else (log_p, log_q)
    expected = (first.exp() * (first - second)).sum()
    kl = rows.kl(hidden, fixed, index, reverse=reverse)
    same_gradients(kl.sum(), expected, (rows.hidden, rows.output.weight, rows.output.bias))


@pytest.mark.parametrize("fields", LAYERS.values(), ids=LAYERS)
def test_one_op_for_two_emitters_honours_their_layer(fields):
    main = rows_of(fields)
    head = OutputRows(main.hidden.detach() + 1, main.output, main.targets)
    stats = Scored(main, head, main.hidden).stats()
    for rows in (main, head):
        log_probs = by_definition(rows.output, rows.hidden).log_softmax(-1)
        expected = log_probs.gather(1, rows.targets[:, None])[:, 0]
        found = stats["main" if rows is main else "head"].logprob
        torch.testing.assert_close(found, expected, check_dtype=False)


def token_sampler(sampler, main, head, kernels, num_rows):
    plan = PhasePlan(keep=[4], opened_by=[None], verified=[True])
    tables = PlanTables([plan] * num_rows, 9, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    options = DecodeOptions(sampler=sampler, max_new_tokens=8, generator=generator, impl=kernels)
    return TokenSampler(options, tables, main, head)


@pytest.mark.parametrize("kernels", [None, "reference", "torch"])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("fields", LAYERS.values(), ids=LAYERS)
def test_sampled_tokens_have_the_log_probabilities_of_the_definition(fields, temperature, kernels):
    sampler, output = Sampler(temperature=temperature), layer(fields, torch.float32).detach()
    hidden = torch.randn(NUM_ROWS, 3, WIDTH, generator=torch.Generator().manual_seed(5))
    samples = token_sampler(sampler, output, output, kernels, NUM_ROWS)
    assert (samples.kernel is None) == (kernels is None)
    row = torch.arange(NUM_ROWS)
    slots = samples.sample(samples.settle(hidden, output, row, row), lambda: iter(()))
    log_probs = (by_definition(output, hidden) / (temperature or 1.0)).log_softmax(-1)
    expected = log_probs.gather(2, slots.tokens[..., None])[..., 0]
    torch.testing.assert_close(slots.logprobs, expected)
    if temperature == 0:
        assert torch.equal(slots.tokens, log_probs.argmax(-1))


@pytest.mark.parametrize("kernels", [None, "reference", "torch"])
@pytest.mark.parametrize("of_head", ["plain", "all"])
@pytest.mark.parametrize("fields", LAYERS.values(), ids=LAYERS)
def test_sampled_drafts_are_verified_under_both_layers(fields, of_head, kernels):
    """Over many rows, accepted drafts and the tokens after them follow main's distribution."""
    number = 4000
    main, head = layer(fields, torch.float32).detach(), layer(LAYERS[of_head], torch.float32, 1)
    head = head.detach()
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(3, WIDTH, generator=generator)
    hidden, head_hidden = rows[:2].expand(number, 2, WIDTH), rows[2:].expand(number, 1, WIDTH)
    samples = token_sampler(Sampler(), main, head, kernels, number)
    can_use_kernel = kernels is not None and main.softcap == head.softcap
    assert (samples.kernel is not None) == can_use_kernel
    row, ones = torch.arange(number), torch.ones(number, dtype=torch.int64)
    settled = samples.settle(head_hidden, head, row, 7 * ones)
    slots = samples.sample(settled, lambda: iter(()))
    verdict = samples.verify(
        hidden, slots.tokens, ones, slots.source, row, 8 * ones, lambda _: iter(())
    )
    accepted = verdict.num_accepted == 1
    first = torch.where(accepted, slots.tokens[:, 0], verdict.token)
    expected = by_definition(main, rows[0]).softmax(-1)
    found = first.bincount(minlength=VOCABULARY) / number
    assert (found - expected).abs().max() < 0.04
    log_probs = by_definition(main, rows[:2]).log_softmax(-1)
    torch.testing.assert_close(verdict.logprobs[:, 0], log_probs[0, first])
    after = log_probs[1, verdict.token]
    torch.testing.assert_close(verdict.logprobs[accepted, 1], after[accepted])


def test_greedy_verification_reads_mains_layer():
    output = layer(LAYERS["all"], torch.float32).detach()
    hidden = torch.randn(NUM_ROWS, 2, WIDTH, generator=torch.Generator().manual_seed(5))
    drafts, ones = torch.full((NUM_ROWS, 1), 3), torch.ones(NUM_ROWS, dtype=torch.int64)
    row = torch.arange(NUM_ROWS)
    expected = verify_logits(
        by_definition(output, hidden), drafts, ones, None, Sampler(temperature=0), None
    )
    for kernels in (None, "torch"):
        samples = token_sampler(Sampler(temperature=0), output, output, kernels, NUM_ROWS)
        found = samples.verify(hidden, drafts, ones, None, row, row, lambda _: iter(()))
        assert torch.equal(found.token, expected.token)
        assert torch.equal(found.num_accepted, expected.num_accepted)


def test_main_and_head_share_one_layer_unless_their_gradients_differ():
    shared, own = tiny_model(), tiny_model(shared_embeddings=False)
    main, head = shared.output_layers()
    assert main is head
    main, head = shared.output_layers(channel_gradient=0.5)
    assert main.weight.requires_grad and torch.equal(main.weight, head.weight)
    assert not shared.output_layers(channel_gradient=0.0)[1].weight.requires_grad
    main, head = own.output_layers(channel_gradient=0.0)
    assert head.weight is own.mtp_head.lm_head.weight and main.weight is own.lm_head.weight
