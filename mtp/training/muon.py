"""Muon, whose iteration is in float32 on a CPU.

Nesterov momentum, made orthogonal by five steps of a Newton-Schulz iteration (Jordan et al. 2024)
and scaled to the root mean square of AdamW's updates (Liu et al. 2025, arXiv 2502.16982). On a GPU
the iteration is in bfloat16 and a step is that of `torch.optim.Muon` to the last bit, and so are
the names of the state. torch's is in bfloat16 everywhere, and a processor without instructions for
it takes ten times as long for that as for float32 (`benchmarks/muon.py`); torch 2.8 has none.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Coefficients a, b, c of an iteration's polynomial a x + b x^3 + c x^5 of singular values x."""


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix [R, C] with singular values between about 0.5 and 1.2, computed in `dtype`."""
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    is_tall = len(matrix) > matrix.shape[1]
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=1e-7)  # the largest singular value is at most 1
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


class Muon(torch.optim.Optimizer):
    """The part of `torch.optim.Muon` that mtp uses, with `adjust_lr_fn="match_rms_adamw"`.

    dtype: of the iteration; None: float32 on a CPU, bfloat16 elsewhere.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        weight_decay: float,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step. Closures are not supported."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                if gradient is None:
                    continue
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                average = state["momentum_buffer"]
                average.lerp_(gradient, 1 - MOMENTUM)
                on_cpu = gradient.device.type == "cpu"
                dtype = self.dtype or (torch.float32 if on_cpu else torch.bfloat16)
                update = orthogonal(gradient.lerp(average, MOMENTUM), dtype)
                if isinstance(update, DTensor) and isinstance(parameter, DTensor):
                    # Of few rows the update is no longer in shards.
                    update = update.redistribute(parameter.device_mesh, parameter.placements)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                scale = 0.2 * max(parameter.shape) ** 0.5
                parameter.add_(update, alpha=-group["lr"] * scale)
