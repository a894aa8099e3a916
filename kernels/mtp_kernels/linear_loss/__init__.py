"""Losses of an output layer whose gradients are made in the forward, without its logits."""

from mtp_kernels.linear_loss.api import LinearLoss, linear_loss

__all__ = ["LinearLoss", "linear_loss"]
