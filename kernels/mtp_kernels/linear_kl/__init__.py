"""Divergence of the distributions of two output layers, row by row, without their logits."""

from mtp_kernels.linear_kl.api import LinearKl, linear_kl

__all__ = ["LinearKl", "linear_kl"]
