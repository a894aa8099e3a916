"""Vocabulary-parallel forms: two ranks with half of the weight each equal one rank with all."""

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from kernel_cases import operands
from mtp_kernels import dispatch, linear_logprob, linear_sample
from mtp_kernels.linear_logprob.op import row_stats
from mtp_kernels.parallel import linear_logprob_parallel, linear_sample_parallel
from mtp_kernels.rowstats import RowStats, combine, finish

VOCAB, CUT = 75, 43
SCALING = {"temperature": 0.8, "softcap": 5.0}


def case(forbidden: bool = False) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Operands and targets; forbidden: whether the bias of the second rank is minus infinity."""
    torch.manual_seed(0)
    target = torch.randint(0, CUT if forbidden else VOCAB, (11,))
    target[3] = -100
    hidden, weight, bias = operands((11,), VOCAB, 8, torch.float32, bias=True)
    if forbidden:
        bias = bias.detach().index_fill(0, torch.arange(CUT, VOCAB), -torch.inf)
    return [hidden, weight, bias], target


def results(rank: int | None, impl: str, forbidden: bool) -> dict[str, torch.Tensor]:
    """Results of one rank of two, or of one process alone."""
    (hidden, weight, bias), target = case(forbidden)
    scaling = {"temperature": 0.8} if forbidden else SCALING  # a softcap makes any bias finite
    rows = slice(None) if rank is None else (slice(0, CUT), slice(CUT, VOCAB))[rank]
    weight = weight.detach()[rows].clone().requires_grad_()
    bias = bias.detach()[rows].clone().requires_grad_()
    keys = {"seed": 9, "position": torch.arange(11), "bias": bias.detach(), **scaling}
    if rank is None:
        out = linear_logprob(hidden, weight, target, bias=bias, impl=impl, **scaling)
        drawn = linear_sample(hidden.detach(), weight.detach(), impl=impl, **keys)
    else:
        shard = {"start": rows.start, "impl": impl}
        out = linear_logprob_parallel(hidden, weight, target, bias=bias, **shard, **scaling)
        drawn = linear_sample_parallel(hidden.detach(), weight.detach(), **shard, **keys)
    weights = torch.linspace(-1, 2, 11)
    loss = (out.logprob * weights + out.lse * weights**2 + out.entropy * weights**3).sum()
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    names = ("hidden", "weight", "bias")
    return {
        **{name: value.detach() for name, value in out._asdict().items()},
        **{f"drawn_{name}": value for name, value in drawn._asdict().items()},
        **{f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)},
    }


def worker(rank: int, folder: str, impl: str, forbidden: bool) -> None:
    torch.set_num_threads(1)
    dispatch.DIRECT_NUMEL, dispatch.CHUNK_BYTES = 0, 8000
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        torch.save(results(rank, impl, forbidden), Path(folder, f"rank{rank}.pt"))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("forbidden", [False, True], ids=["all ids", "one rank's ids forbidden"])
def test_two_ranks_equal_one(impl, forbidden, tmp_path, chunked):
    mp.spawn(worker, args=(str(tmp_path), impl, forbidden), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    alone = results(None, impl, forbidden)
    for name, expected in alone.items():
        if name in ("grad_weight", "grad_bias"):
            got = torch.cat((first[name], second[name]))
        else:
            got = first[name]
            assert torch.equal(first[name], second[name]), f"{name} differs between the ranks"
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_shards_combine_to_the_whole(impl, chunked):
    (hidden, weight, bias), target = case()
    target = target.clamp_min(0)
    parts = []
    for start, stop in ((0, 20), (20, 21), (21, VOCAB)):
        local = torch.where((target >= start) & (target < stop), target - start, -1)
        shard = (weight.detach()[start:stop], bias.detach()[start:stop])
        stats = row_stats(hidden.detach(), *shard, local, 0.8, 5.0, impl)
        parts.append(stats._replace(argmax=stats.argmax + start))
    whole = combine(RowStats(*(torch.stack(field) for field in zip(*parts, strict=True))))
    expected = linear_logprob(hidden, weight, target, bias=bias, impl="reference", **SCALING)
    for got, value in zip((*finish(whole), whole.argmax), expected, strict=True):
        torch.testing.assert_close(got, value.detach(), atol=1e-5, rtol=1e-5)
