"""REINFORCE++ (Hu et al. 2025, arXiv 2501.03262): advantages normalized over the whole batch.

A prompt's own rollouts are no baseline, so a group that is all right still teaches. The paper takes
its KL penalty off the reward; here it is the stream `reference_kl`, whose kind `k1` has that
gradient.
"""

from ...rollouts.advantage import batch_std
from .algorithm import Algorithm

REINFORCE_PP = Algorithm(advantage=batch_std)
