"""The model that a command of `mtp` uses: that of a run's stage, or of an exported folder.

Heavy imports wait until a command runs, as in `main.py`.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..rollouts.prompt_format import PromptFormat


@dataclass
class Opened:
    """A model that a command uses."""

    folder: Path
    """Folder of the weights."""
    stage: str | None
    """Stage that saved the model; None for an exported folder."""
    config: "RunConfig | None"
    """Config of the run; None for an exported folder."""

    @property
    def head_is_trained(self) -> bool:
        """False if no stage up to this one trained the head, nor did the model begin with it."""
        from ..common.errors import reading

        with reading(str(self.folder)):
            saved = json.loads((self.folder / "config.json").read_text()).get("mtp_head_is_trained")
        if saved is not None:
            return bool(saved)
        return self.config is None or any(  # saved by an earlier version
            self.config.stages[name].train_head for name in self.stages_so_far()
        )

    def choose_mode(self, mode: str | None) -> str:
        """The given mode, else fast if the head is trained and slow if it is not.

        Raises ValueError for fast mode with an untrained head.
        """
        if mode == "fast" and not self.head_is_trained:
            where = str(self.folder) if self.stage is None else f"stage {self.stage}"
            raise ValueError(f"the head of {where} is untrained; use slow mode")
        return mode or ("fast" if self.head_is_trained else "slow")

    def stages_so_far(self) -> list[str]:
        """Names of the run's stages up to this one."""
        if self.config is None or self.stage is None:
            return []
        names = list(self.config.active_stages())
        return names[: names.index(self.stage) + 1]

    def load(self, device: str) -> tuple[Any, "PromptFormat"]:
        """The model on a device, ready to decode, and its prompt format."""
        from ..common.errors import reading
        from ..hub.build import load_model

        dtype = None if self.config is None else self.config.weight_dtype()
        with reading(str(self.folder)):
            model, fmt = load_model(self.folder, dtype)
        return model.to(device).eval(), fmt


def open_run(folder: Path, stage: str | None) -> Opened:
    """A run's model: at the end of the given stage, or of the last stage that has ended.

    Raises ValueError if the folder is no run or holds no such model, or if the model is a
    comparator's, whose main alone is another model.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; give a folder such as runs/default")
    from ..config import load_run_config

    config = load_run_config(folder / "config.yaml")
    if not config.channel.is_text:
        raise ValueError(
            f"{folder} is a run with channel.name={config.channel.name}, whose main writes nothing "
            "without its channel; open it with load_channel of mtp.channels.saving, or measure it "
            "with python -m mtp.channels.table"
        )
    ended = [
        name
        for name in config.active_stages()
        if (folder / "stages" / name / "config.json").is_file()
    ]
    if not ended:
        raise ValueError(f"{folder} holds no trained model yet: none of its stages has ended")
    if stage is not None and stage not in ended:
        raise ValueError(f"--stage must be one of {', '.join(ended)} in {folder}, got {stage}")
    missing = [name for name in config.active_stages() if name not in ended]
    if stage is None and missing:
        print(
            f"note: {folder} has not ended ({', '.join(missing)} to go); this is its model after "
            f"{ended[-1]}",
            file=sys.stderr,
        )
    stage = stage or ended[-1]
    return Opened(folder / "stages" / stage, stage, config)


def open_model(folder: Path, stage: str | None) -> Opened:
    """The model of a run, or that of an exported folder."""
    if (folder / "config.yaml").is_file() or not folder.is_dir():
        return open_run(folder, stage)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is neither a run (no config.yaml) nor an exported model (no config.json)"
        )
    if stage is not None:
        raise ValueError(f"--stage selects a stage of a run, but {folder} is one model")
    from ..common.errors import read_json

    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "mtp" not in config:
        raise ValueError(f"{folder} holds a model without a head; give one that mtp wrote")
    return Opened(folder, None, None)


def choose_device(name: str) -> str:
    """`auto` is a GPU if there is one. Raises ValueError for a missing device."""
    import torch

    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ValueError("--device cuda needs a GPU that torch can use; there is none")
    return ("cuda" if has_gpu else "cpu") if name == "auto" else name
