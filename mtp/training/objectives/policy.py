"""The policy objective: what rollouts teach through their advantages, each emitter over its count.

    L = - sum_t w_t surrogate(r_t, A) / count

The action of a pass is its block, and the log-probability of a block is the sum over its kept
slots, so main's tokens and the head's are all actions of one policy. Advantage, ratio r, surrogate
and count are those of an algorithm of `mtp.training.algorithms`. w_t is 1, or with `correction_cap`
the truncated importance weight of Yao et al. 2025 ("Your efficient RL framework secretly brings you
off-policy RL training"), for samplers whose log-probabilities differ from replay's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...modeling.sampler import Sampler
from ..algorithms import ALGORITHMS
from ..algorithms.algorithm import NORMALIZERS, RATIOS, Algorithm
from ..algorithms.ratio import importance_ratio, segment_sum
from ..batch import RolloutBatch
from .scored import PLAIN, Scored
from .stream import Term, max_of, mean_of


@dataclass(kw_only=True)
class Policy:
    """`policy`"""

    weight: float = 0.0
    """Of main's tokens."""
    head_weight: float = 1.0
    """Of the head's tokens, times `weight`."""
    algorithm: str = "dapo"
    """grpo, dapo, dr_grpo, rloo, gspo, cispo or reinforce_pp; sets whatever below is null."""
    ratio: str | None = None
    """`token`, `block`, `sequence` (GSPO's) or `rollout`; see `algorithms/ratio.py`."""
    normalizer: str | None = None
    """`tokens`, `sequences`, `rollouts` or `length`; see `algorithms/algorithm.py`."""
    length: int = 0
    """Tokens, for the normaliser `length`; decoding.max_new_tokens is the usual choice."""
    clip_low: float | None = None
    """Ratios of main's tokens are clipped to 1 - clip_low .. 1 + clip_high."""
    clip_high: float | None = None
    head_clip_low: float | None = None
    """Of the head's tokens; null: as main's."""
    head_clip_high: float | None = None
    correction_cap: float = 0.0
    """Largest truncated importance weight p_old / p_sampled of a token, 2 being usual; 0: none.
    Has an effect where `stages.*.recompute_old` takes p_old from replay."""

    @property
    def preset(self) -> Algorithm:
        """The algorithm that was named."""
        return ALGORITHMS[self.algorithm]

    def validate(self, key: str) -> None:
        """Raises ValueError naming the key of an impossible value."""
        for name, known in (
            ("algorithm", list(ALGORITHMS)),
            ("ratio", [None, *RATIOS]),
            ("normalizer", [None, *NORMALIZERS]),
        ):
            if getattr(self, name) not in known:
                shown = ", ".join("null" if value is None else value for value in known)
                raise ValueError(
                    f"{key}.{name} must be one of {shown}, got {getattr(self, name)!r}"
                )
        if self._normalizer == "length" and self.length < 1:
            raise ValueError(
                f"{key}.length must be the number of tokens that a rollout's sum is divided by, "
                f"got {self.length}; set it to the value of decoding.max_new_tokens"
            )
        names = ("clip_low", "clip_high", "head_clip_low", "head_clip_high", "correction_cap")
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{key}.{name} must be 0 or above, got {value}")

    @property
    def _normalizer(self) -> str:
        return self.normalizer or self.preset.normalizer

    def clips(self) -> dict[str, tuple[float, float]]:
        """(low, high) by emitter."""
        low = self.preset.clip_low if self.clip_low is None else self.clip_low
        high = self.preset.clip_high if self.clip_high is None else self.clip_high
        return {
            "main": (low, high),
            "head": (
                low if self.head_clip_low is None else self.head_clip_low,
                high if self.head_clip_high is None else self.head_clip_high,
            ),
        }

    def counts(self, batch: RolloutBatch) -> dict[str, float]:
        """What each emitter's sum is divided by, over all micro-batches."""
        rollouts = {"main": batch.main.rollouts, "head": batch.head.rollouts}
        return {f"policy_{name}": self._count(ids, batch) for name, ids in rollouts.items()}

    def _count(self, rollouts: Tensor, batch: RolloutBatch) -> float:
        if self._normalizer == "tokens":
            return len(rollouts)
        if self._normalizer == "sequences":
            return len(rollouts.unique())
        return batch.num_rollouts * (self.length if self._normalizer == "length" else 1)

    def terms(
        self, scored: Scored, batch: RolloutBatch, sampler: Sampler = PLAIN
    ) -> dict[str, Term]:
        """Surrogate of each emitter, under the distribution that the rollouts came from."""
        stats = scored.stats(sampler)
        old = {"main": batch.main.old, "head": batch.head.old}
        sampled = {"main": batch.main.sampled, "head": batch.head.sampled}
        advantages = {"main": batch.main.advantages, "head": batch.head.advantages}
        rollouts = {"main": batch.main.rollouts, "head": batch.head.rollouts}
        weights = {"main": self.weight, "head": self.weight * self.head_weight}
        num_main = len(batch.main)
        ratios = importance_ratio(
            torch.cat([stats[name].logprob - old[name] for name in ("main", "head")]),
            self.ratio or self.preset.ratio,
            torch.cat([batch.blocks(batch.main), batch.blocks(batch.head)]),
            torch.cat([batch.main.rollouts, batch.head.rollouts]),
        )
        ratio = {"main": ratios[:num_main], "head": ratios[num_main:]}
        terms = {}
        for name, (low, high) in self.clips().items():
            logprob = stats[name].logprob
            gain = self.preset.surrogate(ratio[name], logprob, advantages[name], low, high)
            if self.correction_cap:
                gain = gain * (old[name] - sampled[name]).exp().clamp(max=self.correction_cap)
            if self._normalizer == "sequences":
                gain = gain / segment_sum(torch.ones_like(gain), rollouts[name])
            metrics, maxima = _metrics(
                name, ratio[name], advantages[name], logprob - sampled[name], low, high
            )
            metrics[f"{name}/entropy"] = mean_of(stats[name].entropy)
            terms[f"policy_{name}"] = Term(-gain.sum(), weights[name], metrics, maxima)
        return terms


@torch.no_grad()
def _metrics(
    name: str, ratio: Tensor, advantages: Tensor, difference: Tensor, low: float, high: float
) -> tuple[dict[str, tuple[Tensor, int]], dict[str, Tensor]]:
    """How far the policy is from the sampler, and how many tokens the clip holds back."""
    is_low = (ratio < 1 - low) & (advantages < 0)
    is_high = (ratio > 1 + high) & (advantages > 0)
    metrics = {
        f"{name}/clip_ratio": mean_of(is_low | is_high),
        f"{name}/clip_ratio_low": mean_of(is_low),
        f"{name}/clip_ratio_high": mean_of(is_high),
        f"{name}/sampling_logp_difference": mean_of(difference.abs()),
        f"{name}/importance_sampling_ratio": mean_of(difference.exp()),
    }
    maxima = {
        f"{name}/sampling_logp_difference_max": max_of(difference.abs()),
        f"{name}/importance_sampling_ratio_max": max_of(difference.exp()),
    }
    return metrics, maxima
