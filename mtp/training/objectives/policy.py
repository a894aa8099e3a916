"""The policy objective: learning from rollouts through their advantages, each emitter over its
count.

    L = - sum_t w_t surrogate(r_t, A) / count

The action of a pass is its block, and the log-probability of a block is the sum over its kept
slots, so main's tokens and the head's are all actions of one policy. Advantage, ratio r, surrogate
and count are those of an algorithm of `mtp.training.algorithms`. w_t is 1, or with `correction_cap`
the truncated importance weight of Yao et al. 2025 ("Your efficient RL framework secretly brings you
off-policy RL training"), for samplers whose log-probabilities differ from replay's.

Where main alone samples (slow and verified rollouts), main's tokens are the actions. The head's
rows score them once more, so they are in no ratio of main's, and each has a ratio of its own.

With top-k or top-p a token may have probability 0 in replay: its ratio is 0. One whose probability
was 0 in the replay before the update has no ratio, and counts as a token without gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...common.bounds import bounded
from ..algorithms import ALGORITHMS, NORMALIZERS, RATIOS, Algorithm, Division, PolicyTokens
from ..algorithms.ratio import Ratio
from ..batch import PolicyRows, RolloutBatch, TextBatch
from .stream import Reads, Stream, StreamInputs, Term, max_of, mean_of, mean_where, rollouts_of

FLOOR = -1e6
"""Log-probability in place of an impossible token's -inf, so that no difference is NaN. Its
mean over a rollout is below -50 for up to 20,000 tokens, a ratio of 0."""


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

    @property
    def trains_head(self) -> bool:
        return self.head_weight > 0

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
        logprobs = {name: stats[name].logprob.clamp(min=FLOOR) for name in emitters}
        has_ratio = {name: rows.old > FLOOR for name, rows in emitters.items()}
        old = {
            name: torch.where(has_ratio[name], rows.old, logprobs[name].detach())
            for name, rows in emitters.items()
        }
        differences = {name: logprobs[name] - old[name] for name in emitters}
        if batch.head_samples:
            ratios = _ratios(rules.ratio, batch, differences)
        else:
            mine = {"main": differences["main"]}
            ratios = _ratios(rules.ratio, batch, mine) | {"head": differences["head"].exp()}
        terms = {}
        for name, rows in emitters.items():
            low, high = clips[name]
            tokens = PolicyTokens(
                logprobs[name],
                old[name],
                stats[name].entropy,
                ratios[name],
                rows.advantages,
                low,
                high,
            )
            gain = torch.where(has_ratio[name], rules.surrogate(tokens), 0.0)
            if self.correction_cap:
                gain = gain * (old[name] - rows.sampled).exp().clamp(max=self.correction_cap)
            gain = gain / self._division(batch, rows).divisors
            metrics, maxima = _metrics(name, tokens, stats[name].logprob - rows.sampled)
            terms[f"policy_{name}"] = Term(-gain.sum(), weights[name], metrics, maxima)
        return terms


def _ratios(
    rule: Ratio, batch: RolloutBatch, differences: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Ratios of each emitter's tokens, of those that are given as one group of tokens."""
    rows = {name: batch.main if name == "main" else batch.head for name in differences}
    found = rule(
        torch.cat(list(differences.values())),
        torch.cat([batch.blocks(one) for one in rows.values()]),
        torch.cat([one.rollouts for one in rows.values()]),
    )
    return dict(zip(rows, found.split([len(one) for one in rows.values()]), strict=True))


@torch.no_grad()
def _metrics(
    name: str, tokens: PolicyTokens, difference: Tensor
) -> tuple[Mapping[str, tuple[Tensor, int | Tensor]], dict[str, Tensor]]:
    """Metrics of the distance between policy and sampler, and of the share of clipped tokens.

    difference: [R] log p - log p_sampled; one that is infinite, of a token that is impossible in
    replay, is left out of its own metrics.
    """
    apart = difference.abs()
    is_low = (tokens.ratio < 1 - tokens.clip_low) & (tokens.advantage < 0)
    is_high = (tokens.ratio > 1 + tokens.clip_high) & (tokens.advantage > 0)
    metrics: dict[str, tuple[Tensor, int | Tensor]] = {
        f"{name}/clip_ratio": mean_of(is_low | is_high),
        f"{name}/clip_ratio_low": mean_of(is_low),
        f"{name}/clip_ratio_high": mean_of(is_high),
        f"{name}/sampling_logp_difference": mean_where(apart, apart.isfinite()),
        f"{name}/importance_sampling_ratio": mean_of(difference.exp()),
        f"{name}/entropy": mean_of(tokens.entropy),
    }
    maxima = {
        f"{name}/sampling_logp_difference_max": max_of(apart.where(apart.isfinite(), 0.0)),
        f"{name}/importance_sampling_ratio_max": max_of(difference.exp()),
    }
    return metrics, maxima
