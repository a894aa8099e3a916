"""Log-probability, log-sum-exp, entropy and argmax of an output layer, without its logits."""

from typing import NamedTuple

from torch import Tensor

from mtp_kernels.checks import check_operands, check_scale
from mtp_kernels.dispatch import autocast_operands, is_direct, resolve_impl
from mtp_kernels.linear_logprob.op import logprob_op
from mtp_kernels.linear_logprob.reference import linear_logprob_reference
from mtp_kernels.targets import resolve_targets


class LinearLogprob(NamedTuple):
    """Per-row results in hidden's leading shape; nats; float32 (float64 for float64 operands)."""

    logprob: Tensor
    """Log-probability of the target, at most 0; 0 in ignored rows."""
    lse: Tensor
    """Log-sum-exp of the scaled logits; 0 in ignored rows."""
    entropy: Tensor
    """Entropy of the distribution; 0 in ignored rows."""
    argmax: Tensor
    """int64 id of the largest logit, the lowest of ties; -1 in ignored rows. No gradient."""


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    *,
    tokens: Tensor | None = None,
    shift: int = 1,
    document: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    impl: str = "auto",
) -> LinearLogprob:
    """Row statistics of `hidden @ weight.T`. Per row, with x the scaled logits:

        x = softcap * tanh((weight @ hidden + bias) / softcap) / temperature
        logprob, lse = log_softmax(x)[target], logsumexp(x)
        entropy, argmax = -(softmax(x) * log_softmax(x)).sum(), x.argmax()

    Targets are given explicitly, or as the tokens themselves: then slot j of hidden [B, T, K, D]
    at position t is scored on tokens[b, t + shift + j] (see `mtp_kernels.targets`).

    Args:
        hidden: [..., D] hidden states; [B, T, K, D] with tokens.
        weight: [V, D] output matrix, hidden's dtype.
        target: [...] integer ids in [0, V), or ignore_index.
        tokens: [B, T] integer ids; exactly one of target and tokens is given.
        shift: tokens from a position to the target of its slot 0.
        document: [B, T] document ids; with tokens, a target in another document is ignored.
        mask: [B, T] bool; with tokens, True where a token may be a target.
        temperature: divides the logits, after the softcap.
        softcap: c of c * tanh(logits / c), or None.
        bias: [V] added to the logits, or None.
        ignore_index: target value of rows that are left out; None: no row is, and a GPU is not
            waited for to count them or to check the targets: there the log-probability of a
            target outside of the vocabulary is NaN.
        impl: "auto", "reference", "torch" or "triton".

    Gradients flow to hidden, weight and bias from any use of logprob, lse and entropy. The backward
    makes the logits again, chunk by chunk; only problems small enough to be run as plain PyTorch
    (and impl="reference") can be differentiated twice.
    """
    hidden, weight, bias = autocast_operands(hidden, weight, bias)  # type: ignore[assignment]
    check_operands(hidden, weight, bias)
    check_scale(temperature, softcap)
    lead = hidden.shape[:-1]
    target = resolve_targets(
        hidden,
        target,
        tokens,
        shift=shift,
        document=document,
        mask=mask,
        ignore_index=ignore_index,
    ).reshape(-1)
    rows = hidden.reshape(-1, hidden.shape[-1])
    impl = resolve_impl(impl, hidden)
    if impl == "reference" or (impl == "torch" and is_direct(rows.shape[0], weight)):
        values = linear_logprob_reference(
            rows, weight, bias, target, temperature, softcap, ignore_index
        )
    else:
        values = logprob_op(
            rows, weight, bias, target, float(temperature), softcap, ignore_index, impl
        )
    return LinearLogprob(*(value.reshape(lead) for value in values))
