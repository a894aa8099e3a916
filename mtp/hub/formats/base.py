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

from ...rollouts.prompt_format import SYSTEM_ROLES, PromptFormat
from ...rollouts.tokenization import name_of
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
    needs_trained_head: bool = False
    """True if the folder holds the head alone."""


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


def finish_templates(fmt: PromptFormat, folder: Path) -> None:
    """Make the folder's chat templates give the prompts of training.

    A conversation without a system message begins with the run's, and a generation prompt ends with
    the first phase's delimiter. Where training used no chat template, the template gives the last
    message as it is. A tokenizer may have several: one for tools lies in a folder of its own.

    Raises ValueError if no template can give the prompts of a training without one.
    """
    tokenizer: Any = fmt.tokenizer
    main = folder / "chat_template.jinja"
    if not fmt.uses_template:
        main.write_text(_bare_template(fmt))
        return
    question = [{"role": "user", "content": "?"}]
    for template in [main, *sorted(folder.glob("*/*.jinja"))]:
        if not template.is_file():
            continue
        # Jinja drops one newline at the very end of a template.
        source, begin = template.read_text().removesuffix("\n"), _with_system(fmt)
        source = source if source.startswith(begin) else begin + source
        try:
            prompt = tokenizer.apply_chat_template(
                question, chat_template=source, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError):
            prompt = ""  # a template for tools may not do without any
        if fmt.opener is not None and not prompt.rstrip().endswith(fmt.opener):
            source += _opening(fmt)
        template.write_text(source)


def _bare_template(fmt: PromptFormat) -> str:
    """A chat template that gives the last message as training gave it, without one."""
    tokenizer: Any = fmt.tokenizer
    last, question = "messages[-1]['content']", "what is 1"
    opening = _opening(fmt)
    if fmt.opener is not None:
        opener = json.dumps(fmt.opener, ensure_ascii=False)
        opening = f"{{% if not {last}.rstrip().endswith({opener}) %}}{opening}{{% endif %}}"
    # SentencePiece puts a space before a text, but some tokenizers none after a special token.
    for space in ("", " "):
        leading = json.dumps(tokenizer.decode(fmt.leading_ids) + space, ensure_ascii=False)
        source = f"{{{{ {leading} }}}}{{{{ {last} }}}}{opening}"
        shown = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            chat_template=source,
            tokenize=False,
            add_generation_prompt=True,
        )
        if tokenizer.encode(shown, add_special_tokens=False) == fmt.prompt_ids(question):
            return source
    raise ValueError(
        f"the tokenizer must read a prompt after {tokenizer.decode(fmt.leading_ids)!r} as it reads "
        f"it alone, but {name_of(tokenizer)} does not: set a chat template in its "
        "tokenizer_config.json, and train with it"
    )


def _opening(fmt: PromptFormat) -> str:
    """Jinja that ends a generation prompt with the first phase's delimiter."""
    if fmt.opener is None:
        return ""
    opener = json.dumps(fmt.opener, ensure_ascii=False)
    return f"{{{{ {opener} if add_generation_prompt else '' }}}}"


def _with_system(fmt: PromptFormat) -> str:
    """Jinja that gives a conversation the run's system message where it has none."""
    if fmt.system_prompt is None:
        return ""
    message = json.dumps({"role": "system", "content": fmt.system_prompt}, ensure_ascii=False)
    return (
        f"{{% if not messages or messages[0]['role'] not in {list(SYSTEM_ROLES)} %}}"
        f"{{% set messages = [{message}] + messages %}}{{% endif %}}"
    )


def export_dtype(config: Any) -> torch.dtype | None:
    """The dtype that a run computed in, which its export is written in; None: that of its weights.

    A run of mixed precision keeps float32 weights for its optimizer alone.
    """
    return torch.bfloat16 if str(config.fabric.precision).startswith("bf16") else None


LOCAL = (
    "name_or_path",
    "is_local",
    "local_files_only",
    "tokenizer_file",
    "vocab_file",
    "cache_dir",
)
"""Fields of tokenizer_config.json that say where a tokenizer was opened."""


def finish_tokenizer(fmt: PromptFormat, folder: Path) -> None:
    """Finish the files of a tokenizer: templates, delimiters, no field of this machine.

    Delimiters become ordinary added tokens.

    They were special tokens in earlier versions, and may be so in a base model. Tools that skip
    special tokens would run thought and answer together.
    """
    finish_templates(fmt, folder)
    named = {d for phase in fmt.phases.values() for d in (phase.opened_by, phase.closed_by)}
    path = folder / "tokenizer.json"
    if path.is_file():
        content = json.loads(path.read_text())
        for token in content.get("added_tokens", []):
            token["special"] = token["special"] and token["content"] not in named
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False))
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content = {name: value for name, value in content.items() if name not in LOCAL}
    for name in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(content.get(name), list):
            content[name] = [t for t in content[name] if _content(t) not in named]
    for token in content.get("added_tokens_decoder", {}).values():
        token["special"] = token["special"] and token["content"] not in named
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token
