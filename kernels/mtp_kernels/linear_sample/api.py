"""Sampling from an output layer without its logits: the token and its log-probability per row."""

from typing import NamedTuple

from torch import Tensor

from mtp_kernels.checks import check_integers, check_operands, check_scale
from mtp_kernels.dispatch import autocast_operands, is_direct, resolve_impl
from mtp_kernels.linear_sample.op import sample_op
from mtp_kernels.linear_sample.reference import linear_sample_reference
from mtp_kernels.linear_sample.torch import filtered_torch
from mtp_kernels.noise import seed_rows


class LinearSample(NamedTuple):
    """Per-row results in hidden's leading shape."""

    token: Tensor
    """int64 vocabulary id."""
    logprob: Tensor
    """float32, nats: log-probability of the token under the distribution that it was sampled from;
    for greedy choices, under temperature 1."""


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    seed: int | Tensor,
    position: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    impl: str = "auto",
) -> LinearSample:
    """Samples one token per row of hidden by the Gumbel-max trick: argmax(x + noise).

    All rows, such as the k slots of a parallel head, share one read of the weight. The noise is a
    function of (seed, position, vocabulary id) only, so a sample does not depend on its batch,
    on tile sizes or on the implementation (except for rounding of the logits).

    Args:
        hidden: [..., D] hidden states.
        weight: [V, D] output matrix, hidden's dtype.
        seed: an integer, or int64 that broadcasts to the rows [...]: one per sequence, or sequences
            at the same position would share their noise.
        position: [...] absolute position in tokens of the token to be sampled.
        temperature: divides the logits, after the softcap; 0 chooses the largest logit.
        top_k: sample among this many largest logits only.
        top_p: sample among the smallest set of likeliest tokens with this much probability. With
            top_k or top_p the logits of a chunk of rows are materialised and sorted, in PyTorch,
            whatever impl is: exact, bounded in memory, and slower.
        softcap: c of c * tanh(logits / c), or None.
        bias: [V] added to the logits, or None.
        impl: "auto", "reference", "torch" or "triton".
    """
    hidden, weight, bias = autocast_operands(hidden, weight, bias)  # type: ignore[assignment]
    check_operands(hidden, weight, bias)
    check_scale(temperature, softcap, greedy=True)
    check_rows(hidden, seed, position)
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be >= 1 or None, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1] or None, got {top_p}")
    lead = hidden.shape[:-1]
    rows = hidden.detach().reshape(-1, hidden.shape[-1])
    seeds, positions = seed_rows(seed, position)
    impl = resolve_impl(impl, hidden)
    filtered = temperature > 0 and (top_k is not None or top_p is not None)
    operands = (rows, weight.detach(), bias if bias is None else bias.detach(), seeds, positions)
    if impl == "reference" or (impl == "torch" and is_direct(rows.shape[0], weight, sampling=True)):
        token, logprob = linear_sample_reference(*operands, temperature, softcap, top_k, top_p)
    elif filtered:
        token, logprob = filtered_torch(*operands, temperature, softcap, top_k, top_p)
    else:
        token, logprob = sample_op(*operands, float(temperature), softcap, impl)
    return LinearSample(token.reshape(lead), logprob.reshape(lead))


def check_rows(hidden: Tensor, seed: int | Tensor, position: Tensor) -> None:
    """Raises ValueError unless seed and position are integers and position is one per row."""
    if position.shape != hidden.shape[:-1]:
        raise ValueError(
            f"position must have hidden's leading shape {tuple(hidden.shape[:-1])}, "
            f"got {tuple(position.shape)}"
        )
    check_integers(seed=seed, position=position)
