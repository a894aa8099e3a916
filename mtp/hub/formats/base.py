"""Export formats: functions that write the files of an export's folder.

A format is a file with a function that writes the folder and one that returns its model card:

    register_format("mine", Format(write, card))

`mtp export RUN OUT --format mine` then uses it. Replacing earlier exports, atomic writing and
permissions are the same for all formats (`mtp.hub.export`).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from ...rollouts.prompt_format import PromptFormat
from ..model_card import model_card

Write = Callable[[Any, PromptFormat, Path, Any], None]
"""(model, prompt format, folder that may be missing, the run's `RunConfig`): writes the folder.
`model.generation_config` is saved with it."""
Card = Callable[[Any, PromptFormat, dict[str, Any], Any], str]
"""(model, prompt format, content of `summary.json`, `RunConfig`) -> the text of README.md."""


@dataclass(frozen=True)
class Format:
    """One export format."""

    write: Write
    card: Card = model_card
    suffixes: tuple[str, ...] = (".json", ".jinja", ".model", ".py", ".safetensors", ".txt")
    """Suffixes of the files that `write` makes. A folder that holds others is not replaced."""


FORMATS: dict[str, Format] = {}
"""Registered formats by name."""


def register_format(name: str, format: Format) -> None:
    """Add a format to `mtp export --format`. Raises ValueError if the name is taken."""
    if FORMATS.setdefault(name, format) != format:
        raise ValueError(f"a format must have a name of its own, got {name!r}; choose another name")


def find_format(name: str) -> Format:
    """The format of a name. Raises ValueError if there is none."""
    if name not in FORMATS:
        raise ValueError(f"--format must be one of {', '.join(sorted(FORMATS))}, got {name!r}")
    return FORMATS[name]


def edit_json(path: Path, *, drop: tuple[str, ...] = (), **values: Any) -> None:
    """Set fields of a JSON file, and drop fields by the beginnings of their names."""
    content = json.loads(path.read_text())
    content = {name: v for name, v in content.items() if not name.startswith(drop)} | values
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def dtype_of_run(config: Any) -> torch.dtype:
    """The dtype that a run computes in, which its export has."""
    is_bf16 = config.fabric.precision.startswith("bf16")
    return torch.bfloat16 if is_bf16 else config.model.torch_dtype()


def weights_of_run(model: Any, config: Any) -> dict[str, Tensor]:
    """The model's weights in the dtype that the run computes in."""
    dtype = dtype_of_run(config)
    return {
        name: weight.to(dtype) if weight.is_floating_point() else weight
        for name, weight in model.state_dict().items()
    }


def prompts_of_training(fmt: PromptFormat, folder: Path) -> None:
    """Make the chat templates give the prompts of training: its system prompt, unless the messages
    have one, and the delimiter that opens the first phase at the end of a generation prompt.

    A tokenizer may have several templates: one for tools is in a separate folder.
    """
    if not fmt.uses_template:
        return
    tokenizer: Any = fmt.tokenizer
    question = [{"role": "user", "content": "?"}]
    for template in [folder / "chat_template.jinja", *sorted(folder.glob("*/*.jinja"))]:
        if not template.is_file():
            continue
        # Jinja drops one newline at the very end of a template.
        source = template.read_text(encoding="utf-8").removesuffix("\n")
        if fmt.system_prompt is not None:
            message = {"role": "system", "content": fmt.system_prompt}
            text = json.dumps(message, ensure_ascii=False)
            # The line break keeps the first line of the source the first of a line.
            source = (
                "{% if not messages or messages[0]['role'] != 'system' %}"
                f"{{% set messages = [{text}] + messages %}}{{% endif %}}\n{source}"
            )
        try:
            prompt = tokenizer.apply_chat_template(
                question, chat_template=source, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError):
            prompt = ""  # a template for tools may not do without any
        if fmt.opener is not None and not prompt.rstrip().endswith(fmt.opener):
            opener = json.dumps(fmt.opener, ensure_ascii=False)
            source += f"{{{{ {opener} if add_generation_prompt else '' }}}}"
        template.write_text(source, encoding="utf-8")
