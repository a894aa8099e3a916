"""The same tensors through TRL's losses give the same loss and gradients.

TRL knows one emitter, so every token here is main's, and a pass is one token.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from mtp.training.algorithms import ALGORITHMS
from mtp.training.batch import PolicyRows, RolloutBatch
from mtp.training.objectives.policy import Policy
from mtp.training.objectives.scored import RowStats
from mtp.training.objectives.stream import StreamInputs

pytest.importorskip("trl", reason="TRL is not installed; `pip install trl` compares with it")

LENGTHS, LONGEST, LIMIT = [4, 2, 3], 4, 6
ADVANTAGES = torch.tensor([0.7, -1.1, 0.4])
MASK = torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]
generator = torch.Generator().manual_seed(3)
OLD = -1 - torch.rand(3, LONGEST, generator=generator)
NEW = OLD + 0.5 * torch.randn(3, LONGEST, generator=generator)


def ours(algorithm: str, **settings) -> tuple[float, torch.Tensor]:
    """(loss, gradient on the log-probabilities [3, 4])."""
    policy = Policy(weight=1.0, algorithm=algorithm, length=LIMIT, **settings)
    logprob = NEW.clone().requires_grad_(True)
    tokens = torch.zeros(3, LONGEST + 1, dtype=torch.long)
    rows = torch.nn.functional.pad(MASK, (0, 1)).flatten().nonzero()[:, 0]
    none = torch.zeros(0, dtype=torch.long)
    main = PolicyRows(
        positions=rows,
        slots=torch.zeros_like(rows),
        targets=torch.zeros_like(rows),
        outputs=rows,
        rollouts=rows // (LONGEST + 1),
        advantages=ADVANTAGES[:, None].expand_as(OLD)[MASK],
        sampled=OLD[MASK],
        old=OLD[MASK],
    )
    batch = RolloutBatch(
        tokens=tokens,
        anchors=none,
        slot_inputs=none[:, None],
        main=main,
        head=main.take(none),
    )

    def emitter(values: torch.Tensor) -> RowStats:
        return RowStats(values, torch.zeros_like(values))

    stats = {"main": emitter(logprob[MASK]), "head": emitter(torch.zeros(0))}
    scored = SimpleNamespace(stats=lambda sampler: stats)
    term = policy.terms(StreamInputs(scored, batch))["policy_main"]
    loss = term.total / policy.counts(batch)["policy_main"]
    loss.backward()
    return loss.item(), logprob.grad


def theirs(kind: type, **settings) -> tuple[float, torch.Tensor]:
    """The same of a trainer's `_compute_loss`, on a trainer that has just what it reads."""
    logprob = NEW.clone().requires_grad_(True)
    entropies = torch.zeros_like(NEW)
    trainer = object.__new__(kind)
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, is_main_process=True
    )
    vars(trainer).update(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        epsilon_low=0.2,
        epsilon_high=0.2,
        loss_type="grpo",
        args=SimpleNamespace(delta=None, steps_per_generation=1),
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=LIMIT,
        accelerator=accelerator,
        _entropy_bonus_enabled=False,
        _metrics={"train": {}},
    )
    vars(trainer).update(settings)
    trainer._metrics = {"train": _Lists()}
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logprob, entropies, None)
    ids = torch.zeros(3, LONGEST, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones(3, 1),
        "completion_ids": ids,
        "completion_mask": MASK.float(),
        "advantages": ADVANTAGES,
        "old_per_token_logps": OLD,
        "old_logps": (OLD * MASK).sum(1),
        "num_items_in_batch": MASK.sum().float(),
    }
    loss = trainer._compute_loss(None, inputs)
    loss.backward()
    return loss.item(), logprob.grad


class _Lists(dict):
    def __missing__(self, key: str) -> list:
        self[key] = []
        return self[key]


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("grpo", {"loss_type": "grpo"}),
        ("dapo", {"loss_type": "dapo", "epsilon_high": 0.28}),
        ("dr_grpo", {"loss_type": "dr_grpo"}),
        ("reinforce_pp", {"loss_type": "bnpo"}),
        ("gspo", {"importance_sampling_level": "sequence"}),
        ("cispo", {"loss_type": "cispo"}),
    ],
)
def test_the_loss_and_its_gradient_are_trls(algorithm, settings):
    from trl.trainer.grpo_trainer import GRPOTrainer

    preset = ALGORITHMS.get(algorithm, "algorithm")
    if algorithm == "gspo":
        settings |= {"epsilon_low": preset.clip_low, "epsilon_high": preset.clip_high}
    if algorithm == "cispo":
        settings |= {"epsilon_high": 1 + preset.clip_high}  # TRL names the bound itself
    loss, gradient = theirs(GRPOTrainer, **settings)
    mine, my_gradient = ours(algorithm)
    assert math.isclose(mine, loss, rel_tol=1e-5)
    assert torch.allclose(my_gradient, gradient, atol=1e-6)


def test_rloo_has_trls_gradient():
    """Its value is summed over tokens here and over rollouts there; gradients are the same."""
    from trl.trainer.rloo_trainer import RLOOTrainer

    _, gradient = theirs(RLOOTrainer)
    _, my_gradient = ours("rloo")
    assert gradient.abs().sum() > 0.1
    assert torch.allclose(my_gradient, gradient, atol=1e-6)
