"""Policy-gradient algorithms by name, for `stages.*.objective.policy.algorithm`.

A new algorithm is a file that ends in `ALGORITHMS.add("my_name", Algorithm(...))`.
"""

from ...common.registry import Registry
from .algorithm import Algorithm, PolicyTokens, clipped
from .cispo import CISPO
from .dapo import DAPO
from .dr_grpo import DR_GRPO
from .grpo import GRPO
from .gspo import GSPO
from .normalizer import NORMALIZERS, Division, Normalizer
from .ratio import RATIOS
from .reinforce_pp import REINFORCE_PP
from .rloo import RLOO

__all__ = [
    "ALGORITHMS",
    "NORMALIZERS",
    "RATIOS",
    "Algorithm",
    "Division",
    "Normalizer",
    "PolicyTokens",
    "clipped",
]

ALGORITHMS: Registry[Algorithm] = Registry(
    grpo=GRPO,
    dapo=DAPO,
    dr_grpo=DR_GRPO,
    rloo=RLOO,
    gspo=GSPO,
    cispo=CISPO,
    reinforce_pp=REINFORCE_PP,
)
