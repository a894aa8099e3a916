"""The policy objective: clipped importance ratios, token by token, each emitter over its own count.

    L = - sum_t min(r_t A, clip(r_t, 1 - low, 1 + high) A) / count,   r_t = p(t) / p_sampled(t)

GRPO (Shao et al. 2024, arXiv 2402.03300) with DAPO's asymmetric clip (Yu et al. 2025, arXiv
2503.14476). The action of a pass is its block, and the log-probability of a block is the sum over
its kept slots, so main's tokens and the head's are all actions of the one policy.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import RolloutBatch, TextBatch
from ..generation_mtp import Sampler
from .scored import PLAIN, Emitter, Scored
from .stream import Term, mean_of


@dataclass(kw_only=True)
class Policy:
    """`policy`"""

    weight: float = 0.0
    """Of main's tokens."""
    head_weight: float = 1.0
    """Of the head's tokens, times `weight`."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    """Clip-higher: unlikely tokens may grow faster than likely ones shrink."""

    def counts(self, batch: TextBatch) -> dict[str, float]:
        """Tokens of each emitter."""
        return {"policy_main": len(batch.main_rows), "policy_head": len(batch.head_rows)}

    def terms(
        self, scored: Scored, batch: RolloutBatch, sampler: Sampler = PLAIN
    ) -> dict[str, Term]:
        """Clipped surrogate of each emitter, under the distribution that the rollouts came from."""
        rows = {
            "main": (scored.main, batch.main_sampled, batch.main_advantages, self.weight),
            "head": (
                scored.head,
                batch.head_sampled,
                batch.head_advantages,
                self.weight * self.head_weight,
            ),
        }
        return {
            f"policy_{name}": self._term(name, *values, sampler) for name, values in rows.items()
        }

    def _term(
        self,
        name: str,
        emitter: Emitter,
        sampled: Tensor,
        advantages: Tensor,
        weight: float,
        sampler: Sampler,
    ) -> Term:
        stats = emitter.stats(sampler)
        difference = stats.logprob - sampled
        ratio = difference.exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        surrogate = torch.minimum(ratio * advantages, clipped * advantages)
        with torch.no_grad():
            metrics = {
                f"{name}/entropy": mean_of(stats.entropy),
                f"{name}/clip_ratio": mean_of(ratio * advantages > clipped * advantages),
                f"{name}/sampling_logp_difference": mean_of(difference.abs()),
                f"{name}/importance_sampling_ratio": mean_of(ratio),
            }
        return Term(-surrogate.sum(), weight, metrics)
