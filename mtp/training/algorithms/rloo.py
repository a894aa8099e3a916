"""RLOO (Ahmadian et al. 2024, arXiv 2402.14740): REINFORCE on whole rollouts, leave-one-out.

The action is the rollout: one ratio for all of its tokens, which are summed and not averaged.
"""

from ...rollouts.advantage import leave_one_out
from .algorithm import Algorithm
from .normalizer import per_rollout
from .ratio import rollout

RLOO = Algorithm(advantage=leave_one_out, ratio=rollout, normalizer=per_rollout)
