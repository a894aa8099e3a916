"""Optimizers of main and head: separate rates, schedules and clips.

Muon (Jordan et al. 2024; its update scaled to AdamW's as in Liu et al. 2025, arXiv 2502.16982)
updates the matrices of hidden layers, and AdamW all other parameters.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..common.bounds import bounded
from ..modeling.modeling_mtp import family_class
from .muon import Muon

BETAS = (0.9, 0.95)
"""AdamW's betas, as in most runs of language models."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer of one emitter in one stage."""

    algorithm: str = "adamw"
    """Algorithm: `adamw`, or `muon` for the matrices of hidden layers and AdamW for the rest."""
    lr: float = bounded(1e-3, at_least=0, at_most=1000)
    """Learning rate after the warm-up."""
    muon_lr_ratio: float = bounded(3.0, above=0)
    """Ratio of Muon's rate to `lr`. At 1 an update has the root mean square of AdamW's in large
    models; small models with noisy gradients make larger updates."""
    weight_decay: float = bounded(0.0, at_least=0)
    """Weight decay, applied to matrices only: not to norms, biases and rates."""
    clip_norm: float = bounded(1.0, above=0)
    """Maximum norm of the emitter's gradient; main and head are clipped separately."""
    warmup_steps: int = bounded(20, at_least=0)
    """Number of steps in which the rate rises linearly to `lr`."""
    decay: str = "cosine"
    """Schedule of the rate: `constant`, `linear` or `cosine`, from lr to final_lr_ratio * lr at the
    stage's end."""
    final_lr_ratio: float = bounded(0.1, at_least=0)
    """Rate at the stage's end over `lr`."""

    def validate(self, key: str) -> None:
        """Raises ValueError naming the key of an impossible value."""
        if self.algorithm not in ("adamw", "muon"):
            raise ValueError(f"{key}.algorithm must be adamw or muon, got {self.algorithm!r}")
        if self.decay not in ("constant", "linear", "cosine"):
            raise ValueError(f"{key}.decay must be constant, linear or cosine, got {self.decay!r}")

    def lr_at(self, step: int, num_steps: int) -> float:
        """The rate of a step counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return self.lr
        left = max(1, num_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / left)
        shape = 1 - progress if self.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.lr * (self.final_lr_ratio + (1 - self.final_lr_ratio) * shape)


def split_parameters(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Parameters of main and of the head by name, shared matrices counted with main."""
    parts: dict[str, dict[str, nn.Parameter]] = {"main": {}, "head": {}}
    for name, parameter in model.named_parameters():
        parts["head" if name.startswith("mtp_head.") else "main"][name] = parameter
    return parts


def num_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters of main and of the head, shared matrices counted with main."""
    parts = split_parameters(model)
    return {name: sum(p.numel() for p in part.values()) for name, part in parts.items()}


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and AdamW on separate parameters, behind one interface.

    The groups are those of the two, so setting a rate in a group sets it in its optimizer.
    """

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.AdamW):
        self.parts = {"muon": muon, "adamw": adamw}
        super().__init__([*muon.param_groups, *adamw.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both. Closures are not supported."""
        assert closure is None
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both, by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the states that `state_dict` returned."""
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        # Loading replaces the groups of the two.
        self.param_groups[:] = [g for part in self.parts.values() for g in part.param_groups]


def fixed_parameters(model: Any) -> set[str]:
    """Names of parameters that no stage trains.

    They are those that the family's class builds without a gradient, which a checkpoint does not
    record, and those of indexers (DeepSeek-V3.2), which select tokens: no loss of mtp's reaches
    them.
    """
    with torch.device("meta"):
        built = family_class(model.config.model_type)(copy.deepcopy(model.config))
    return {n for n, p in built.named_parameters() if not p.requires_grad or ".indexer." in n}


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """True for what multiplies vectors or is a table of them.

    Norms and biases may have two dimensions, such as a norm by attention head, and so have rates of
    state-space models (`A_log`) and of RWKV (`time_mix`).
    """
    parts = ("norm", "bias", "A_log", "time_")
    return parameter.ndim >= 2 and not any(part in name for part in parts)


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """True for the matrices of hidden layers: neither embeddings nor output matrices."""
    is_table = name == "head.weight" or any(
        part in name for part in ("embed", "lm_head", ".wte.", ".wpe.")
    )
    return parameter.ndim == 2 and is_matrix(name, parameter) and not is_table


def is_stack_of_matrices(parameter: nn.Parameter) -> bool:
    """True for the experts of a layer in one parameter [E, ., .]; the filters of a convolution over
    each channel, [D, 1, width], are none.
    """
    return parameter.ndim == 3 and min(parameter.shape) > 1


def build_optimizer(
    parameters: dict[str, nn.Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """The optimizer of an emitter's parameters, with weight decay on matrices only.

    Raises ValueError for Muon where a layer's experts are one parameter: it takes single matrices.
    """
    muon_names = [n for n, p in parameters.items() if is_hidden_matrix(n, p)]
    if config.algorithm == "adamw":
        muon_names = []
    stacks = [n for n, p in parameters.items() if is_stack_of_matrices(p)]
    if muon_names and stacks:
        raise ValueError(
            f"optimizers.*.algorithm must be adamw for a mixture of experts, got muon: {stacks[0]} "
            "holds the matrices of several experts, and most weights would be left to AdamW; set "
            "it to adamw"
        )
    rest = {n: p for n, p in parameters.items() if n not in set(muon_names)}
    matrices = [p for n, p in rest.items() if is_matrix(n, p)]
    others = [p for n, p in rest.items() if not is_matrix(n, p)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, fused=True)
    if not muon_names:
        return adamw
    muon = Muon(
        [parameters[name] for name in muon_names],
        lr=config.lr * config.muon_lr_ratio,
        weight_decay=config.weight_decay,
    )
    muon.param_groups[0]["lr_ratio"] = config.muon_lr_ratio
    return MuonWithAdamW(muon, adamw)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate, times the group's own ratio where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
