"""Dr.GRPO (Liu et al. 2025, arXiv 2503.20783): no division by a group's deviation or by lengths.

Both bias GRPO: towards questions whose rewards nearly agree, and towards long wrong answers.
"""

from ...rollouts.advantage import group_mean
from .algorithm import Algorithm
from .normalizer import per_length

DR_GRPO = Algorithm(advantage=group_mean, normalizer=per_length)
