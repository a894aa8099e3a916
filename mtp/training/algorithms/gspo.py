"""GSPO (Zheng et al. 2025, arXiv 2507.18071): the ratio of a rollout is length-normalized.

A mean of log-ratios is close to 0, hence the narrow range.
"""

from .algorithm import Algorithm
from .normalizer import per_sequence
from .ratio import sequence

GSPO = Algorithm(ratio=sequence, normalizer=per_sequence, clip_low=3e-4, clip_high=4e-4)
