"""The two parts of main's policy gradient at a checkpoint, over batches of rollouts of an RL stage.

Rollouts of held-out problems are sampled and scored, and get advantages by the rules of an RL
stage. `mtp.training.gradient_split` computes the two parts of each batch's gradient. Nothing is
trained. A batch in which no rollout has an advantage has no gradient: it counts with length 0, and
has no cosine.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..modeling.decode_options import DecodeOptions
from ..reports.interval import mean_interval
from ..rollouts.advantage import GroupRewards, informative
from ..rollouts.prompt_format import PromptFormat
from ..rollouts.reward import score
from ..rollouts.rollout import DecodingConfig, sample
from ..tasks.base import Example, Task
from ..training.batch import TextBatch
from ..training.collate import collate_rollouts
from ..training.gradient_split import split_gradient, split_metrics
from ..training.runtime import quiet_fabric
from ..training.stage import StageConfig
from ..training.step_module import wrap

BOUNDS = {
    "norm_own": (0.0, float("inf")),
    "norm_channel": (0.0, float("inf")),
    "cosine": (-1.0, 1.0),
}


def gradient_metrics(
    model: Any,
    fmt: PromptFormat,
    task: Task,
    examples: list[Example],
    decoding: DecodingConfig,
    stage: StageConfig,
    *,
    reference: Any = None,
    seed: int = 1,
    impl: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Means over batches of problems, with t intervals under `intervals`, and `pooled_cosine`.

    Args:
        model: an mtp model; its gradients must be empty.
        fmt: tokens and phases.
        task: verifier.
        examples: held-out problems, `stage.rollouts.num_prompts` in a batch; a last incomplete
            batch is left out, unless it is the only one.
        decoding: sampler and limits.
        stage: settings of an RL stage: group size, reward, advantage, the stream `policy`.
        reference: frozen model of `reward.legibility_cost`.
        seed: of the rollouts.
        impl: implementation of `mtp_kernels` ops.
        progress: called with the number of finished batches, and of all.

    Raises ValueError for a stage whose rollouts main writes alone.
    """
    if stage.rollouts.mode != "fast":
        raise ValueError(
            "the gradient of the head's tokens needs a stage with rollouts.mode=fast, got "
            f"{stage.rollouts.mode}; measure a run whose RL executes the head's tokens"
        )
    fabric = quiet_fabric(accelerator=next(model.parameters()).device.type, devices=1)
    model.requires_grad_(True).train()
    module = wrap(fabric, model)
    size = min(stage.rollouts.num_prompts, len(examples))
    number = len(examples) // size
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, list[float | None]] = {name: [] for name in BOUNDS}
    pooled: dict[str, list[Tensor]] = {}
    for index in range(number):
        chosen = examples[index * size : (index + 1) * size]
        seeds = torch.randint(2**63 - 1, (size * stage.rollouts.group_size,), generator=generator)
        batch = rollout_batch(model, fmt, task, chosen, decoding, stage, seeds, reference, impl)
        parts = split_gradient(
            fabric,
            module,
            [batch.to(fabric.device)],
            stage.objective.policy,
            logits_detach=stage.logits_detach,
            sampler=decoding.sampler(),
            impl=impl,
        )
        for name, value in split_metrics(parts).items():
            values[name].append(value)
        for part, tensors in parts.items():
            before = pooled.get(part)
            pooled[part] = (
                tensors
                if before is None
                else [one + two for one, two in zip(before, tensors, strict=True)]
            )
        progress(index + 1, number)
    metrics: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for name, bounds in BOUNDS.items():
        known = [value for value in values[name] if value is not None]
        metrics[f"gradient_{name}"] = sum(known) / len(known) if known else None
        found = mean_interval(list(known), bounds) if len(known) > 1 else None
        intervals[f"gradient_{name}"] = found and [found.low, found.high]
    metrics["gradient_pooled_cosine"] = split_metrics(pooled)["cosine"]
    return metrics | {
        "intervals": intervals,
        "num_problems": number * size,
        "num_batches": number,
        "num_without_gradient": sum(value is None for value in values["cosine"]),
    }


def rollout_batch(
    model: Any,
    fmt: PromptFormat,
    task: Task,
    examples: list[Example],
    decoding: DecodingConfig,
    stage: StageConfig,
    seeds: Tensor,
    reference: Any,
    impl: str,
) -> TextBatch:
    """One batch of rollouts with their advantages, as a step of the stage would train on."""
    options = DecodeOptions(
        sampler=decoding.sampler(),
        max_new_tokens=decoding.max_new_tokens,
        seeds=seeds,
        impl=impl,
        compiler=decoding.compiler(),
    )
    with torch.no_grad():
        rollouts = sample(
            model,
            fmt,
            examples,
            fmt.plan("fast"),
            options,
            group_size=stage.rollouts.group_size,
        )
        rewards = score(
            task,
            fmt,
            rollouts,
            stage.reward,
            max_new_tokens=decoding.max_new_tokens,
            reference=reference,
            impl=impl,
        )
    given = GroupRewards(rewards.total, rewards.credits, rewards.total)
    segments = list(range(len(rollouts.prompts)))
    informs = informative(rewards.credits)
    if stage.rollouts.drop_uninformative and bool(informs.any()):
        size = stage.rollouts.group_size
        segments = [s for s in segments if informs[rollouts.owners[s] // size]]
    return collate_rollouts(
        rollouts.prompts,
        rollouts.out,
        stage.advantage_rule()(given).flatten(),
        segments,
        fmt.block_size,
        fmt.pad_id,
        rollouts.owners,
    )
