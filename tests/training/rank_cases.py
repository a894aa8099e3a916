"""Steps that must be the same on any number of processes: an objective over the same data."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from helpers import PAD, PLAN, SAMPLES, rollouts, tiny_model

from mtp.modeling.sampler import Sampler
from mtp.steps import evened
from mtp.training.batch import TextBatch, without_rows
from mtp.training.collate import collate_main_rollouts, collate_rollouts, collate_text
from mtp.training.objectives import ObjectiveConfig
from mtp.training.optimizers import split_parameters
from mtp.training.sharding import gathered, is_sharded, shard_frozen
from mtp.training.step_module import wrap
from mtp.training.update import update


@dataclass
class Case:
    """A step: which batches, and what is learned from them."""

    objective: dict[str, dict[str, Any]]
    rollouts: str = ""
    """`fast` or `slow`; empty: none."""
    solved: bool = False
    split: tuple[tuple[tuple[int, ...], ...], ...] = (((0,), (2, 1)), ((3,),))
    """Rollouts of each micro-batch of each process."""
    head: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def policy(algorithm: str, **settings: Any) -> Case:
    return Case({"policy": {"weight": 1.0, "algorithm": algorithm, **settings}}, "fast")


UNEVEN = (((0, 1), (2,), (3,)), ())
"""The second process has no rollout."""

CASES: dict[str, Case] = {
    "main_ce": Case({"main_ce": {"weight": 1.0}}, solved=True),
    "head_ce": Case({"head_ce": {"weight": 0.7, "slot_weights": [3.0, 2.0, 1.0]}}, solved=True),
    "head_kl": Case({"head_kl": {"weight": 1.0}, "main_ce": {"weight": 0.1}}, solved=True),
    "preserve": Case({"preserve": {"weight": 1.0}, "main_ce": {"weight": 1}}, solved=True),
    "reference_kl": Case({"reference_kl": {"weight": 1.0}}, "fast"),
    "reference_kl_reverse": Case({"reference_kl": {"weight": 1.0, "reverse": True}}, "fast"),
    "k1": Case({"reference_kl": {"weight": 1.0, "kind": "k1"}}, "fast"),
    "k3": Case({"reference_kl": {"weight": 1.0, "kind": "k3"}}, "fast"),
    "grpo": policy("grpo"),
    "dapo": policy("dapo"),
    "dr_grpo": policy("dr_grpo", length=20),
    "rloo": policy("rloo"),
    "gspo": policy("gspo"),
    "cispo": policy("cispo"),
    "reinforce_pp": policy("reinforce_pp"),
    "block": policy("dapo", ratio="block"),
    "slow": Case(
        {"policy": {"weight": 1.0}, "head_ce": {"weight": 1, "on_rollouts": True}}, "slow"
    ),
    "slow_gspo": Case({"policy": {"weight": 1.0, "algorithm": "gspo"}}, "slow"),
    "head_tv": Case(
        {"policy": {"weight": 1.0, "head_weight": 0.0}, "head_tv": {"weight": 1}}, "slow"
    ),
    "parts_that_solved_examples_alone_reach": Case(
        {"preserve": {"weight": 1.0}, "head_ce": {"weight": 1.0}}, "fast", solved=True
    ),
    "everything": Case(
        {
            "policy": {"weight": 1.0, "correction_cap": 2.0, "head_weight": 0.5},
            "reference_kl": {"weight": 0.3},
            "preserve": {"weight": 0.2},
            "head_kl": {"weight": 0.1},
            "main_ce": {"weight": 0.1},
            "head_ce": {"weight": 0.2},
        },
        "fast",
        solved=True,
        options={"channel_gradient": 0.5, "logits_detach": True},
    ),
    "one_process_without_rollouts": Case(
        {
            "policy": {"weight": 1.0, "algorithm": "gspo"},
            "reference_kl": {"weight": 0.3},
            "preserve": {"weight": 0.2},
            "main_ce": {"weight": 0.1},
        },
        "fast",
        solved=True,
        split=UNEVEN,
    ),
    "head_of_its_own": Case(
        {"policy": {"weight": 1.0}, "head_kl": {"weight": 0.1}},
        "fast",
        split=UNEVEN,
        head={"shared_embeddings": False, "recall": True},
    ),
}


def batches_of(case: Case, model: Any, rank: int, world: int) -> list[TextBatch]:
    """The share of one of `world` processes; together they train on the same data."""
    batches: list[TextBatch] = []
    if case.solved:
        mine = (
            SAMPLES + SAMPLES[:1] if world == 1 else [SAMPLES[:2], SAMPLES[2:] + SAMPLES[:1]][rank]
        )
        batches.append(collate_text(mine, PLAN, 4, PAD))
    if not case.rollouts:
        return batches
    prompts, record, advantages = rollouts(model)
    parts = [(tuple(range(4)),)] if world == 1 else case.split
    for chosen in parts[rank] or ((0,),):
        if case.rollouts == "slow":
            batch = collate_main_rollouts(prompts, record, advantages, list(chosen), PLAN, 4, PAD)
        else:
            batch = collate_rollouts(prompts, record, advantages, list(chosen), 4, PAD)
        batches.append(batch if parts[rank] else without_rows(batch))
    return batches


def take_step(case: Case, fabric: Any) -> dict[str, Any]:
    """Metrics of one update by plain SGD at rate 1, and the weights after it."""
    model = tiny_model(tied=False, **case.head)
    batches = batches_of(case, model, fabric.global_rank, fabric.world_size)
    solved = batches[: int(case.solved)]
    rest = batches[int(case.solved) :]
    if rest:
        rest = evened(SimpleNamespace(fabric=fabric), rest)
    objective = ObjectiveConfig()
    for name, settings in case.objective.items():
        for key, value in settings.items():
            setattr(getattr(objective, name), key, value)
    model.mtp_head.requires_grad_(objective.uses_head)  # as a stage's `train_head` must be
    reference = tiny_model(seed=3).requires_grad_(False).eval()
    module = wrap(fabric, model.train())
    if is_sharded(module):
        reference = shard_frozen(reference, module)
    optimizers = {
        part: fabric.setup_optimizers(torch.optim.SGD(parameters.values(), lr=1.0))
        for part, parameters in split_parameters(model).items()
        if part == "main" or objective.uses_head
    }
    metrics = update(
        fabric,
        module,
        optimizers,
        [*solved, *rest],
        objective,
        clip_norms={"main": 1e6, "head": 1e6},
        sampler=Sampler(),
        reference=reference,
        **case.options,
    )
    return {"metrics": metrics, "weights": gathered(model.state_dict(), keep=True)}
