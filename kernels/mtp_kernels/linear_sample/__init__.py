"""Sampling from an output layer without its logits: the token and its log-probability per row."""

from mtp_kernels.linear_sample.api import LinearSample, linear_sample

__all__ = ["LinearSample", "linear_sample"]
