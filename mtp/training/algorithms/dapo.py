"""DAPO's loss (Yu et al. 2025, arXiv 2503.14476): every token has the same weight, clip-higher.

Unlikely tokens may grow faster than likely ones shrink. The paper's two other parts are settings of
the stage: `drop_uninformative` with `max_rounds` is dynamic sampling, `reward.overlong_buffer` the
soft punishment of overlong rollouts.
"""

from ...rollouts.advantage import group_std
from .algorithm import Algorithm
from .normalizer import per_token

DAPO = Algorithm(advantage=group_std, normalizer=per_token, clip_high=0.28)
