"""`mtp evaluate --measure`: what the channel carries, how the gradient divides, what thoughts are
for.

Heavy imports wait until a command runs, as in `main.py`.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import DEFAULT_SEED

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..rollouts.prompt_format import PromptFormat
    from ..tasks.base import Example, Task

OPTIONS = {
    "channel": ("others", "temperature", "seed"),
    "gradient": ("seed",),
    "thought": ("reader", "mode", "seed"),
}
"""Measures, and the options that each of them has besides those of every evaluation."""
DEFAULT_OTHERS = 32


def add_measure_options(sub: argparse.ArgumentParser) -> None:
    """Options of `mtp evaluate` that measure something besides accuracy."""
    sub.add_argument(
        "--measure",
        choices=list(OPTIONS),
        help="channel: bits that the message carries to the head; gradient: main's policy gradient "
        "from its own tokens and through the channel; thought: whether the answer comes from the "
        "thought. The result is also written to FOLDER/measures, for `mtp report`",
    )
    sub.add_argument(
        "--others",
        type=int,
        metavar="M",
        help="channel: other messages that each pass's own is compared with; default: "
        f"{DEFAULT_OTHERS}",
    )
    sub.add_argument(
        "--reader",
        metavar="NAME",
        help="thought: frozen model that reads the thoughts: a stage, a folder that mtp saved, or "
        "none; default: the run's evaluation.reference",
    )


def chosen_measure(arguments: argparse.Namespace) -> str | None:
    """The measure; None without --measure.

    Raises ValueError for an option that the measure does not have.
    """
    measure: str | None = arguments.measure
    if measure is None:
        for name in ("others", "reader"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name} is an option of --measure; add --measure")
        return None
    for name in ("search", *arguments.of_search, "others", "reader"):
        if getattr(arguments, name) is not None and name not in OPTIONS[measure]:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is no option of --measure {measure}; remove it")
    if arguments.temperature == 0:
        raise ValueError(
            "--temperature must be above 0 with --measure channel, got 0: a greedy token has no "
            "entropy"
        )
    return measure


def measure(
    arguments: argparse.Namespace,
    measure: str,
    config: "RunConfig",
    stage: str,
    head_is_trained: bool,
    load: "Callable[[], tuple[Any, PromptFormat]]",
) -> None:
    """Measure a stage's model, print the result and write it into the run's folder.

    load: opens the model. Raises ValueError for a model that cannot be measured so.
    """
    if measure in ("channel", "gradient") and not head_is_trained:
        raise ValueError(
            f"--measure {measure} needs a trained head, which stage {stage} does not have; give a "
            "later --stage"
        )
    from rich.console import Console

    from ..evaluation.evaluate import held_out
    from ..reports.measures import FOLDER, print_result, save_result
    from ..reports.progress import PartsProgress, make_console
    from ..training.examples import fit_task

    (arguments.folder / FOLDER).mkdir(exist_ok=True)  # a folder that cannot be written: at once
    model, fmt = load()
    task = fit_task(config.task.build(), config.decoding, config.active_stages(), model, fmt)
    number = arguments.num_problems or config.evaluation.num_problems
    examples = held_out(task, number)
    seed = DEFAULT_SEED if arguments.seed is None else arguments.seed
    functions = {"channel": channel, "gradient": gradient, "thought": thought}
    with PartsProgress(Console(stderr=True)) as report:
        progress = partial(report, measure)
        asked = Asked(
            arguments, config, stage, head_is_trained, model, fmt, task, examples, seed, progress
        )
        settings, metrics = functions[measure](asked)
    settings["seed"] = seed
    result = {"measure": measure, "stage": stage, "settings": settings, **metrics}
    path = save_result(arguments.folder, result)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    how = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
    counts = ", ".join(
        f"{metrics[name]} {name.removeprefix('num_').replace('_', ' ')}"
        for name in ("num_problems", "num_passes", "num_batches", "num_left_out")
        if metrics.get(name)
    )
    title = f"{arguments.folder}, stage {stage}, {measure}: {counts}; {how}"
    print_result(make_console(), title, result)
    print(f"written to {path}", file=sys.stderr)


@dataclass
class Asked:
    """A measurement: what is measured, and with which settings."""

    arguments: argparse.Namespace
    config: "RunConfig"
    stage: str
    """Stage whose model is measured."""
    head_is_trained: bool
    model: Any
    fmt: "PromptFormat"
    task: "Task"
    examples: "list[Example]"
    """Held-out problems."""
    seed: int
    progress: Callable[[int, int], None]
    """Called with the number of finished parts of the work, and of all."""


Measured = tuple[dict[str, Any], dict[str, Any]]
"""Settings that decide a result, and the metrics."""


def channel(asked: Asked) -> Measured:
    """Bits that the message carries."""
    from ..evaluation.channel import channel_metrics

    config = asked.config
    temperature = asked.arguments.temperature or config.decoding.temperature or 1.0
    others = asked.arguments.others or DEFAULT_OTHERS
    metrics = channel_metrics(
        asked.model,
        asked.fmt,
        asked.examples,
        config.decoding,
        temperature=temperature,
        num_others=others,
        seed=asked.seed,
        batch_size=config.evaluation.batch_size,
        impl=config.kernels,
        progress=asked.progress,
    )
    return {"temperature": temperature, "others": others}, metrics


def gradient(asked: Asked) -> Measured:
    """The two parts of main's policy gradient, by the settings of an RL stage of the run."""
    from ..evaluation.policy_gradient import gradient_metrics
    from ..reference import stage_reference

    config = asked.config
    name = rl_stage(config, asked.stage)
    settings = config.stages[name]
    reference = None
    if settings.reward.legibility_cost:
        reference = frozen(asked, stage_reference(config, name) or "")
    metrics = gradient_metrics(
        asked.model,
        asked.fmt,
        asked.task,
        asked.examples,
        config.decoding,
        settings,
        reference=reference,
        seed=asked.seed,
        impl=config.kernels,
        progress=asked.progress,
    )
    return {"settings_of_stage": name}, metrics


def rl_stage(config: "RunConfig", stage: str) -> str:
    """The RL stage whose settings are used: `stage` itself, the next one, or the last one before.

    Raises ValueError if the run has none that trains on rewards.
    """
    names = list(config.active_stages())
    later = [*names[names.index(stage) :], *reversed(names[: names.index(stage)])]
    for name in later:
        settings = config.stages[name]
        if settings.kind == "rl" and settings.objective.policy.weight:
            return name
    raise ValueError(
        "--measure gradient needs a stage with objective.policy.weight above 0, but the run has "
        f"{', '.join(names)}; measure a run that trains by RL"
    )


def thought(asked: Asked) -> Measured:
    """Whether the answer comes from the thought."""
    from ..evaluation.faithfulness import check, faithfulness_metrics
    from ..reference import evaluation_reference

    config, given = asked.config, asked.arguments
    mode = given.mode or ("fast" if asked.head_is_trained else "slow")
    if mode != "slow" and not asked.head_is_trained:
        raise ValueError(f"the head is untrained after stage {asked.stage}; use --mode slow")
    check(asked.fmt, asked.task)
    name = given.reader or evaluation_reference(config)
    if given.reader is None and name == asked.stage:
        name = "none"  # the model would be its own reader
    reader = None if name == "none" else frozen(asked, name)
    metrics = faithfulness_metrics(
        asked.model,
        asked.fmt,
        asked.task,
        asked.examples,
        config.decoding,
        mode=mode,
        reader=reader,
        seed=asked.seed,
        batch_size=config.evaluation.batch_size,
        impl=config.kernels,
        progress=asked.progress,
    )
    return {"mode": mode, "reader": name}, metrics


def frozen(asked: Asked, name: str) -> Any:
    """A stage's model, or that of a folder, beside the measured one.

    Raises ValueError if there is none, or if its vocabulary is another one.
    """
    from ..common.errors import reading
    from ..hub.build import load_model
    from ..reference import folder_of

    config = asked.config
    folder: Path = folder_of(config, asked.arguments.folder, name)
    if not (folder / "config.json").is_file():
        stages = ", ".join(config.active_stages())
        raise ValueError(
            f"--reader must be a stage that has ended ({stages}), a folder that mtp saved, or "
            f"none, got {name}"
        )
    with reading(str(folder)):
        other, its_fmt = load_model(folder, config.weight_dtype())
    vocabularies = [one.tokenizer.get_vocab() for one in (asked.fmt, its_fmt)]  # type: ignore[attr-defined]
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"--reader must have the vocabulary of the measured model, which {name} does not; "
            "choose a stage of the same run"
        )
    return other.to(next(asked.model.parameters()).device).eval().requires_grad_(False)
