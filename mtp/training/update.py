"""One optimizer step: micro-batches in, every stream over its global count, gradients out.

    loss = sum over streams of weight * (sum over tokens) / (count over all micro-batches and ranks)

Main and head are clipped separately: their norms can differ by a factor of twenty, and a joint clip
would reduce the smaller one's step to nearly zero.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from torch import Tensor

from ..common.heap import release
from ..modeling.sampler import Sampler
from .batch import RolloutBatch, TextBatch, within_draft_vocabulary
from .objectives import ObjectiveConfig
from .runtime import NotFinite, over_processes
from .sharding import is_sharded, reshard, whole_tensor
from .step_module import Sealed, Step

K = TypeVar("K")


def global_counts(
    fabric: Fabric, objective: ObjectiveConfig, batches: list[TextBatch], in_rl: bool
) -> dict[str, float]:
    """Tokens of each stream over all micro-batches and processes."""
    totals: dict[str, float | Tensor] = {}
    for batch in batches:
        for name, count in objective.counts(batch, in_rl).items():
            totals[name] = totals.get(name, 0.0) + count
    return over_processes(fabric, read(totals), "sum")


def read(values: Mapping[K, float | Tensor]) -> dict[K, float]:
    """Numbers and tensors [] as numbers. The host waits for a GPU once, or not at all."""
    tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    numbers = {key: float(value) for key, value in values.items() if key not in tensors}
    if tensors:
        widest = functools.reduce(torch.promote_types, (v.dtype for v in tensors.values()))
        found = torch.stack([value.to(widest) for value in tensors.values()]).tolist()
        numbers |= dict(zip(tensors, found, strict=True))
    return numbers


def update(
    fabric: Fabric,
    module: Any,
    optimizers: Mapping[str, torch.optim.Optimizer],
    batches: list[TextBatch],
    objective: ObjectiveConfig,
    *,
    clip_norms: dict[str, float],
    channel_gradient: float = 1.0,
    logits_detach: bool = False,
    sampler: Sampler | None = None,
    reference: Any = None,
    check_gradients: bool = False,
    impl: str = "auto",
) -> dict[str, float]:
    """Accumulate the gradient over `batches`, clip, step. Returns the step's metrics.

    Args:
        fabric: runs backward, clipping and reduction.
        module: the model as `step_module.wrap` returns it.
        optimizers: by emitter, `main` and `head`; an absent emitter is not trained.
        batches: micro-batches of this process, each of its own size. If one is of rollouts, this is
            an RL step, and the others are solved examples for the supervised streams.
        objective: streams and weights.
        clip_norms: maximum gradient norm of each emitter.
        channel_gradient: scale of the head's gradient on main.
        logits_detach: detach the head's gradient from an output matrix shared with main.
        sampler: the distribution that rollouts were sampled from.
        reference: frozen model that streams compare with.
        impl: implementation of `mtp_kernels` ops.
        check_gradients: raise if a trained parameter has no gradient.

    Raises:
        NotFinite: if loss or gradient is not finite. Weights and optimizers are as before.
        ValueError: if a gradient is missing that was to be checked.
    """
    of_rollouts = [isinstance(batch, RolloutBatch) for batch in batches]
    in_rl = any(of_rollouts)
    has_solved = in_rl and not all(of_rollouts)
    drafted = module.module.model.mtp_head.draft_tokens
    num_head_rows = sum(len(batch.head) for batch in batches)
    batches = [within_draft_vocabulary(batch, drafted) for batch in batches]
    num_undrafted = float(num_head_rows - sum(len(batch.head) for batch in batches))
    counts = global_counts(fabric, objective, batches, in_rl)
    exact = torch.float32 if fabric.device.type == "mps" else torch.float64
    sums: dict[str, Tensor] = {}
    seen: dict[str, float | Tensor] = {}
    maxima: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + value.to(exact)

    for index, batch in enumerate(batches):
        is_last = index == len(batches) - 1
        step = Step(
            batch,
            objective,
            counts,
            in_rl=in_rl,
            channel_gradient=channel_gradient,
            logits_detach=logits_detach,
            sampler=sampler or Sampler(),
            reference=reference,
            impl=impl,
            # Supervised micro-batches come first, and some parameters may be reached by them alone.
            reaches_all=is_last and has_solved and fabric.world_size > 1 and not is_sharded(module),
        )
        with fabric.no_backward_sync(module, enabled=not is_last):
            loss, terms = module(Sealed(step))
            fabric.backward(loss * fabric.world_size)
        if fabric.device.type == "cpu" and not is_last:
            release()  # activations of other sizes come next
        for name, term in terms.content.items():
            add(f"loss/{name}", term.total)
            for metric, (value, count) in term.metrics.items():
                add(metric, value)
                seen[metric] = seen.get(metric, 0.0) + count
            for metric, value in term.maxima.items():
                maxima[metric] = torch.maximum(maxima.get(metric, torch.zeros_like(value)), value)
        add("loss", loss.detach())

    # A frozen model has no backward, after which its root would be in shards again.
    reshard(reference)
    if check_gradients:
        for name, parameter in module.module.model.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                raise ValueError(
                    f"parameter {name} is trained but got no gradient; freeze its part "
                    "(train_main, train_head) or give a stream that reaches it a weight"
                )
    norms = {
        name: whole_tensor(
            fabric.clip_gradients(
                module, optimizer, max_norm=clip_norms[name], error_if_nonfinite=False
            )
        )
        for name, optimizer in optimizers.items()
    }
    metrics = read_metrics(fabric, sums, seen, maxima, norms)
    metrics |= {f"loss/{n}": metrics[f"loss/{n}"] / (c or 1.0) for n, c in counts.items()}
    metrics |= {f"num_tokens/{n}": c for n, c in counts.items()}
    if drafted is not None:
        outside = over_processes(fabric, {"rows": num_undrafted}, "sum")["rows"]
        metrics["num_tokens/outside_draft_vocabulary"] = outside
    found = [] if math.isfinite(metrics["loss"]) else [f"the loss is {metrics['loss']}"]
    for name in norms:
        if not math.isfinite(metrics[f"{name}/grad_norm"]):
            found.append(f"the gradient of {name} is not finite")
    if found:
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        raise NotFinite(" and ".join(found))
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return metrics


def read_metrics(
    fabric: Fabric,
    sums: dict[str, Tensor],
    seen: dict[str, float | Tensor],
    maxima: dict[str, Tensor],
    norms: dict[str, Tensor],
) -> dict[str, float]:
    """Means and maxima over all processes, and gradient norms; what was never counted is a sum."""
    parts: dict[str, Mapping[str, float | Tensor]]
    parts = {"sum": sums, "count": seen, "max": maxima, "norm": norms}
    flat = {(part, name): value for part, values in parts.items() for name, value in values.items()}
    numbers = read(flat)
    mine = {part: {name: numbers[part, name] for name in values} for part, values in parts.items()}
    totals = over_processes(fabric, mine["sum"], "sum")
    counts = over_processes(fabric, mine["count"], "sum")
    metrics = {
        name: total / counts.get(name, 1.0)
        for name, total in totals.items()
        if counts.get(name, 1.0)
    }
    metrics |= over_processes(fabric, mine["max"], "max")
    return metrics | {f"{name}/grad_norm": norm for name, norm in mine["norm"].items()}
