"""GRPO (Shao et al. 2024, arXiv 2402.03300): group-relative advantages, each rollout's mean.

Its KL penalty is the stream `reference_kl`.
"""

from ...rollouts.advantage import group_std
from .algorithm import Algorithm
from .normalizer import per_sequence

GRPO = Algorithm(advantage=group_std, normalizer=per_sequence)
