"""Main with its head in one Hugging Face folder, which opens in two ways.

Plain `AutoModelForCausalLM.from_pretrained(folder)` opens main as the stock class of its family;
the head's weights are in a folder of their own. With `trust_remote_code=True` it opens main with
its head, from the modeling files next to the weights: `mtp` need not be installed.

The chat template is that of the tokenizer with two additions, as in training: a generation prompt
ends with the delimiter that opens the first phase, and begins with the system prompt.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from ...modeling import modeling_mtp
from ...rollouts.prompt_format import PromptFormat
from ..build import save_model
from .base import dtype_of_run, edit_json, prompts_of_training, weights_of_run

MODELING = Path(modeling_mtp.__file__)
"""File that transformers imports to open main with its head."""


def write(model: Any, fmt: PromptFormat, folder: Path, config: Any) -> None:
    """Write weights, configs, tokenizer and code."""
    save_model(model, fmt, folder, weights_of_run(model, config))
    edit_json(
        folder / "config.json",
        dtype=str(dtype_of_run(config)).removeprefix("torch."),
        auto_map={"AutoModelForCausalLM": f"{MODELING.stem}.{type(model).__name__}"},
    )
    limit = config.decoding.max_new_tokens
    edit_json(folder / "generation_config.json", max_new_tokens=limit)
    prompts_of_training(fmt, folder)
    for file in [MODELING, *map(Path, get_relative_import_files(MODELING))]:
        shutil.copyfile(file, folder / file.name)
