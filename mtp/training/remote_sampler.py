"""A second process that samples rollouts, so that it can sample while this one trains. By Ray.

The process holds a copy of the model. A request carries the weights that it samples with. Ray finds
a place for it: on this machine, or in the cluster that RAY_ADDRESS names.

Under `ddp` each training process has one sampling process of its own.
"""

import copy
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from ..modeling.decode_options import DecodeOptions
from ..modeling.phases import PhasePlan
from ..rollouts.prompt_format import PromptFormat
from ..rollouts.rollout import Rollouts, sample
from ..tasks.base import Example
from .precision import cast_weights
from .runtime import FabricConfig, quiet_fabric
from .sharding import weights_of
from .step_module import within, wrap

SECONDS_TO_START = 300.0
"""Seconds that a sampling process may take to begin."""


@dataclass
class Request:
    """Rollouts to sample, wherever the model is."""

    examples: list[Example]
    plan: PhasePlan
    options: DecodeOptions
    group_size: int

    def sample(self, model: Any, fmt: PromptFormat) -> Rollouts:
        """The rollouts by a model."""
        return sample(
            model, fmt, self.examples, self.plan, self.options, group_size=self.group_size
        )


@dataclass
class Blueprint:
    """Class and settings of the model, from which a process builds it without its weights."""

    cls: type[Any]
    config: Any
    dtype: torch.dtype

    @classmethod
    def of(cls, model: Any) -> "Blueprint":
        """A model's own. The model itself cannot be sent: transformers' hooks in it cannot."""
        return cls(type(model), copy.deepcopy(model.config), model.dtype)

    def build(self) -> Any:
        """The model with random weights."""
        model = self.cls(self.config)
        cast_weights(model, self.dtype)
        return model


class Worker:
    """The sampling process's own object."""

    def __init__(
        self, blueprint: Blueprint, fmt: PromptFormat, config: FabricConfig, accelerator: str
    ):
        """config: the run's precision and threads; accelerator: kind of this process's device."""
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        torch.use_deterministic_algorithms(config.deterministic)
        fabric = quiet_fabric(accelerator=accelerator, devices=1, precision=config.precision)
        self.model, self.fmt = blueprint.build(), fmt
        self.module = wrap(fabric, self.model)

    def ready(self) -> bool:
        """True once the process can sample."""
        return True

    def sample(self, request: Request, weights: Mapping[str, Any]) -> Rollouts:
        """The request's rollouts, sampled by a model with these weights, see `packed`."""
        self.model.load_state_dict(unpacked(weights))
        return within(self.module, lambda model: request.sample(model, self.fmt))


def packed(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Weights as arrays of bytes with dtype and shape, which Ray passes on without a copy."""
    return {
        name: (
            value.cpu().contiguous().flatten().view(torch.uint8).numpy(),
            value.dtype,
            value.shape,
        )
        for name, value in weights.items()
    }


def unpacked(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of `packed`."""
    return {
        name: torch.from_numpy(array.copy()).view(dtype).view(shape)
        for name, (array, dtype, shape) in arrays.items()
    }


class RemoteSampler:
    """The sampling process of one training process."""

    def __init__(self, fabric: Fabric, model: Any, fmt: PromptFormat, config: FabricConfig):
        """Starts the process.

        Raises ValueError if Ray starts no process in time.
        """
        check_ray(fabric.device.type)
        import ray

        self.ray, self.started_ray = ray, connect(ray, fabric)
        on_gpu = fabric.device.type == "cuda"
        actor = ray.remote(num_cpus=1, num_gpus=1 if on_gpu else 0)(Worker)
        self.worker = actor.remote(Blueprint.of(model), fmt, config, fabric.device.type)
        try:
            ray.get(self.worker.ready.remote(), timeout=SECONDS_TO_START)
        except ray.exceptions.GetTimeoutError:
            self.close()
            raise ValueError(
                f"rollouts.lag needs a process that samples, but Ray started none within "
                f"{SECONDS_TO_START:.0f} s; give the cluster a free CPU"
                f"{' and GPU' if on_gpu else ''} per training process, or set rollouts.lag=null"
            ) from None

    def submit(self, request: Request, model: Any) -> Any:
        """Ask for rollouts by the model's present weights; `result` waits for them."""
        return self.worker.sample.remote(request, packed(weights_of(model)))

    def result(self, asked: Any) -> Rollouts:
        """The rollouts that were asked for.

        Raises ValueError if the process has died; an error in it is raised here.
        """
        try:
            rollouts: Rollouts = self.ray.get(asked)
        except self.ray.exceptions.ActorDiedError as error:
            raise ValueError(
                "the process that samples rollouts has died "
                f"({str(error).strip().splitlines()[-1].strip()}); use resume=true to continue "
                "from the last checkpoint"
            ) from None
        return rollouts

    def close(self) -> None:
        """End the process, and Ray if this process started it."""
        self.ray.kill(self.worker)
        if self.started_ray:
            self.ray.shutdown()


def check_ray(device_type: str) -> None:
    """Raises ValueError if rollouts cannot be sampled in another process: Ray is not installed, or
    there are GPUs and no cluster. A Ray that starts here would give the sampling process the very
    GPU that trains.
    """
    if find_spec("ray") is None:
        raise ValueError(
            "rollouts.lag samples in another process by Ray, which is not installed; pip install "
            "'mtp-eavesdrop[ray]', or set rollouts.lag=null"
        )
    ray = sys.modules.get("ray")
    is_connected = ray is not None and ray.is_initialized()
    if device_type == "cuda" and not is_connected and "RAY_ADDRESS" not in os.environ:
        raise ValueError(
            "rollouts.lag on GPUs needs a Ray cluster of the GPUs that sample; start it with ray "
            "start --head and CUDA_VISIBLE_DEVICES without the GPUs that train, and set RAY_ADDRESS"
        )


def connect(ray: Any, fabric: Fabric) -> bool:
    """Connect to Ray; True if this started one, which then serves this training process alone.

    Ray's own handler of SIGTERM is taken out again: the run saves a checkpoint at that signal.

    A Ray of this process gives its workers this process's priority in place of a low one, since
    training waits for the rollouts. RAY_worker_niceness in the environment sets another one.
    """
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS", "local")
    local = {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False}
    if address == "local":
        os.environ.setdefault("RAY_worker_niceness", "0")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="ERROR",
            **(local if address == "local" else {}),
        )
    finally:
        signal.signal(signal.SIGTERM, handler)
    return address == "local"
