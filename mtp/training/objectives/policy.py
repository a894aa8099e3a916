"""The policy objective: learning from rollouts through their advantages, each emitter over its
count.

    L = - sum_t w_t surrogate(r_t, A) / count

The action of a pass is its block, and the log-probability of a block is the sum over its kept
slots, so main's tokens and the head's are all actions of one policy. Advantage, ratio r, surrogate
and count are those of an algorithm of `mtp.training.algorithms`. w_t is 1, or with `correction_cap`
the truncated importance weight of Yao et al. 2025 ("Your efficient RL framework secretly brings you
off-policy RL training"), for samplers whose log-probabilities differ from replay's.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...common.bounds import bounded
from ..algorithms import ALGORITHMS, NORMALIZERS, RATIOS, Algorithm, Division, PolicyTokens
from ..batch import PolicyRows, RolloutBatch, TextBatch
from .stream import Reads, Stream, StreamInputs, Term, max_of, mean_of, rollouts_of


@dataclass(kw_only=True)
class Policy(Stream):
    """Settings of the stream `policy`."""

    weight: float = bounded(0.0, at_least=0)
    """Weight of main's tokens."""
    head_weight: float = bounded(1.0, at_least=0)
    """Weight of the head's tokens, times `weight`."""
    algorithm: str = "dapo"
    """Algorithm: grpo, dapo, dr_grpo, rloo, gspo, cispo or reinforce_pp; the default of the
    settings below."""
    ratio: str | None = None
    """Rule of importance ratios: `token`, `block`, `sequence` (GSPO's) or `rollout`; see
    `algorithms/ratio.py`."""
    normalizer: str | None = None
    """Rule of division: `tokens`, `sequences`, `rollouts` or `length`; see
    `algorithms/normalizer.py`."""
    length: int = bounded(0, at_least=0)
    """Number of tokens for the normaliser `length`; decoding.max_new_tokens is the usual choice."""
    clip_low: float | None = bounded(None, at_least=0)
    """Clip range of main's ratios, 1 - clip_low .. 1 + clip_high."""
    clip_high: float | None = bounded(None, at_least=0)
    """Upper part of that range; null: the algorithm's."""
    head_clip_low: float | None = bounded(None, at_least=0)
    """Clip range of the head's ratios; null: main's."""
    head_clip_high: float | None = bounded(None, at_least=0)
    """Upper part of that range; null: main's."""
    correction_cap: float = bounded(0.0, at_least=0)
    """Maximum of a token's truncated importance weight p_old / p_sampled, usually 2; 0: no
    correction. Has an effect only with `rollouts.recompute_old`, which takes p_old from replay."""

    @property
    def reads(self) -> Reads:
        return "rollouts"

    def validate(self, key: str) -> None:
        """Raises ValueError naming the key of an impossible value."""
        ALGORITHMS.check(self.algorithm, f"{key}.algorithm")
        RATIOS.check(self.ratio, f"{key}.ratio", optional=True)
        NORMALIZERS.check(self.normalizer, f"{key}.normalizer", optional=True)
        if self.rules().normalizer.needs_length and self.length < 1:
            raise ValueError(
                f"{key}.length must be the number of tokens that a rollout's sum is divided by, "
                f"got {self.length}; set it to the value of decoding.max_new_tokens"
            )

    def rules(self) -> Algorithm:
        """The named algorithm, with the parts that the config sets replaced."""
        algorithm = ALGORITHMS.get(self.algorithm, "algorithm")
        if self.ratio is not None:
            algorithm = replace(algorithm, ratio=RATIOS.get(self.ratio, "ratio"))
        if self.normalizer is not None:
            normalizer = NORMALIZERS.get(self.normalizer, "normalizer")
            algorithm = replace(algorithm, normalizer=normalizer)
        if self.clip_low is not None:
            algorithm = replace(algorithm, clip_low=self.clip_low)
        if self.clip_high is not None:
            algorithm = replace(algorithm, clip_high=self.clip_high)
        return algorithm

    def clips(self) -> dict[str, tuple[float, float]]:
        """Clip range (low, high) by emitter."""
        rules = self.rules()
        return {
            "main": (rules.clip_low, rules.clip_high),
            "head": (
                rules.clip_low if self.head_clip_low is None else self.head_clip_low,
                rules.clip_high if self.head_clip_high is None else self.head_clip_high,
            ),
        }

    def counts(self, batch: TextBatch) -> dict[str, float | Tensor]:
        """Divisor of each emitter's sum, over all micro-batches."""
        batch = rollouts_of(batch)
        return {
            "policy_main": self._division(batch, batch.main).count,
            "policy_head": self._division(batch, batch.head).count,
        }

    def _division(self, batch: RolloutBatch, rows: PolicyRows) -> Division:
        return self.rules().normalizer.divide(rows, batch, self.length)

    def terms(self, inputs: StreamInputs) -> dict[str, Term]:
        """Surrogate of each emitter, under the distribution that the rollouts came from."""
        batch = rollouts_of(inputs.batch)
        rules, clips, stats = self.rules(), self.clips(), inputs.scored.stats(inputs.sampler)
        emitters = {"main": batch.main, "head": batch.head}
        weights = {"main": self.weight, "head": self.weight * self.head_weight}
        ratios = rules.ratio(
            torch.cat([stats[name].logprob - rows.old for name, rows in emitters.items()]),
            torch.cat([batch.blocks(rows) for rows in emitters.values()]),
            torch.cat([rows.rollouts for rows in emitters.values()]),
        ).split([len(rows) for rows in emitters.values()])
        terms = {}
        for (name, rows), ratio in zip(emitters.items(), ratios, strict=True):
            low, high = clips[name]
            logprob, entropy = stats[name]
            tokens = PolicyTokens(logprob, rows.old, entropy, ratio, rows.advantages, low, high)
            gain = rules.surrogate(tokens)
            if self.correction_cap:
                gain = gain * (rows.old - rows.sampled).exp().clamp(max=self.correction_cap)
            gain = gain / self._division(batch, rows).divisors
            metrics, maxima = _metrics(name, tokens, logprob - rows.sampled)
            terms[f"policy_{name}"] = Term(-gain.sum(), weights[name], metrics, maxima)
        return terms


@torch.no_grad()
def _metrics(
    name: str, tokens: PolicyTokens, difference: Tensor
) -> tuple[dict[str, tuple[Tensor, int]], dict[str, Tensor]]:
    """Metrics of the distance between policy and sampler, and of the share of clipped tokens.

    difference: [R] log p - log p_sampled.
    """
    is_low = (tokens.ratio < 1 - tokens.clip_low) & (tokens.advantage < 0)
    is_high = (tokens.ratio > 1 + tokens.clip_high) & (tokens.advantage > 0)
    metrics = {
        f"{name}/clip_ratio": mean_of(is_low | is_high),
        f"{name}/clip_ratio_low": mean_of(is_low),
        f"{name}/clip_ratio_high": mean_of(is_high),
        f"{name}/sampling_logp_difference": mean_of(difference.abs()),
        f"{name}/importance_sampling_ratio": mean_of(difference.exp()),
        f"{name}/entropy": mean_of(tokens.entropy),
    }
    maxima = {
        f"{name}/sampling_logp_difference_max": max_of(difference.abs()),
        f"{name}/importance_sampling_ratio_max": max_of(difference.exp()),
    }
    return metrics, maxima
