"""Means over the kept rollouts by slot: entropy, use of the channel, agreement with main."""

from collections import defaultdict
from typing import Any


def slot_means(
    rollouts: list[dict[str, Any]], stages: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """For each stage, values by slot; slot 0 is main's.

    `entropy`: mean entropy in nats. `message`: mean nats that a token's log-probability loses with
    another pass's message, which says how much the slot uses the channel. `agreement`: share of the
    slot's tokens that are main's likeliest, as are all before them in the pass. `accepted`: the
    evaluation's own measure in verified mode. `reference`: mean negative log-likelihood under the
    reference.
    """
    accepted = {stage["name"]: stage.get("acceptance_by_slot") for stage in stages}
    by_stage: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for rollout in rollouts:
        if rollout["ends_stage"]:
            by_stage[rollout["stage"]].append(rollout)
    found = []
    for stage, rows in by_stage.items():
        values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            collect(row, values)
        slots = range(max(max(row["slots"], default=0) for row in rows if "slots" in row) + 1
                      if any("slots" in row for row in rows) else 1)  # fmt: skip
        about = {"stage": stage, "rollouts": len(rows), "accepted": accepted.get(stage)}
        found.append(
            about | {name: [_mean(by_slot.get(slot)) for slot in slots]
                     for name, by_slot in values.items()}
        )  # fmt: skip
    return found


def collect(row: dict[str, Any], values: dict[str, dict[int, list[float]]]) -> None:
    """Add the values of one rollout's tokens by slot, those of its fast phases."""
    number = len(row["tokens"])
    slots, none = row.get("slots", [0] * number), [None] * number
    starts = [*row["phases"], [number, "", ""]]
    for (start, _, mode), (end, _, _) in zip(starts, starts[1:], strict=False):
        if mode == "slow" and row["mode"] != "slow":
            continue
        agrees = True
        for at in range(start, end):
            slot = slots[at]
            if slot < 0:
                continue
            for name in ("entropy", "message"):
                value = row.get(name, none)[at]
                if value is not None:
                    values[name][slot].append(value)
            value = row.get("reference", none)[at]
            if value is not None:
                values["reference"][slot].append(-value)
            same = row.get("agrees", none)[at]
            agrees = slot == 0 or (agrees and same is True)
            if slot > 0 and same is not None:
                values["agreement"][slot].append(float(agrees))


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None
