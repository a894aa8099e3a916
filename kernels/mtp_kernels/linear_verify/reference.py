"""`linear_verify` as plain PyTorch on all the logits: the definition.

Speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318): a draft y
from distribution q is accepted with probability min(1, p(y) / q(y)); the first rejected one is
resampled from max(p - q, 0), normalised. The resulting tokens are distributed as p.
"""

import torch
from torch import Tensor

from mtp_kernels.noise import STREAM_RESIDUAL, gumbel
from mtp_kernels.rowstats import NEGATIVE


def count_accepted(accept: Tensor) -> Tensor:
    """[N] the length of the prefix of accept [N, K] that is all True."""
    return accept.long().cumprod(-1).sum(-1)


def residual_best(
    log_p: Tensor, log_q: Tensor, seed: Tensor, position: Tensor, start: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(best score, its token, its log p), each [R], for samples of max(p - q, 0).

    A row whose log_q is all minus infinity samples from p. Scores without any residual stay below
    NEGATIVE / 2. start is the vocabulary id of the first column.
    """
    residual = log_p.exp() - log_q.exp()
    noise = gumbel(seed, position, STREAM_RESIDUAL, start, log_p.shape[1])
    score = torch.where(residual > 0, residual.clamp_min(2e-38).log() + noise, NEGATIVE)
    token = score.argmax(-1)
    return score.amax(-1), token + start, log_p.gather(-1, token[:, None])[:, 0]
