"""Optimizers of main and head: separate rates, schedules and clips."""

import math
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW of one emitter in one stage."""

    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    """Applied to matrices only."""
    clip_norm: float = 1.0
    """The emitter's gradient is scaled down to this norm; main and head are clipped apart."""
    warmup_steps: int = 20
    decay: str = "cosine"
    """`constant`, `linear` or `cosine`, from lr to final_lr_ratio * lr at the stage's end."""
    final_lr_ratio: float = 0.1

    def validate(self, key: str) -> None:
        """Raises ValueError naming the key of an impossible value."""
        if self.lr < 0:
            raise ValueError(f"{key}.lr must be 0 or above, got {self.lr}")
        if self.clip_norm <= 0:
            raise ValueError(f"{key}.clip_norm must be above 0, got {self.clip_norm}")
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


def split_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters of main and of the head, shared matrices counted with main."""
    parts: dict[str, list[nn.Parameter]] = {"main": [], "head": []}
    for name, parameter in model.named_parameters():
        parts["head" if name.startswith("mtp_head.") else "main"].append(parameter)
    return parts


def build_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    groups = [
        {
            "params": [p for p in parameters if p.ndim >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.betas[0], config.betas[1])
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
