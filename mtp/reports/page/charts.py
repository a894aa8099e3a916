"""Curves over training: which logged metrics share a plot, in which unit, on which axis."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Chart:
    """One plot over steps. A metric that a run did not log is left out."""

    key: str
    title: str
    unit: str
    """Label of the y axis with its unit."""
    metrics: tuple[str, ...]
    """Names in metrics.jsonl."""
    log: bool = False
    """Logarithmic y axis, for what grows by factors."""
    share: bool = False
    """Values are shares, shown in per cent."""


CHARTS = (
    Chart("reward", "Right answers of rollouts", "share; its deviation within a group",
          ("reward", "reward_std")),
    Chart("terms", "Reward terms", "mean per rollout",
          ("reward/passes", "reward/tokens", "reward/format", "reward/legibility",
           "reward/overlong")),
    Chart("kl", "KL to the reference", "KL (nats per token, log scale)",
          ("main/kl", "head/kl", "preserve/kl"), log=True),
    Chart("reference", "Thoughts under the reference", "negative log-likelihood (nats per token)",
          ("eval/reference_nats_per_token",)),
    Chart("drift", "Drift of token frequencies from the solver's",
          "Jensen-Shannon divergence (bits, log scale)", ("unigram_drift", "eval/unigram_drift"),
          log=True),
    Chart("true", "True steps in thoughts", "share of steps (%)",
          ("true_steps", "eval/true_steps"), share=True),
    Chart("entropy", "Entropy", "nats per token", ("main/entropy", "head/entropy")),
    Chart("loss", "Loss", "weighted sum of streams (nats)", ("loss",)),
    Chart("gradient", "Gradient norms before clipping", "norm (log scale)",
          ("main/grad_norm", "head/grad_norm"), log=True),
    Chart("split", "Main's policy gradient by whose tokens it comes from", "norm (log scale)",
          ("main/grad_norm_own", "main/grad_norm_channel"), log=True),
    Chart("cosine", "Cosine of the two parts of main's policy gradient", "cosine",
          ("main/grad_cosine",)),
    Chart("clip", "Clipped ratios", "share of tokens (%)",
          ("main/clip_ratio", "head/clip_ratio"), share=True),
    Chart("passes", "Length of rollouts", "per rollout (log scale)",
          ("passes", "completions/mean_length"), log=True),
    Chart("speed", "Throughput", "tokens per second (log scale)", ("tokens_per_second",), log=True),
)  # fmt: skip


def curve_names(records: list[dict[str, Any]]) -> list[str]:
    """Metrics of the charts that some record has."""
    logged = {name for record in records for name in record}
    return [name for chart in CHARTS for name in chart.metrics if name in logged]
