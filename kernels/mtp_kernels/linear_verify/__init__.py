"""Verification of drafted tokens: the accepted prefix and the token after it, without logits."""

from mtp_kernels.linear_verify.api import LinearVerify, linear_verify

__all__ = ["LinearVerify", "linear_verify"]
