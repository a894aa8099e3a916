"""Frozen models that a run compares with: the reference of the loss, and that of the evaluation.

A metric that training optimizes is no independent measure, so the two should be different models.
`reference_in_loss` in a stage's summary is true if they were the same.
"""

from pathlib import Path
from typing import Any

from .common.errors import reading
from .common.files import save_atomically
from .config import RunConfig
from .hub.build import load_model, read_saved, save_model
from .rollouts.prompt_format import PromptFormat
from .run import Run
from .training.sharding import is_sharded, shard_frozen

START = "start"
"""The model that the run began from."""


def stage_reference(config: RunConfig, name: str) -> str | None:
    """Name of the stage, or `start`, that a stage's streams compare with; None if none of them
    does.

    Raises ValueError naming the key if there is no such model by the time the stage begins.
    """
    stages = config.active_stages()
    stage, earlier = stages[name], list(stages)[: list(stages).index(name)]
    if not stage.uses_reference:
        return None
    users = [f"objective.{stream}" for stream in stage.objective.reference_users()]
    user = users[0] if users else "reward.legibility_cost"
    key = f"stages.{name}.reference"
    if stage.reference == START:
        return START
    if not earlier:
        raise ValueError(
            f"stages.{name}.{user} needs a stage before it, since {key}="
            f"{stage.reference} is a model as a stage left it; {key}=start is the model that the "
            "run began from"
        )
    if stage.reference in ("previous", "first"):
        return earlier[-1 if stage.reference == "previous" else 0]
    if stage.reference not in earlier:
        raise ValueError(
            f"{key} must be previous, first, start or a stage before {name} ({', '.join(earlier)}),"
            f" got {stage.reference!r}"
        )
    return stage.reference


def evaluation_reference(config: RunConfig) -> str:
    """Stage, `start` or folder that `reference_nats_per_token` is measured with.

    Raises ValueError naming the key if it is none of them.
    """
    stages, given = list(config.active_stages()), config.evaluation.reference
    if given == "first":
        return stages[0]
    if given == START or given in stages or (Path(given) / "config.json").is_file():
        return given
    folder = Path(given)
    where = "" if folder.is_absolute() or folder.name == given else f", not found in {Path.cwd()}"
    raise ValueError(
        f"evaluation.reference must be first, start, a stage ({', '.join(stages)}) or a folder "
        f"that mtp saved, got {given!r}{where}"
    )


def check_references(config: RunConfig) -> None:
    """Raise ValueError if a stage or the evaluation needs a model that will not exist."""
    for name in config.active_stages():
        stage_reference(config, name)
    evaluation_reference(config)


def check_saved_reference(config: RunConfig, fmt: PromptFormat) -> None:
    """Raise ValueError if the evaluation's reference is a folder whose model cannot score the text
    of a run with this prompt format.
    """
    name = evaluation_reference(config)
    if name != START and name not in config.active_stages():
        key = f"evaluation.reference={name}"
        with reading(key):
            _, tokenizer = read_saved(Path(name))
        check_same_vocabulary(key, tokenizer, fmt)


def check_same_vocabulary(name: str, tokenizer: Any, fmt: PromptFormat) -> None:
    """Raise ValueError if the reference of this name has another vocabulary than the run."""
    if tokenizer.get_vocab() != fmt.tokenizer.get_vocab():  # type: ignore[attr-defined]
        raise ValueError(
            f"{name} has another vocabulary than the model; a divergence compares the same tokens"
        )


def reference_in_loss(config: RunConfig, name: str) -> bool:
    """True if the evaluation's reference after a stage is the stage's reference in the loss, or
    itself.

    Stages that leave main as it was have the main of the stage before.
    """
    measured_with, in_loss = evaluation_reference(config), stage_reference(config, name)
    if measured_with == name:
        return True
    return in_loss is not None and main_of(config, measured_with) == main_of(config, in_loss)


def main_of(config: RunConfig, name: str) -> str:
    """The stage that trained the main of a model, `start` or a folder."""
    stages = config.active_stages()
    if name not in stages:
        return START if name == config.model.source else name
    so_far = list(stages)[: list(stages).index(name) + 1]
    return next((stage for stage in reversed(so_far) if stages[stage].train_main), START)


def save_start(run: Run) -> None:
    """Save the model that the run begins from, if something compares with it."""
    config = run.config
    names = [stage_reference(config, name) for name in config.active_stages()]
    if START in (*names, evaluation_reference(config)) and run.fabric.is_global_zero:
        save_atomically(
            folder_of(config, run.folder, START),
            lambda folder: save_model(run.model, run.fmt, folder),
        )
    run.fabric.barrier()


def folder_of(config: RunConfig, run_folder: Path, name: str) -> Path:
    """Folder of a model: a stage's result, the run's start, or a folder by its path."""
    if name == START:
        return run_folder / START
    return run_folder / "stages" / name if name in config.active_stages() else Path(name)


def frozen_for_stage(run: Run, name: str) -> Any:
    """Model that the current stage's streams compare with; None if none of them does."""
    reference = stage_reference(run.config, name)
    return None if reference is None else load_frozen(run, reference)


def frozen_for_evaluation(run: Run) -> Any:
    """Model that scores the thoughts; None until the stage that saves it has ended."""
    reference = evaluation_reference(run.config)
    # A run that continues from an earlier checkpoint finds models of stages that it has to repeat.
    later = list(run.config.active_stages())[run.progress.stage + 1 :]
    is_there = (folder_of(run.config, run.folder, reference) / "config.json").is_file()
    return load_frozen(run, reference) if is_there and reference not in later else None


def load_frozen(run: Run, name: str) -> Any:
    """The model, without gradients. Raises ValueError if its vocabulary is not the run's."""
    folder = folder_of(run.config, run.folder, name)
    with reading(f"the reference {name} ({folder})"):
        model, fmt = load_model(folder, run.config.weight_dtype())
    check_same_vocabulary(f"the reference {name}", fmt.tokenizer, run.fmt)
    model.requires_grad_(False).eval()
    if is_sharded(run.module):
        return shard_frozen(model, run.module)
    return model.to(run.fabric.device)
