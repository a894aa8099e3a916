"""A stream of the objective from outside the package: one class, and one line that names it."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import config, records

from mtp.trainer import train
from mtp.training.batch import TextBatch
from mtp.training.objectives import STREAMS, ObjectiveConfig, Stream, StreamInputs, Term


@dataclass(kw_only=True)
class EntropyBonus(Stream):
    """Minus the entropy that the policy's sampled tokens estimate, for both emitters."""

    head_weight: float = 1.0

    def counts(self, batch: TextBatch) -> dict[str, float]:
        return {"entropy_main": len(batch.main), "entropy_head": len(batch.head)}

    def terms(self, inputs: StreamInputs) -> dict[str, Term]:
        stats = inputs.scored.stats(inputs.sampler)
        weights = {"main": self.weight, "head": self.weight * self.head_weight}
        return {
            f"entropy_{name}": Term(stats[name].logprob.sum(), weight, {})
            for name, weight in weights.items()
        }


STREAMS.add("entropy_bonus", EntropyBonus)


def test_a_stream_from_outside_is_trained_with(tmp_path: Path):
    given = "stages.rl.objective.extra.entropy_bonus"
    stages = [f"stages.{name}.steps=0" for name in ("main", "head", "joint")]
    train(
        config(
            tmp_path / "run", *stages, "stages.rl.steps=2", "stages.rl.reference=start",
            f"+{given}.weight=0.1", f"+{given}.head_weight=0.5", "evaluation.reference=start",
        )
    )  # fmt: skip
    losses = [r["loss/entropy_head"] for r in records(tmp_path / "run") if "loss" in r]
    assert len(losses) == 2 and all(loss < 0 for loss in losses)


def test_unknown_streams_and_settings_name_their_key():
    with pytest.raises(ValueError, match="objective.extra must be one of entropy_bonus, got 'x'"):
        ObjectiveConfig(extra={"x": {"weight": 1.0}}).validate("objective")
    with pytest.raises(ValueError, match="unknown key objective.extra.entropy_bonus.wait"):
        ObjectiveConfig(extra={"entropy_bonus": {"wait": 1.0}}).validate("objective")
