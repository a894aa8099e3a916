"""The one module that Fabric wraps: replay and objective in its forward, everything else in `call`.

All weights are read within its forward: those of hidden layers by their own forwards, output
matrices by the losses and by decoding. Hence a strategy that gathers sharded weights in a forward,
or that prepares gradients there, needs no special case.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from ..modeling.sampler import Sampler
from .batch import TextBatch
from .objectives import ObjectiveConfig, ReferenceRows, StreamInputs, Term, scores_head
from .objectives.scored import replay_batch
from .sharding import is_sharded, reshard, whole

T = TypeVar("T")


class Sealed(Generic[T]):
    """An argument or a result that Fabric passes unchanged.

    Fabric casts tensors in collections and dataclasses to its precision; it does not look inside
    this class.
    """

    def __init__(self, content: T):
        self.content = content


@dataclass
class Step:
    """One micro-batch and the arguments of its loss."""

    batch: TextBatch
    """Text and rows."""
    objective: ObjectiveConfig
    """Streams and their weights."""
    counts: dict[str, float]
    """Count of each stream over all micro-batches and processes."""
    in_rl: bool = False
    """True in an RL step, whose solved examples only some streams read."""
    channel_gradient: float = 1.0
    """Scale of the head's gradient on main."""
    logits_detach: bool = False
    """Detach the head's gradient from an output matrix shared with main."""
    sampler: Sampler = field(default_factory=Sampler)
    """The distribution that rollouts were sampled from."""
    reference: Any = None
    """Frozen model that streams compare with; None if none of them does."""
    impl: str = "auto"
    """Implementation of `mtp_kernels` ops."""
    reaches_all: bool = False
    """The gradient reaches every trained parameter, with zeros where no stream of this batch does:
    processes reduce a parameter's gradients once it has been reached."""


class StepModule(nn.Module):
    """The model, and the loss of a micro-batch as its forward."""

    def __init__(
        self,
        model: Any,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
        rollout_weights: str = "layer",
    ):
        """autocast: the run's precision; rollout_weights: see `FabricConfig`."""
        super().__init__()
        self.model = model
        self.autocast = autocast
        self.rollout_weights = rollout_weights

    def forward(self, sealed: Sealed[Step]) -> tuple[Tensor, Sealed[dict[str, Term]]]:
        """The loss [] of one micro-batch, and its terms by name, without gradient."""
        step = sealed.content
        streams = step.objective.streams(step.batch, step.in_rl).values()
        scored = replay_batch(
            self.model,
            step.batch,
            channel_gradient=step.channel_gradient,
            use_head=scores_head(streams),
            logits_detach=step.logits_detach,
            impl=step.impl,
        )
        rows = None
        if step.reference is not None and any(stream.needs_reference for stream in streams):
            rows = reference_rows(step.reference, step.batch)
        inputs = StreamInputs(scored, step.batch, step.sampler, rows)
        terms = step.objective.terms(inputs, step.in_rl)
        weighted = [t.weight * t.total / (step.counts[n] or 1.0) for n, t in terms.items()]
        loss = torch.stack(weighted).sum()
        if step.reaches_all:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            loss = loss + torch.stack([0.0 * p.flatten()[0].to(loss.dtype) for p in trained]).sum()
        return loss, Sealed({n: replace(t, total=t.total.detach()) for n, t in terms.items()})

    def call(self, sealed: Sealed[Callable[[Any], None]]) -> None:
        """Calls a function of the model, see `within`."""
        with self.autocast():  # Fabric's own does not reach this method under every strategy
            sealed.content(self.model)


@torch.no_grad()
def reference_rows(reference: Any, batch: TextBatch) -> ReferenceRows:
    """Rows of the frozen reference over a batch's text."""
    rows = reference.replay(batch.tokens)
    return ReferenceRows(rows.main_hidden.flatten(0, 1), rows.main_output)


def wrap(fabric: Fabric, model: Any, before: Any = None, rollout_weights: str = "layer") -> Any:
    """The model in a `StepModule` as Fabric wraps it, by the parameters that require a gradient.

    before: what wrapped it until now. Shards are kept as they are: they follow the parameters.
    """
    if is_sharded(before):
        return before
    module = fabric.setup_module(StepModule(model, fabric.autocast, rollout_weights))
    module.mark_forward_method("call")
    register_fsdp_forward_method(module.module, "call")
    return module


def within(module: Any, function: Callable[[Any], T]) -> T:
    """`function(model)` inside the wrapped module and in its precision, without gradients.

    For code that reads weights and is no training step: decoding, evaluation, a replay before the
    update. All processes call it together.
    """
    results: list[T] = []
    with torch.no_grad(), whole(module, module.module.rollout_weights == "whole"):
        module.call(Sealed(lambda model: results.append(function(model))))
    reshard(module)
    return results[0]


def passes_in_step(fabric: Fabric, module: Any) -> Callable[[bool], bool] | None:
    """`DecodeOptions.any_continues` for a module whose passes are collectives; None for others."""
    if not is_sharded(module) or module.module.rollout_weights == "whole":
        return None

    def any_continues(continues: bool) -> bool:
        flag = torch.tensor(float(continues), device=fabric.device)
        return bool(fabric.all_reduce(flag, reduce_op="sum"))

    return any_continues
