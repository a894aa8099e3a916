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

from jinja2 import TemplateError

from ...rollouts.prompt_format import PromptFormat
from ..model_card import model_card

Write = Callable[[Any, PromptFormat, Path, Any], None]
"""(model, prompt format, folder that may be missing, the run's `RunConfig`): writes the folder."""
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


def open_first_phase(fmt: PromptFormat, folder: Path) -> None:
    """Make the generation prompts of the chat templates end with the first phase's delimiter.

    A tokenizer may have several templates: one for tools is in a separate folder.
    """
    if fmt.opener is None or not fmt.uses_template:
        return
    tokenizer: Any = fmt.tokenizer
    question = [{"role": "user", "content": "?"}]
    for template in [folder / "chat_template.jinja", *sorted(folder.glob("*/*.jinja"))]:
        if not template.is_file():
            continue
        # Jinja drops one newline at the very end of a template.
        source = template.read_text().removesuffix("\n")
        try:
            prompt = tokenizer.apply_chat_template(
                question, chat_template=source, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError):
            prompt = ""  # a template for tools may not do without any
        if not prompt.rstrip().endswith(fmt.opener):
            opener = json.dumps(fmt.opener, ensure_ascii=False)
            template.write_text(f"{source}{{{{ {opener} if add_generation_prompt else '' }}}}")
