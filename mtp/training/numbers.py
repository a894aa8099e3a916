"""Numbers watched in training: what is not finite, and a sampler that replay disagrees with."""

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from ..common.bounds import bounded
from ..modeling.contract import dropout_fields


@dataclass(kw_only=True)
class NumbersConfig:
    """Reactions of a run to numbers that should not be."""

    not_finite: str = "stop"
    """Reaction to a loss or gradient that is NaN or infinite. `stop`: end the run. `skip`: leave
    the optimizer step out. In both cases the batch is saved in the run's `not_finite/`."""
    max_skipped: int = bounded(10, at_least=1)
    """Maximum number of optimizer steps in a row that `skip` leaves out; the run then ends."""
    sampler_difference: float = bounded(0.05, above=0)
    """Nats. Warn once if a rollout's tokens have log-probabilities in replay that differ from the
    sampler's by more than this on average, before any update on them."""

    def validate(self) -> None:
        """Raises ValueError naming the key of an impossible value."""
        if self.not_finite not in ("stop", "skip"):
            raise ValueError(f"numbers.not_finite must be stop or skip, got {self.not_finite!r}")


def active_dropout(model: Any) -> str | None:
    """A setting of the model that drops numbers in training, as `name=value`; None without one."""
    found = dropout_fields(model.config)
    return next((f"{name}={value}" for name, value in found.items()), None)


def sampler_warning(
    metrics: dict[str, float], emitters: list[str], limit: float, model: Any, precision: str
) -> str | None:
    """A warning about the first update on new rollouts; None if sampler and replay agree.

    Args:
        metrics: of the update.
        emitters: `main` and, where it sampled tokens, `head`.
        limit: `NumbersConfig.sampler_difference`.
        model: the model that sampled and was replayed.
        precision: the run's `fabric.precision`.
    """
    found = {name: metrics.get(f"{name}/sampling_logp_difference", 0.0) for name in emitters}
    worst = max(found, key=lambda name: found[name])
    if found[worst] <= limit:
        return None
    dropout = active_dropout(model)
    if dropout is not None:
        cause = f"replay runs with the model's {dropout}, and sampling without; set it to 0"
    elif precision != "32-true":
        cause = (
            f"fabric.precision={precision} rounds the two differently; rollouts.recompute_old=true "
            "takes ratios to replay, and objective.policy.correction_cap=2 corrects for the rest"
        )
    else:
        cause = (
            "neither dropout nor precision explains it; compare with kernels=reference and with "
            "model.attention=eager"
        )
    return (
        f"log-probabilities of {worst}'s tokens differ by {found[worst]:.3g} nats on average "
        f"between sampler and replay (numbers.sampler_difference={limit:g}): {cause}"
    )


def as_tree(value: Any) -> Any:
    """Dataclasses as dicts of their fields, in lists too: what a checkpoint's format holds."""
    if is_dataclass(value):
        return {field.name: as_tree(getattr(value, field.name)) for field in fields(value)}
    return [as_tree(item) for item in value] if isinstance(value, list | tuple) else value
