"""Main alone, as an ordinary model of its family: no head, no code, no field that only mtp reads.

Any tool that opens the family opens this folder. Its text is that of slow mode: the chat template
opens the first phase, as it did in training.
"""

import shutil
from pathlib import Path
from typing import Any

from ...modeling.saving import HEAD_FILE, INDEX
from ...rollouts.prompt_format import PromptFormat
from ..build import save_model
from .base import edit_json, export_dtype, finish_tokenizer


def write(
    model: Any,
    fmt: PromptFormat,
    folder: Path,
    config: Any,
    weights: dict[str, Any] | None = None,
) -> None:
    """Write main's weights, configs and tokenizer; weights: used in place of the model's."""
    save_model(model, fmt, folder, export_dtype(config), weights)
    shutil.rmtree(folder / Path(HEAD_FILE).parent)
    (folder / INDEX).unlink()
    edit_json(folder / "config.json", drop=("mtp", "auto_map"))
    limit = config.decoding.max_new_tokens
    edit_json(folder / "generation_config.json", drop=("mtp_",), max_new_tokens=limit)
    finish_tokenizer(fmt, folder)
