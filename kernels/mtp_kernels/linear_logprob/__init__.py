"""Log-probability, log-sum-exp, entropy and argmax of an output layer, without its logits."""

from mtp_kernels.linear_logprob.api import LinearLogprob, linear_logprob

__all__ = ["LinearLogprob", "linear_logprob"]
