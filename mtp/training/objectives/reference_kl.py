"""Reference KL: KL of each emitter to a frozen reference LM over the flat text.

The stream compares main's distribution at each of its tokens, and the head's at each of its slots,
with the reference's next-token distribution at the same position of the flat text. The second part
is on-policy self-distillation; it keeps thoughts true, since most false tokens are the head's.

Kinds. `full` sums over the vocabulary, at temperature 1. `k1` and `k3` (Schulman, "Approximating KL
divergence", 2020) estimate KL(policy || reference) under the sampler's distribution from the
sampled tokens, with d = log reference - log policy:

    k1 = -d                      its gradient is that of the KL: sg(-d) grad log policy
    k3 = exp(d) - d - 1          never negative; its gradient is that of its own value, as in GRPO
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...common.bounds import bounded
from ...modeling.sampler import Sampler
from ..batch import TextBatch
from .scored import OutputRows
from .stream import Reads, Stream, StreamInputs, Term, mean_of

KINDS = ("full", "k1", "k3")


@dataclass(kw_only=True)
class ReferenceKL(Stream):
    """Settings of the stream `reference_kl`."""

    needs_reference: ClassVar[bool] = True

    weight: float = bounded(0.0, at_least=0)
    """Weight of main's tokens."""
    head_weight: float = bounded(1.0, at_least=0)
    """Weight of the head's tokens, times `weight`."""
    kind: str = "full"
    """Kind of divergence: `full`, or the estimator `k1` or `k3` of KL(policy || reference), which
    needs rollouts."""
    reverse: bool = False
    """Direction of `full`. False: KL(reference || policy). True: KL(policy || reference)."""

    @property
    def reads(self) -> Reads:
        return "text" if self.kind == "full" else "rollouts"

    @property
    def trains_head(self) -> bool:
        return self.head_weight > 0

    def validate(self, key: str) -> None:
        """Raises ValueError naming the key of an impossible value."""
        if self.kind not in KINDS:
            raise ValueError(f"{key}.kind must be one of {', '.join(KINDS)}, got {self.kind!r}")

    def counts(self, batch: TextBatch) -> dict[str, float]:
        """Number of tokens of each emitter."""
        return {"reference_kl_main": len(batch.main), "reference_kl_head": len(batch.head)}

    def terms(self, inputs: StreamInputs) -> dict[str, Term]:
        """Sum of the divergence over each emitter's tokens, in nats."""
        scored, batch, reference = inputs.scored, inputs.batch, inputs.reference_rows()
        terms = {}
        for name, emitter, rows, weight in (
            ("main", scored.main, batch.main.positions, self.weight),
            ("head", scored.head, batch.head.positions, self.weight * self.head_weight),
        ):
            if self.kind == "full":
                kl = emitter.kl(reference.hidden, reference.output, rows, reverse=self.reverse)
            else:
                other = OutputRows(
                    reference.hidden[rows], reference.output, emitter.targets, emitter.impl
                )
                kl = estimate(self.kind, emitter, other, inputs.sampler)
            metrics = {f"{name}/kl": mean_of(kl.detach())}
            terms[f"reference_kl_{name}"] = Term(kl.sum(), weight, metrics)
        return terms


def estimate(kind: str, policy: OutputRows, reference: OutputRows, sampler: Sampler) -> Tensor:
    """[R] nats: the estimator of each token. Raises ValueError for a sampler that truncates.

    A truncating sampler gives probability 0 to tokens that the reference would write, so sampled
    tokens cannot estimate the divergence there.
    """
    if sampler.truncates:
        raise ValueError(
            f"objective.reference_kl.kind={kind} needs decoding.top_k=0 and decoding.top_p=1, got "
            f"{sampler.top_k} and {sampler.top_p}; use objective.reference_kl.kind=full"
        )
    logprob = policy.stats(sampler).logprob
    with torch.no_grad():
        expected = reference.stats(sampler).logprob
    if kind == "k3":
        difference = expected - logprob
        return difference.exp() - difference - 1
    value = (logprob - expected).detach()
    return value + value * (logprob - logprob.detach())
