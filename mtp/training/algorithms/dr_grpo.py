"""Dr.GRPO (Liu et al. 2025, arXiv 2503.20783): no division by a group's deviation or by lengths.

Both bias GRPO: towards questions whose rewards nearly agree, and towards long wrong answers.
"""

from .algorithm import Algorithm

DR_GRPO = Algorithm(advantage="group_mean", normalizer="length")
