"""Strategy `fsdp2`: weights, gradients and optimizer states in shards, one on each process.

`fully_shard` (Zhao et al. 2023, arXiv 2304.11277; torch's second implementation) on each layer of
main and on the root, which holds what is left: embeddings, output matrices and the head. A layer is
gathered for its own forward and backward, the root for the whole step. Nothing here has an effect
under another strategy.

Every gathering is a collective: all processes run the same layers equally often.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor


def sharded_strategy(num_processes: int, precision: str) -> ModelParallelStrategy:
    """Fabric's strategy over this many processes."""
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = mixed if precision == "bf16-mixed" else MixedPrecisionPolicy()

    def parallelize(module: Any, mesh: DeviceMesh) -> Any:
        check_mean(mesh["data_parallel"])
        return shard(module, module.model, mesh["data_parallel"], policy)

    return ModelParallelStrategy(
        parallelize, data_parallel_size=num_processes, tensor_parallel_size=1
    )


def check_mean(mesh: DeviceMesh) -> None:
    """Raises ValueError if gradients would be summed over processes where a mean is asked for, as
    gloo does in torch 2.8.
    """
    if mesh.size() == 1:
        return
    given = torch.ones(mesh.size(), device=mesh.device_type)
    mean = torch.zeros(1, device=mesh.device_type)
    dist.reduce_scatter_tensor(mean, given, op=dist.ReduceOp.AVG, group=mesh.get_group())
    if float(mean) != 1.0:
        raise ValueError(
            f"fabric.strategy=fsdp2 on a {mesh.device_type} needs torch 2.11 or newer, got "
            f"{torch.__version__}, whose mean over processes is a sum; use fabric.strategy=ddp"
        )


def shard(root: Any, model: Any, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> Any:
    """Shards `root`, a module that holds an mtp `model` or is one; its layers by the policy."""
    for layer in main_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh)
    return root


def main_layers(model: Any) -> list[nn.Module]:
    """Main's layers. Raises ValueError if they cannot be found."""
    number = model.main_config.num_hidden_layers
    for module in model.mtp_decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return list(module)
    raise ValueError(
        f"fabric.strategy=fsdp2 needs a main whose {number} layers are one list, got "
        f"{type(model).__name__}; use fabric.strategy=ddp"
    )


def is_sharded(module: Any) -> bool:
    """True for a module that `fully_shard` has changed, wrapped by Fabric or not."""
    return isinstance(getattr(module, "module", module), FSDPModule)


def shard_frozen(model: Any, like: Any) -> Any:
    """A frozen model in shards, over the processes of the sharded module `like`."""
    weight = next(like.parameters())
    assert isinstance(weight, DTensor)
    shard(model, model, weight.device_mesh, MixedPrecisionPolicy())
    register_fsdp_forward_method(model, "replay")
    return model


@contextmanager
def whole(module: Any, chosen: bool = True) -> Iterator[None]:
    """Inside, a sharded module keeps all its weights gathered, so that its forwards need nobody.

    All processes enter and leave together. Without `chosen`, and for other modules, nothing is
    done.
    """
    if not (chosen and is_sharded(module)):
        yield
        return
    parts = shards_of(module)
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts[1:]:
            part.set_reshard_after_forward(True, recurse=False)
        reshard(module)


def reshard(module: Any) -> None:
    """Frees the gathered weights of a sharded module."""
    if is_sharded(module):
        for part in shards_of(module):
            part.reshard()


def shards_of(module: Any) -> list[FSDPModule]:
    """The root and the layers."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def gathered(tree: Any, keep: bool, seen: dict[int, Any] | None = None) -> Any:
    """A tree of dicts, lists and tuples with every shard replaced by its whole tensor on the CPU.

    A collective. keep: False leaves None in the tensors' places, for processes that need none.
    A tensor that occurs twice is gathered once, and occurs twice again.
    """
    seen = {} if seen is None else seen
    if isinstance(tree, DTensor):
        if id(tree) not in seen:
            full = tree.full_tensor().detach()
            seen[id(tree)] = full.cpu() if keep else None
        return seen[id(tree)]
    if isinstance(tree, dict):
        return {key: gathered(value, keep, seen) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value, keep, seen) for value in tree)
    return tree


def weights_of(model: Any, keep: bool = True) -> dict[str, Any]:
    """The model's state dict, gathered as `gathered` does. Shared weights are one tensor."""
    state: dict[str, Any] = gathered(dict(model.state_dict(keep_vars=True)), keep)
    return {name: None if value is None else value.detach() for name, value in state.items()}


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Give an optimizer the state of a checkpoint, whose tensors are whole."""
    optimizer.load_state_dict(sharded_state(optimizer, state))


def sharded_state(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint with its tensors in shards like the optimizer's parameters."""
    parts = getattr(optimizer, "parts", None)
    if parts is not None:  # an optimizer made of several
        return {name: sharded_state(part, state[name]) for name, part in parts.items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def sharded(parameter: Any, entries: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(parameter, DTensor):
            return entries
        return {name: shard_as(parameter, value) for name, value in entries.items()}

    values = {
        index: sharded(parameters[int(index)], entries) for index, entries in state["state"].items()
    }
    return state | {"state": values}


def shard_as(parameter: DTensor, value: Any) -> Any:
    """A whole tensor in shards like a parameter's; what has another shape stays as it is."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def whole_tensor(value: Any) -> Tensor:
    """A tensor of one element, whole or in shards, as a whole one."""
    return torch.as_tensor(value.full_tensor() if isinstance(value, DTensor) else value)
