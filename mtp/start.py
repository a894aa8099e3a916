"""Where a run starts: in a folder of its own, from its first step or from a checkpoint."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from lightning.fabric import Fabric

from .checkpoint import choose_checkpoint, read_state, remove_later
from .config import RunConfig, save_run_config
from .export import check_replaceable
from .run_folder import MARK, RunFolder, changed_settings

T = TypeVar("T")


def on_first_process(fabric: Fabric, function: Callable[[], T]) -> T:
    """Call `function` on the first process and give every process its result.

    Raises on every process the ValueError that it raised, so that none waits for another.
    """
    if fabric.world_size == 1:
        return function()
    outcome: Any = None
    if fabric.is_global_zero:
        try:
            outcome = (True, function())
        except ValueError as error:
            outcome = (False, str(error))
    is_done, value = fabric.broadcast(outcome)
    if not is_done:
        raise ValueError(value)
    return value


def claim(folder: RunFolder, config: RunConfig) -> str | None:
    """Claim the run's folder and return the checkpoint to continue from; None for a new run.

    Raises ValueError if the folder is another's, is in use, or holds a run that the config neither
    continues nor replaces.
    """
    folder.check()
    folder.lock()
    try:
        folder.tidy()
        if config.resume:
            found = choose_checkpoint(folder.path / "checkpoints", config.resume)
            if found is not None:
                return str(found)
        if folder.is_marked and not (config.overwrite or config.resume):
            raise ValueError(
                f"{folder.path} already holds a run; use resume=true to continue it, "
                "overwrite=true to replace it, or name=... to start another"
            )
        check_replaceable(folder.path / "export")
    except BaseException:
        folder.release()
        raise
    return None


def settings_of(config: RunConfig, fabric: Fabric) -> dict[str, Any]:
    """The settings that a checkpoint keeps, and those that a machine adds."""
    settings = json.loads(json.dumps(asdict(config)))
    settings["fabric"]["processes"] = fabric.world_size
    settings["fabric"]["device_type"] = fabric.device.type
    return settings


def read_start(checkpoint: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The state to continue from, with the settings that changed in its progress.

    Raises ValueError naming the settings that must not change.
    """
    state = read_state(Path(checkpoint))
    progress = state["progress"]
    for key, (then, now) in changed_settings(state["settings"], settings).items():
        progress["changed"].append(
            {"key": key, "then": then, "now": now, "global_step": progress["global_step"]}
        )
    return state


def write_start(folder: RunFolder, config: RunConfig, state: dict[str, Any] | None) -> None:
    """Make the folder that of the run: a new one, or one that continues from `state`."""
    if state is None:
        folder.begin()
    else:
        remove_later(folder.path / "checkpoints", state["progress"]["global_step"])
        (folder.path / "summary.json").unlink(missing_ok=True)
        (folder.path / MARK).touch()
    save_run_config(config, folder.path / "config.yaml")
