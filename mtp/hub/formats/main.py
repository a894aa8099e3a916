"""Main alone, as an ordinary model of its family: no head, no code, no field that only mtp reads.

Any tool that opens the family opens this folder. Its text is that of slow mode: the chat template
opens the first phase, as it did in training.
"""

from pathlib import Path
from typing import Any

from ...modeling.weight_files import HEAD
from ...rollouts.prompt_format import PromptFormat
from ..pretrained import quiet
from ..tokenizer_files import save_tokenizer
from .base import dtype_of_run, edit_json, prompts_of_training, weights_of_run


def write(model: Any, fmt: PromptFormat, folder: Path, config: Any) -> None:
    """Write main's weights, configs and tokenizer."""
    weights = weights_of_run(model, config)
    main = {name: weight for name, weight in weights.items() if not name.startswith(HEAD)}
    with quiet():
        model.save_pretrained(folder, state_dict=main)
    save_tokenizer(fmt, folder)
    dtype = str(dtype_of_run(config)).removeprefix("torch.")
    edit_json(folder / "config.json", drop=("mtp", "auto_map"), dtype=dtype)
    limit = config.decoding.max_new_tokens
    edit_json(folder / "generation_config.json", drop=("mtp_",), max_new_tokens=limit)
    prompts_of_training(fmt, folder)
