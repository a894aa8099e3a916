"""A trained comparator on disk: main as in every run, and the channel beside it.

config.json, model.safetensors, ...   main, which other tools open (in slow mode, plain tokens)
channel.json                          name and options of the channel
channel.safetensors                   its own weights, if it has any
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ..common.files import save_text
from ..hub.build import load_model, save_model
from ..rollouts.prompt_format import PromptFormat
from .channel import Channel, build_channel, options_of

ATTRIBUTE = "mtp_channel"
"""Name of the channel's module in a model that trains: its weights are part of a checkpoint."""
SETTINGS = "channel.json"
WEIGHTS = "channel.safetensors"


def save_channel(model: Any, fmt: PromptFormat, name: str, folder: Path) -> None:
    """Write a model whose attribute `ATTRIBUTE` is its channel."""
    channel: Channel = getattr(model, ATTRIBUTE)
    own = f"{ATTRIBUTE}."
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith(own)}
    save_model(model, fmt, folder, weights=weights)
    content = {"name": name, "options": options_of(channel)}
    save_text(folder / SETTINGS, json.dumps(content, indent=2) + "\n")
    if channel.state_dict():
        # Clones, since a file holds no two names of one tensor.
        save_file({k: v.clone() for k, v in channel.state_dict().items()}, folder / WEIGHTS)


def load_channel(folder: Path) -> tuple[Any, PromptFormat, Channel]:
    """A model, its prompt format and its channel, as `save_channel` wrote them.

    Raises ValueError naming the folder if it holds none.
    """
    if not (folder / SETTINGS).is_file():
        raise ValueError(
            f"{folder} holds no channel ({SETTINGS} is missing); give a stage of a run with "
            "channel.name"
        )
    content = json.loads((folder / SETTINGS).read_text())
    model, fmt = load_model(folder)
    channel = build_channel(content["name"], content["options"], model)
    if channel.state_dict():
        channel.load_state_dict(load_file(folder / WEIGHTS))
    return model.eval(), fmt, channel.eval()
