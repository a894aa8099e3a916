"""Cases that the kernel tests share, and the tolerance they are held to.

Truth is the reference in float64. A path may err three times as much as plain PyTorch does in the
same dtype, plus 1e-5 of the largest value.
"""

from collections.abc import Sequence

import pytest
import torch
import triton
from packaging.version import Version
from torch import Tensor

counts_bytes = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.6"),
    reason="Triton's interpreter counts the strides of descriptors in elements",
)
reads_compiled_code = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.6"),
    reason="what the compiler writes differs between versions",
)

SCALINGS: dict[str, dict[str, float]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 5.0},
    "both": {"temperature": 1.6, "softcap": 3.0},
}


def operands(
    lead: Sequence[int], vocab: int, depth: int, dtype: torch.dtype, bias: bool = False
) -> list[Tensor]:
    """[hidden, weight] or [hidden, weight, bias] with gradients, the same numbers in any dtype."""
    shapes = [(*lead, depth), (vocab, depth)] + ([(vocab,)] if bias else [])
    tensors = [torch.randn(shape, dtype=torch.float64).bfloat16() for shape in shapes]
    return [t.to(dtype).requires_grad_() for t in tensors]


def plain_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Naive code: the product in the operands' dtype, then float32 or float64."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    x = logits.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    return x / temperature


def assert_as_good(
    result: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor]
) -> None:
    """Each result errs at most three times as much as plain same-dtype code, plus 1e-5."""
    assert len(result) == len(plain) == len(truth)
    for number, (got, naive, true) in enumerate(zip(result, plain, truth, strict=True)):
        assert got.shape == true.shape
        assert torch.isfinite(got).all(), f"value {number} is not finite"
        error = (got.double() - true.double()).abs().max().item()
        allowed = 3 * (naive.double() - true.double()).abs().max().item()
        allowed += 1e-5 * max(1.0, true.abs().max().item())
        assert error <= allowed, f"value {number}: error {error:.2e}, allowed {allowed:.2e}"


def chi_square_is_plausible(counts: torch.Tensor, probability: torch.Tensor) -> bool:
    """Pearson's statistic within five standard deviations; bins expecting < 5 are merged."""
    expected = probability * counts.sum()
    small = expected < 5
    observed = torch.cat((counts[~small], counts[small].sum()[None]))
    expected = torch.cat((expected[~small], expected[small].sum()[None]))
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    return abs(statistic - freedom) < 5 * (2 * max(freedom, 1)) ** 0.5
