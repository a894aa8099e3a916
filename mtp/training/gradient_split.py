"""The two parts of main's policy gradient: of main's own tokens, and of the head's tokens.

The policy gradient on main is a sum of two parts: one of the tokens that main sampled, and one of
those that the head sampled, which reaches main through the channel. At `channel_gradient` = 1:

    gradient = own + channel

The lengths of the parts say which of them moves main, and their cosine whether they agree. Each
part is what the stream `policy` gives with its weights and counts, before clipping; KL terms are
not part of it.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from ..modeling.sampler import Sampler
from .batch import RolloutBatch, TextBatch, within_draft_vocabulary
from .objectives import ObjectiveConfig, StreamInputs, Term
from .objectives.policy import Policy
from .optimizers import split_parameters
from .sharding import whole_tensor
from .step_module import Sealed, Step
from .update import global_counts

EMITTERS = {"own": "main", "channel": "head"}
"""The emitter whose tokens each part comes from."""


@dataclass(kw_only=True)
class PolicyOf(Policy):
    """The policy stream with a loss on the tokens of one emitter only."""

    emitter: str = "main"

    def terms(self, inputs: StreamInputs) -> dict[str, Term]:
        """Both terms, so that every parameter has a gradient; that of the other emitter is zero."""
        terms = super().terms(inputs)
        mine = f"policy_{self.emitter}"
        return {n: t if n == mine else replace(t, weight=0.0) for n, t in terms.items()}


def split_gradient(
    fabric: Fabric,
    module: Any,
    batches: list[TextBatch],
    policy: Policy,
    *,
    logits_detach: bool = False,
    sampler: Sampler | None = None,
    impl: str = "auto",
) -> dict[str, list[Tensor]]:
    """The parts `own` and `channel` of main's policy gradient, a tensor per parameter of main.

    Costs two forward and two backward passes of the batches. No gradient is left in the model, and
    torch's noise is as before.

    Args:
        fabric: runs backward and reduction.
        module: the model as `step_module.wrap` returns it, its gradients empty.
        batches: micro-batches of this process; only those of rollouts are used.
        policy: settings of the stream.
        logits_detach: as in `replay_batch`.
        sampler: the distribution that rollouts were sampled from.
        impl: implementation of `mtp_kernels` ops.
    """
    drafted = module.module.model.mtp_head.draft_tokens
    rollouts: list[TextBatch] = [
        within_draft_vocabulary(batch, drafted)
        for batch in batches
        if isinstance(batch, RolloutBatch)
    ]
    parts: dict[str, list[Tensor]] = {}
    devices = [fabric.device] if fabric.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        for part, emitter in EMITTERS.items():
            objective = ObjectiveConfig(policy=PolicyOf(**vars(policy), emitter=emitter))
            counts = global_counts(fabric, objective, rollouts, in_rl=True)
            for index, batch in enumerate(rollouts):
                step = Step(
                    batch,
                    objective,
                    counts,
                    in_rl=True,
                    logits_detach=logits_detach,
                    sampler=sampler or Sampler(),
                    impl=impl,
                )
                is_last = index == len(rollouts) - 1
                with fabric.no_backward_sync(module, enabled=not is_last):
                    loss, _ = module(Sealed(step))
                    fabric.backward(loss * fabric.world_size)
            model = module.module.model
            main = split_parameters(model)["main"].values()
            parts[part] = [p.grad.detach().clone() for p in main if p.grad is not None]
            model.zero_grad(set_to_none=True)
    return parts


def split_metrics(parts: dict[str, list[Tensor]]) -> dict[str, float | None]:
    """Lengths of the parts and their cosine, None if one of them is zero.

    A length is the Euclidean norm over all of main's parameters.
    """

    def product(first: list[Tensor], second: list[Tensor]) -> float:
        pairs = zip(first, second, strict=True)
        products = ((one.float() * two.float()).sum() for one, two in pairs)
        return sum(float(whole_tensor(value)) for value in products)

    own, channel = parts["own"], parts["channel"]
    lengths = math.sqrt(product(own, own)), math.sqrt(product(channel, channel))
    both = lengths[0] * lengths[1]
    return {
        "norm_own": lengths[0],
        "norm_channel": lengths[1],
        "cosine": product(own, channel) / both if both else None,
    }
