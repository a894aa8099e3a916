"""Main alone, as an ordinary model of its family: no head, no code, no field that only mtp reads.

Any tool that opens the family opens this folder. Its text is that of slow mode: the chat template
opens the first phase, as it did in training.
"""

from pathlib import Path
from typing import Any

from ...modeling.contract import stock_class
from ...rollouts.prompt_format import PromptFormat
from ..pretrained import quiet
from .base import edit_json, open_first_phase

HEAD = "mtp_head."
"""Prefix of the names of the head's weights."""


def write(model: Any, fmt: PromptFormat, folder: Path, config: Any) -> None:
    """Write main's weights, configs and tokenizer."""
    weights = {name: w for name, w in model.state_dict().items() if not name.startswith(HEAD)}
    with quiet():
        model.save_pretrained(folder, state_dict=weights)
    fmt.tokenizer.save_pretrained(folder)
    architecture = stock_class(type(model)).__name__
    edit_json(folder / "config.json", drop=("mtp", "auto_map"), architectures=[architecture])
    limit = config.decoding.max_new_tokens
    edit_json(folder / "generation_config.json", drop=("mtp_",), max_new_tokens=limit)
    open_first_phase(fmt, folder)
