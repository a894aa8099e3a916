"""A run's folder made by hand: two stages, four problems, every field of the report."""

import json
from pathlib import Path
from typing import Any

PLANTED = '<script>window.planted = 1</script><img src=x onerror="window.planted = 1">'
"""HTML in a model's text."""


def rollout(
    problem: int, prompt: str, blocks: list[list[str]], answer: str, *, stage: str, right: bool,
    steps: list[list[Any]], mistake: dict[str, Any] | None, correct: str,
) -> dict[str, Any]:  # fmt: skip
    """A rollout whose thought is written in blocks, then its answer token by token."""
    thought = [token for block in blocks for token in block]
    tokens = [*thought, *answer, "<eos>"]
    slots = [slot for block in blocks for slot in range(len(block))] + [0] * (len(answer) + 1)
    starts = [sum(map(len, blocks[:number])) for number in range(len(blocks))]
    starts += range(len(thought), len(tokens))
    number = len(tokens)
    heads = [-0.5 if slot else None for slot in slots]
    step = 10 if stage == "joint" else 20
    return {
        "global_step": step, "step": 10, "ends_stage": True, "stage": stage, "mode": "fast",
        "problem": problem, "prompt": prompt, "answer": correct, "given": answer, "right": right,
        "passes": starts, "phases": [[0, "thought", "fast"], [len(thought), "answer", "slow"]],
        "segments": [{"start": 0, "context": prompt, "ended_by": "end", "memory": ""}],
        "steps": steps, "mistake": mistake, "tokens": tokens, "slots": slots,
        "logprob": [-0.25] * number, "entropy": [0.125 * (slot + 1) for slot in slots],
        "alternatives": [[[token, -0.25], ["7", -2.0]] for token in tokens],
        "main": heads, "main_likeliest": ["5" if slot else None for slot in slots],
        "agrees": [t == "5" if slot else None for t, slot in zip(tokens, slots, strict=True)],
        "message": [1.5 if slot else None for slot in slots],
        "reference": [-1.0] * number, "reference_likeliest": ["8"] * number,
    }  # fmt: skip


def rollouts(stage: str) -> list[dict[str, Any]]:
    """Problem 1 is wrong before RL and right after it, problem 2 the other way round."""
    before = stage == "joint"
    wrong = {"token": 5, "kind": "step", "written": "1+1=3", "expected": "1+1=2"}
    sum_wrong: dict[str, Any] = {
        "blocks": [["1", "+", "1", "="], ["", "3", "</think>"]], "answer": "3",
        "steps": [[0, 6, False, "1+1=2"]], "mistake": wrong,
    }  # fmt: skip
    sum_right: dict[str, Any] = {
        "blocks": [["1", "+", "1", "="], ["2", "</think>"]], "answer": "2",
        "steps": [[0, 5, True, "1+1=2"]], "mistake": None,
    }  # fmt: skip
    copied = {"token": 6, "kind": "answer", "written": "5", "expected": "4"}
    two = sum_right | {"answer": "4" if before else "5", "mistake": None if before else copied}
    given: dict[str, Any] = {"stage": stage}
    planted: dict[str, Any] = {
        "blocks": [[PLANTED, "</think>"]], "answer": "0", "steps": [], "mistake": None,
    }  # fmt: skip
    return [
        rollout(0, "1+0=", **sum_right | {"answer": "1"}, right=True, correct="1", **given),
        rollout(1, "1+1=", **(sum_wrong if before else sum_right), right=not before, correct="2",
                **given),
        rollout(2, "2+2=", **two, right=before, correct="4", **given),
        rollout(3, "</script>3", **planted, right=True, correct="0", **given),
    ]  # fmt: skip


def write_run(folder: Path, *, name: str = "made", seed: int = 1, has_ended: bool = True) -> Path:
    """Write the folder and return it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"name: {name}\nseed: {seed}\n")
    records: list[dict[str, Any]] = []
    outcomes: list[dict[str, Any]] = []
    stages = []
    for number, stage in enumerate(("joint", "rl")):
        step = 10 * (number + 1)
        at = {"stage": stage, "step": 10, "global_step": step}
        time = {"step_time": 2.0, "rollout_time": 0.5} if stage == "rl" else {"step_time": 1.0}
        rl = {"reward": 0.75, "main/kl": 0.01, "head/kl": 0.2} if stage == "rl" else {}
        records.append({**at, "loss": 1.0 / step, "tokens_per_second": 100.0, **time, **rl})
        metrics = {
            "slow_accuracy": 1.0, "slow_passes": 8.0, "fast_accuracy": 0.75, "fast_passes": 4.0,
            "true_steps": 0.5, "acceptance_by_slot": [0.9, 0.5, 0.25],
        }  # fmt: skip
        records.append({**at, **{f"eval/{key}": value for key, value in metrics.items()}})
        ended = {**at, "ends_stage": True, "problems": "abc"}
        outcomes.append({**ended, "mode": "slow", "right": "1111"})
        outcomes.append({**ended, "mode": "fast", "right": "1011" if number == 0 else "1101"})
        about = {"name": stage, "steps": 10, "seconds": 9.0, "num_problems": 4}
        stages.append({**about, **metrics})
    if has_ended:
        summary = {"stages": stages, "seed": seed, "seconds": 18.0, "export": "export"}
        (folder / "summary.json").write_text(json.dumps(summary))
    rows = [row for stage in ("joint", "rl") for row in rollouts(stage)]
    for file, lines in (("metrics", records), ("outcomes", outcomes), ("thoughts", rows)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{file}.jsonl").write_text(text)
    return folder
