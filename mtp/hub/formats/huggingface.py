"""Main with its head in one Hugging Face folder, which opens in two ways.

Plain `AutoModelForCausalLM.from_pretrained(folder)` opens main as the stock class of its family. It
does not find the head, whose weights are in a separate file (`mtp.modeling.saving`). With
`trust_remote_code=True` it opens main with its head, from the modeling files next to the weights:
`mtp` need not be installed.

The chat template gives the prompts of training: it is that of the tokenizer with the run's system
prompt, and a generation prompt ends with the delimiter that opens the first phase.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from ...modeling import modeling_mtp
from ...rollouts.prompt_format import PromptFormat
from ..build import save_model
from ..outside_head import write_outside_head
from .base import edit_json, export_dtype, finish_tokenizer

MODELING = Path(modeling_mtp.__file__)
"""File that transformers imports to open main with its head."""


def write(model: Any, fmt: PromptFormat, folder: Path, config: Any) -> None:
    """Write weights, configs, tokenizer and code."""
    save_model(model, fmt, folder, export_dtype(config))
    write_code(model, folder)
    limit = config.decoding.max_new_tokens
    # A tokenizer without a chat template gets one here, which is not the one of training.
    edit_json(
        folder / "generation_config.json",
        max_new_tokens=limit,
        mtp_chat_template=fmt.uses_template,
    )
    finish_tokenizer(fmt, folder)


def write_code(model: Any, folder: Path) -> None:
    """Write the modeling files into a saved model's folder, and into its config how to open it."""
    edit_json(
        folder / "config.json",
        auto_map={"AutoModelForCausalLM": f"{MODELING.stem}.{type(model).__name__}"},
    )
    needed = sorted(set(map(Path, get_relative_import_files(MODELING))))
    for path in [MODELING, *needed]:
        shutil.copyfile(path, folder / path.name)
    with (folder / MODELING.name).open("a") as file:
        file.write(
            "\n\n# transformers before 5.8 copies only the files that this one itself imports.\n"
            + "".join(f"from .{path.stem} import __name__ as _  # noqa\n" for path in needed)
        )
    write_outside_head(model.mtp_settings.type, folder)
