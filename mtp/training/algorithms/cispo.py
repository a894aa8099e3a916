"""CISPO (MiniMax-M1, 2025, arXiv 2506.13585): the ratio is a bounded weight, no token is dropped.

    maximize  sg(clip(r, 1 - low, 1 + high)) A log p

There is no lower bound (`clip_low` 1), and the weight of a token is at most five.
"""

from torch import Tensor

from .algorithm import Algorithm, PolicyTokens


def weighted_logprob(tokens: PolicyTokens) -> Tensor:
    """The surrogate above: gradient reaches every token through its log-probability."""
    return tokens.clipped_ratio.detach() * tokens.advantage * tokens.logprob


CISPO = Algorithm(surrogate=weighted_logprob, clip_low=1.0, clip_high=4.0)
