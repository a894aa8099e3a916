"""GRPO (Shao et al. 2024, arXiv 2402.03300): group-relative advantages, each rollout's mean.

Its KL penalty is the stream `leash`.
"""

from .algorithm import Algorithm

GRPO = Algorithm(advantage="group_std", normalizer="sequences")
