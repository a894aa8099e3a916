"""Policy-gradient algorithms by name, for `stages.*.objective.policy.algorithm`."""

from .algorithm import ADVANTAGES, NORMALIZERS, RATIOS, Algorithm, clipped
from .cispo import CISPO
from .dapo import DAPO
from .dr_grpo import DR_GRPO
from .grpo import GRPO
from .gspo import GSPO
from .ratio import importance_ratio, segment_sum
from .reinforce_pp import REINFORCE_PP
from .rloo import RLOO

__all__ = [
    "ADVANTAGES",
    "ALGORITHMS",
    "NORMALIZERS",
    "RATIOS",
    "Algorithm",
    "clipped",
    "importance_ratio",
    "segment_sum",
]

ALGORITHMS: dict[str, Algorithm] = {
    "grpo": GRPO,
    "dapo": DAPO,
    "dr_grpo": DR_GRPO,
    "rloo": RLOO,
    "gspo": GSPO,
    "cispo": CISPO,
    "reinforce_pp": REINFORCE_PP,
}
