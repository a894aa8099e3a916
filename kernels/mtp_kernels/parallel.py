"""Vocabulary-parallel `linear_logprob` and `linear_sample`: each rank holds rows of the weight.

Rank r holds weight[start_r : start_r + V_r] and the same hidden states as all others. What is
exchanged is a few numbers per row (statistics forward, [R, D] gradients backward), never logits.
Every rank returns the same values: parts are combined in the order of the ranks, which must be the
order of their vocabulary ids.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_kernels.checks import check_operands, check_scale
from mtp_kernels.dispatch import autocast_operands, resolve_impl
from mtp_kernels.linear_logprob.api import LinearLogprob
from mtp_kernels.linear_logprob.op import kept_rows, put, row_backward, row_stats, take
from mtp_kernels.linear_sample.api import LinearSample, check_rows
from mtp_kernels.linear_sample.op import best_rows
from mtp_kernels.noise import seed_rows
from mtp_kernels.rowstats import RowStats, combine, combine_best, finish
from mtp_kernels.targets import resolve_targets


def _gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[ranks, ...] of every rank's tensor."""
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return torch.stack(parts)


class _Logprob(torch.autograd.Function):
    """Row statistics of all shards; gradients by hidden are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden, weight, bias, target, start, group, (temperature, softcap) = inputs[:7]
        ignore_index, impl = inputs[7:]
        keep = kept_rows(target, ignore_index)
        local = take(target, keep) - start
        local = torch.where((local >= 0) & (local < weight.shape[0]), local, -1)
        part = row_stats(take(hidden, keep), weight, bias, local, temperature, softcap, impl)
        has_target = (local >= 0).to(part.target.dtype)
        floats = _gather(torch.stack((*part[:4], has_target)), group)  # [ranks, 5, R]
        argmax = _gather(part.argmax + start, group)
        maximum, total, moment, picked, has_target = floats.unbind(1)
        picked = torch.where(has_target.sum(0) == 0, torch.nan, picked)  # an id that no rank has
        stats = combine(RowStats(maximum, total, moment, picked, argmax))
        logprob, lse, entropy = finish(stats)
        ctx.save_for_backward(hidden, weight, bias, local, lse, entropy)
        ctx.keep, ctx.group, ctx.scaling, ctx.impl = keep, group, (temperature, softcap), impl
        rows = hidden.shape[0]
        best = put(stats.argmax, keep, rows, fill=-1)
        ctx.mark_non_differentiable(best)
        return put(logprob, keep, rows), put(lse, keep, rows), put(entropy, keep, rows), best

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, local, lse, entropy = ctx.saved_tensors
        g_logprob, g_lse, g_entropy = (take(g, ctx.keep) for g in upstream[:3])
        grad_hidden, grad_weight, grad_bias = row_backward(
            take(hidden, ctx.keep),
            weight,
            bias,
            local,
            (lse, entropy, g_logprob, g_lse, g_entropy),
            ctx.scaling[0],
            ctx.scaling[1],
            ctx.needs_input_grad[:3],
            ctx.impl,
        )
        if grad_hidden is not None:
            grad_hidden = put(grad_hidden, ctx.keep, hidden.shape[0])
            dist.all_reduce(grad_hidden, group=ctx.group)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


def linear_logprob_parallel(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    start: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
) -> LinearLogprob:
    """`linear_logprob` of a weight whose rows are spread over the ranks of a group.

    Args:
        hidden: [..., D], the same on every rank; its gradient is complete on every rank.
        weight: [V_r, D] this rank's rows of the output matrix.
        target: [...] ids of the whole vocabulary, or ignore_index; the same on every rank. The
            log-probability of an id that no rank has is NaN.
        start: this rank's first vocabulary id; ascending with the rank.
        group: the ranks; None is all of them.
        temperature, softcap, ignore_index, impl: as in `linear_logprob`.
        bias: [V_r] this rank's part of the bias, or None.

    The upstream gradients must be the same on every rank.
    """
    hidden, weight, bias = autocast_operands(hidden, weight, bias)  # type: ignore[assignment]
    check_operands(hidden, weight, bias)
    check_scale(temperature, softcap)
    target = resolve_targets(
        hidden, target, None, shift=1, document=None, mask=None, ignore_index=ignore_index
    )
    impl = "torch" if impl == "reference" else resolve_impl(impl, hidden)
    values = _Logprob.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1),
        start,
        group,
        (float(temperature), softcap),
        ignore_index,
        impl,
    )
    return LinearLogprob(*(value.reshape(hidden.shape[:-1]) for value in values))


@torch.no_grad()
def linear_sample_parallel(
    hidden: Tensor,
    weight: Tensor,
    *,
    seed: int | Tensor,
    position: Tensor,
    start: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    impl: str = "auto",
) -> LinearSample:
    """`linear_sample` of a weight whose rows are spread over the ranks of a group.

    The tokens are those of the whole weight on one rank: the noise depends on the vocabulary id,
    not on the shard. Arguments as in `linear_logprob_parallel` and `linear_sample`.
    """
    hidden, weight, bias = autocast_operands(hidden, weight, bias)  # type: ignore[assignment]
    check_operands(hidden, weight, bias)
    check_scale(temperature, softcap, greedy=True)
    check_rows(hidden, seed, position)
    impl = "torch" if impl == "reference" else resolve_impl(impl, hidden)
    rows = hidden.reshape(-1, hidden.shape[-1])
    seeds, positions = seed_rows(seed, position)
    scaling = (float(temperature), softcap)
    best, token, picked, maximum, total = best_rows(
        rows, weight, bias, seeds, positions, start, *scaling, impl
    )
    floats = _gather(torch.stack((best, picked, maximum, total)), group)  # [ranks, 4, R]
    best, picked, maximum, total = floats.unbind(1)
    _, token, picked, maximum, total = combine_best(
        best, _gather(token, group), picked, maximum, total
    )
    logprob = ((picked - maximum) - total.log()).clamp_max(0.0)
    lead = hidden.shape[:-1]
    return LinearSample(token.reshape(lead), logprob.reshape(lead))
