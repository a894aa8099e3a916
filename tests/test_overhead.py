"""What a pass reads back from the device, each time of which a GPU would have to be awaited."""

import pytest
import torch
from tiny import HEADS, PAD, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from mtp.batch import pad
from mtp.generation_mtp import PhasePlan, Sampler, decode
from mtp.rollout import keep_casts

WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select")


class Reads(TorchDispatchMode):
    """Counts operations whose result the host waits for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += str(function).startswith(WAITING)
        return function(*args, **(kwargs or {}))


def num_reads(monkeypatch, num_rows, mode, max_new_tokens, sampler):
    """Reads of a whole run, and its passes."""
    lists = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: lists.append(1) or tolist(x))
    model = tiny_model()
    tokens, lengths = pad([[5, 6, 7 + row] for row in range(num_rows)], PAD)
    plan = PhasePlan([1 if mode == "slow" else 4], [None], verified=[mode == "verified"])
    with Reads() as reads:
        out = decode(
            model, tokens, lengths, plan, sampler, max_new_tokens=max_new_tokens, pad_id=PAD,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    return reads.count + len(lists), int(out.passes.max())


@pytest.mark.parametrize("mode", ["fast", "slow", "verified"])
def test_a_pass_is_awaited_twice_whatever_the_batch(mode, monkeypatch):
    per_pass = 1 if mode == "slow" else 2
    for num_rows in (1, 4):
        for sampler in (Sampler(temperature=0), Sampler(top_k=5)):
            short = num_reads(monkeypatch, num_rows, mode, 8, sampler)
            long = num_reads(monkeypatch, num_rows, mode, 24, sampler)
            # Rows that end early are dropped at most log2(batch) times, at one more read each.
            slack = 2 if num_rows > 1 else 0
            assert long[0] - short[0] <= per_pass * (long[1] - short[1]) + slack


class Casts(TorchDispatchMode):
    """Shapes of the matrices that are cast to another dtype."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].ndim == 2:
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernels", [None, "torch"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("mode", ["fast", "verified"])
def test_autocast_casts_a_weight_once_and_not_at_every_pass(mode, head, kernels):
    model = tiny_model(type=head)
    model.model.requires_grad_(False)  # autocast itself keeps casts of trained weights only
    shapes = {tuple(weight.shape) for weight in model.parameters() if weight.ndim == 2}
    tokens, lengths = pad([[5, 6, 7], [8, 9]], PAD)
    plan = PhasePlan([4], [None], verified=[mode == "verified"])
    counts = []
    for max_new_tokens in (8, 24):
        with torch.autocast("cpu", torch.bfloat16), keep_casts(model), Casts() as casts:
            decode(
                model, tokens, lengths, plan, Sampler(), max_new_tokens=max_new_tokens, pad_id=PAD,
                kernels=kernels,
            )  # fmt: skip
        counts.append(sum(shape in shapes for shape in casts.shapes))
    assert 0 < counts[1] == counts[0]
    assert not any(weight.requires_grad for weight in model.model.parameters())
    assert all(weight.requires_grad for weight in model.mtp_head.parameters())
