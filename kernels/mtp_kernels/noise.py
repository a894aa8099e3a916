"""Counter-based random numbers: a pure function of (seed, position, stream, vocabulary id).

Philox-4x32 with seven rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11):
key = the 64-bit seed, counter = (id // 4, position low, position high, stream), lane = id % 4.
No sample depends on the division of the vocabulary into tiles or ranks, nor on the implementation.

The Gumbel noise of a uniform u in (0, 1) is -log(-log1p(-u)): likely tokens are decided where u is
small, and there float32 resolves it best.
"""

import operator

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
LARGEST = 1.0 - 2.0**-24
"""The largest float32 below one: keeps log1p(-u) finite."""

STREAM_SAMPLE = 0
"""Gumbel noise of a sampled token."""
STREAM_ACCEPT = 1
"""The uniform that accepts or rejects a draft."""
STREAM_RESIDUAL = 2
"""Gumbel noise of the token that replaces a rejected draft; independent of the draft's own."""

_MASK = 0xFFFFFFFF


def philox(seed: Tensor, position: Tensor, stream: int, block: Tensor) -> Tensor:
    """[R, C, 4] int64 words in [0, 2**32) for seed [R], position [R] and counters block [C]."""
    shape = (seed.shape[0], block.shape[0])
    multiplier = _pair(MULTIPLIER_1, MULTIPLIER_0, seed.device)
    weyl = _pair(WEYL_0, WEYL_1, seed.device)
    key = torch.stack((seed & _MASK, (seed >> 32) & _MASK))[:, :, None]  # [2, R, 1]
    # even holds (counter 2, counter 0), odd holds (counter 1, counter 3): one round crosses them.
    even = torch.stack((((position >> 32) & _MASK)[:, None].expand(shape), block.expand(shape)))
    low = position & _MASK
    odd = torch.stack((low, torch.full_like(low, stream)))[:, :, None]
    for step in range(ROUNDS):
        wide = even * multiplier
        even = (((wide >> 32) & _MASK) ^ odd ^ ((key + weyl * step) & _MASK)).flip(0)
        odd = wide & _MASK
    return torch.stack((even[1], odd[0], even[0], odd[1]), -1)


def _pair(first: int, second: int, device: torch.device) -> Tensor:
    """[2, 1, 1] int64, filled on the device: a copy from the host would be waited for."""
    both = torch.full((2, 1, 1), first, device=device)
    both[1:].fill_(second)
    return both


def uniform(words: Tensor) -> Tensor:
    """Float32 in (0, 1) of words in [0, 2**32), with full relative precision near zero."""
    return ((words.to(torch.float32) + 0.5) * 2.0**-32).clamp_max(LARGEST)


def gumbel(seed: Tensor, position: Tensor, stream: int, start: int, count: int) -> Tensor:
    """[R, count] Gumbel noise of the vocabulary ids from start on."""
    first = start // 4
    block = torch.arange(first, (start + count + 3) // 4, device=seed.device)
    words = philox(seed, position, stream, block).flatten(1)
    words = words[:, start - 4 * first : start - 4 * first + count]
    return -torch.log(-torch.log1p(-uniform(words)))


def accept_uniform(seed: Tensor, position: Tensor) -> Tensor:
    """[R] the uniforms that decide whether the drafts at these positions are accepted."""
    block = torch.zeros(1, dtype=torch.int64, device=seed.device)
    return uniform(philox(seed, position, STREAM_ACCEPT, block)[:, 0, 0])


def seed_rows(seed: int | Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Flat int64 (seed, position), one per row, of a seed that broadcasts to position's shape."""
    position = position.to(torch.int64)
    if isinstance(seed, Tensor):
        seeds = seed.to(position.device, torch.int64)
    else:
        seeds = torch.full((), operator.index(seed), dtype=torch.int64, device=position.device)
    return seeds.expand(position.shape).reshape(-1), position.reshape(-1)
