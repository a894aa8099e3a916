"""REINFORCE++ (Hu et al. 2025, arXiv 2501.03262): advantages normalized over the whole batch.

The baseline is not the prompt's own rollouts, so a group whose rollouts are all right still
teaches. The paper subtracts its KL penalty from the reward; here it is the stream `reference_kl`,
whose kind `k1` has that gradient.
"""

from ...rollouts.advantage import batch_std
from .algorithm import Algorithm

REINFORCE_PP = Algorithm(advantage=batch_std)
