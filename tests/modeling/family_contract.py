"""Checks that hold for every family with a head, one per function; `examine` runs them all.

The stock model has the same weights, in transformers' own class and attention.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from families import EOS, PAD, VOCABULARY, WINDOW, tiny_family

from mtp.modeling.contract import check_slow_mode, stock_class
from mtp.modeling.decode import decode
from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.phases import PhasePlan
from mtp.modeling.records import Decoded, pad
from mtp.modeling.sampler import Sampler
from mtp.training.collate import collate_rollouts, collate_text
from mtp.training.objectives.head_ce import HeadCE
from mtp.training.objectives.main_ce import MainCE
from mtp.training.objectives.policy import Policy
from mtp.training.objectives.scored import replay_batch
from mtp.training.objectives.stream import StreamInputs

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]
GREEDY = Sampler(temperature=0)
FAST = PhasePlan([4], [None])
PHASES = [{"name": "text", "mode": "fast", "opened_by": None}]


def stock_of(model: Any) -> Any:
    """The stock model with the weights of main."""
    config = type(model.config).from_dict(
        {name: v for name, v in model.config.to_dict().items() if name != "mtp"}
    )
    stock = stock_class(type(model))(config).eval()
    weights = {n: w for n, w in model.state_dict().items() if not n.startswith("mtp_head.")}
    stock.load_state_dict(weights)
    return stock


def decoded(model: Any, plan: PhasePlan, sampler: Sampler, num_tokens: int) -> Decoded:
    """The texts of the prompts, which end at no token."""
    tokens, lengths = pad(PROMPTS, PAD)
    options = DecodeOptions(
        sampler=sampler,
        max_new_tokens=num_tokens,
        pad_id=PAD,
        generator=torch.Generator().manual_seed(0),
    )
    return decode(model, tokens, lengths, plan, options)


def check_slow(model: Any, stock: Any, num_tokens: int) -> None:
    """Slow and verified mode give the tokens that are the stock forward's likeliest."""
    slow = decoded(model, FAST.as_slow(), GREEDY, num_tokens).tokens
    for prompt, new in zip(PROMPTS, slow.tolist(), strict=True):
        logits = stock(input_ids=torch.tensor([prompt + new]), use_cache=False).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == new
    verified = decoded(model, FAST.as_verified(4), GREEDY, num_tokens)
    assert torch.equal(verified.tokens, slow)


def check_generate(model: Any, stock: Any, num_tokens: int) -> None:
    """`generate` in slow mode gives the stock `generate`'s tokens, whatever side is padded."""
    model.generation_config.mtp_phases = PHASES
    given = {
        "max_new_tokens": num_tokens,
        "do_sample": False,
        "pad_token_id": PAD,
        "use_cache": True,
    }
    expected = decoded(model, FAST.as_slow(), GREEDY, num_tokens).tokens.tolist()
    width = max(map(len, PROMPTS))
    whole = torch.tensor([prompt for prompt in PROMPTS if len(prompt) == width])
    (of_stock,) = stock.generate(whole, **given, eos_token_id=None)[:, width:].tolist()
    assert of_stock == expected[-1]
    for side in ("left", "right"):
        ids, mask = [], []
        for prompt in PROMPTS:
            fill, ones = [PAD] * (width - len(prompt)), [1] * len(prompt)
            zeros = [0] * len(fill)
            ids.append(fill + prompt if side == "left" else prompt + fill)
            mask.append(zeros + ones if side == "left" else ones + zeros)
        ids, mask = torch.tensor(ids), torch.tensor(mask)
        out = model.generate(ids, attention_mask=mask, mtp_mode="slow", **given)[:, width:]
        for row, wanted in zip(out.tolist(), expected, strict=True):
            end = wanted.index(EOS) + 1 if EOS in wanted else num_tokens
            assert row[:end] == wanted[:end] and set(row[end:]) <= {PAD}, side


def check_fast(model: Any, num_tokens: int) -> None:
    """Greedy fast mode gives the likeliest tokens of one forward over the text and the head."""
    out = decoded(model, FAST, GREEDY, num_tokens)
    assert int(out.passes.max()) < num_tokens
    scored = replay_batch(model, rollout_batch(out), channel_gradient=1.0, use_head=True)
    assert len(scored.head.targets) > num_tokens
    for rows in (scored.main, scored.head):
        assert torch.equal(rows.output.logits(rows.hidden).argmax(-1), rows.targets)


def rollout_batch(out: Decoded) -> Any:
    """All rows of a record, one with an advantage of 1 and the others with -1."""
    advantages = 2.0 * (torch.arange(len(PROMPTS)) == 0) - 1.0
    rows = list(range(len(PROMPTS)))
    return collate_rollouts(PROMPTS, out, advantages, rows, 4, PAD)


def check_replay(model: Any, stock: Any, num_tokens: int) -> Any:
    """Log-probabilities of sampled tokens are those of replay, and main's those of the stock
    forward. Returns the batch of rollouts.
    """
    out = decoded(model, FAST, Sampler(), num_tokens)
    batch = rollout_batch(out)
    scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
    for emitter, rows in (("main", scored.main), ("head", scored.head)):
        difference = rows.stats().logprob - getattr(batch, emitter).sampled
        assert float(difference.abs().max()) < 1e-4, emitter
    for row, prompt in enumerate(PROMPTS):
        text = torch.tensor([prompt + out.completion(row)])
        of_stock = stock(input_ids=text, use_cache=False).logits[0].log_softmax(-1)
        at = (out.slots[row] == 0).nonzero()[:, 0]
        expected = of_stock[len(prompt) - 1 + at, out.tokens[row, at]]
        assert float((expected - out.logprobs[row, at]).abs().max()) < 1e-4
    return batch


def check_losses(model: Any, stock: Any, rollouts: Any) -> None:
    """An RL step begins at ratios of 1; the supervised loss and its gradient are the stock's."""
    scored = replay_batch(model, rollouts, channel_gradient=1.0, use_head=True)
    terms = Policy(weight=1.0).terms(StreamInputs(scored, rollouts))
    for term, rows in zip(terms.values(), (rollouts.main, rollouts.head), strict=True):
        torch.testing.assert_close(
            term.total.detach(), -rows.advantages.sum(), rtol=1e-3, atol=1e-3
        )
    check_gradient(model, torch.stack([term.total for term in terms.values()]).sum())

    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, VOCABULARY, (3 * WINDOW,), generator=generator).tolist()
    batch = collate_text([(text[:2], text[2:])], FAST, 4, PAD)
    ids, labels = torch.tensor([text]), torch.tensor([text])
    labels[:, :2] = -100
    expected = stock(input_ids=ids, labels=labels, use_cache=False).loss
    expected.backward()
    scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
    inputs = StreamInputs(scored, batch)
    main = MainCE(weight=1.0).terms(inputs)["main_ce"].total / len(batch.main)
    torch.testing.assert_close(main.detach(), expected.detach(), rtol=1e-4, atol=1e-4)
    (head,) = HeadCE(weight=1.0).terms(inputs).values()
    model.zero_grad()
    main.backward(retain_graph=True)
    mine = dict(model.named_parameters())
    for name, parameter in stock.named_parameters():
        if parameter.grad is not None:
            gradient, size = mine[name].grad, float(parameter.grad.abs().max())
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-3 * size + 1e-7)
    check_gradient(model, head.total)


def check_gradient(model: Any, loss: torch.Tensor) -> None:
    """The gradient of a loss of both emitters is finite and reaches main and the head."""
    model.zero_grad()
    loss.backward()
    for part in (model.mtp_decoder, model.mtp_head):
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        assert bool(norm.isfinite()) and float(norm) > 0


def examine(model_type: str, num_tokens: int, *, generate: bool) -> Any:
    """Run the checks on a tiny model of a family, which is returned as it was at first.

    generate: also compare with the stock `generate`, with and without padding on each side.
    """
    model = tiny_family(model_type)
    stock = stock_of(model)
    check_slow_mode(model)
    with torch.no_grad():
        check_slow(model, stock, num_tokens)
        if generate:
            check_generate(model, stock, num_tokens)
        check_fast(model, num_tokens)
        rollouts = check_replay(model, stock, num_tokens)
    check_losses(model, stock, rollouts)
    return tiny_family(model_type)


@dataclass(frozen=True)
class Verdict:
    """A row of the table in docs/models.md."""

    model_type: str
    status: str
    """`yes`, `slower` (without a cache) or `refused`."""
    reason: str = ""
    """The error of a refusal."""


def verdict(model_type: str, num_tokens: int = 60) -> Verdict:
    """Examine a family. Raises AssertionError for one that is taken and fails a check."""
    try:
        model = tiny_family(model_type)
        check_slow_mode(model)
    except ValueError as error:
        said = str(error).splitlines()[0].split("; choose ")[0]
        return Verdict(model_type, "refused", re.sub(r" \(rounding: .*?\)", "", said))
    examine(model_type, num_tokens, generate=True)
    return Verdict(model_type, "slower" if model.reads_whole_text else "yes")
