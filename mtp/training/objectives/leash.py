"""The leash: KL of each emitter to a frozen reference LM over the flat text.

Main's distribution at each of its tokens, and the head's at each of its slots, against the
reference's next-token distribution at the same position of the flat text. The second is on-policy
self-distillation, and it is the one that keeps thoughts true: false tokens are mostly the head's.

Kinds. `full` sums over the vocabulary, at temperature 1. `k1` and `k3` (Schulman, "Approximating KL
divergence", 2020) estimate KL(policy || reference) under the sampler's distribution from the tokens
that it drew, with d = log reference - log policy:

    k1 = -d                      its gradient is that of the KL: sg(-d) grad log policy
    k3 = exp(d) - d - 1          never negative; its gradient is that of its own value, as in GRPO
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...modeling.output_layer import OutputLayer
from ...modeling.sampler import Sampler
from ..batch import TextBatch
from .scored import PLAIN, OutputRows, Scored
from .stream import Term, mean_of

KINDS = ("full", "k1", "k3")


@dataclass(kw_only=True)
class Leash:
    """`leash`"""

    weight: float = 0.0
    """Of main's tokens."""
    head_weight: float = 1.0
    """Of the head's tokens, times `weight`."""
    kind: str = "full"
    """`full`, or the estimator `k1` or `k3`, which needs rollouts."""
    reverse: bool = True
    """Of `full`. True: KL(policy || reference), what RL's leash is. False: KL(reference ||
    policy)."""

    def validate(self, key: str) -> None:
        """Raises ValueError naming the key of an impossible value."""
        if self.kind not in KINDS:
            raise ValueError(f"{key}.kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind != "full" and not self.reverse:
            raise ValueError(
                f"{key}.kind={self.kind} estimates KL(policy || reference) only, got "
                f"{key}.reverse=false; use {key}.kind=full"
            )

    def counts(self, batch: TextBatch) -> dict[str, float]:
        """Tokens of each emitter."""
        return {"leash_main": len(batch.main_rows), "leash_head": len(batch.head_rows)}

    def terms(
        self,
        scored: Scored,
        batch: TextBatch,
        reference_hidden: Tensor,
        reference_output: OutputLayer,
        sampler: Sampler = PLAIN,
    ) -> dict[str, Term]:
        """Sum of the divergence over each emitter's tokens, in nats.

        reference_hidden: [B * T, D] rows of the frozen reference over the same text, without
        gradient; reference_output: its output layer; sampler: of the rollouts, for the
        estimators.
        """
        terms = {}
        for name, emitter, rows, weight in (
            ("main", scored.main, batch.main_rows, self.weight),
            ("head", scored.head, batch.head_positions, self.weight * self.head_weight),
        ):
            if self.kind == "full":
                kl = emitter.kl(reference_hidden, reference_output, rows, reverse=self.reverse)
            else:
                reference = OutputRows(
                    reference_hidden[rows], reference_output, emitter.targets, emitter.impl
                )
                kl = estimate(self.kind, emitter, reference, sampler)
            terms[f"leash_{name}"] = Term(kl.sum(), weight, {f"{name}/kl": mean_of(kl.detach())})
        return terms


def estimate(kind: str, policy: OutputRows, reference: OutputRows, sampler: Sampler) -> Tensor:
    """[R] nats: the estimator of each token. Raises ValueError for a sampler that truncates.

    Such a sampler gives probability 0 to tokens that the reference would write, and the divergence
    from tokens that were drawn says nothing of them.
    """
    if sampler.truncates:
        raise ValueError(
            f"objective.leash.kind={kind} needs decoding.top_k=0 and decoding.top_p=1, got "
            f"{sampler.top_k} and {sampler.top_p}; use objective.leash.kind=full"
        )
    logprob = policy.stats(sampler).logprob
    with torch.no_grad():
        expected = reference.stats(sampler).logprob
    if kind == "k3":
        difference = expected - logprob
        return difference.exp() - difference - 1
    value = (logprob - expected).detach()
    return value + value * (logprob - logprob.detach())
