"""Output layers of k positions per pass, without their logits.

One public function per op; each takes `impl="auto" | "reference" | "torch" | "triton"`. Imports
only torch, and Triton if it is installed and used.
"""

from mtp_kernels.linear_kl import LinearKl, linear_kl
from mtp_kernels.linear_logprob import LinearLogprob, linear_logprob
from mtp_kernels.linear_loss import LinearLoss, linear_loss
from mtp_kernels.linear_sample import LinearSample, linear_sample
from mtp_kernels.linear_verify import LinearVerify, linear_verify
from mtp_kernels.targets import shifted_targets

__all__ = [
    "LinearKl",
    "LinearLogprob",
    "LinearLoss",
    "LinearSample",
    "LinearVerify",
    "linear_kl",
    "linear_logprob",
    "linear_loss",
    "linear_sample",
    "linear_verify",
    "shifted_targets",
]
