"""Export: one folder, two doors.

Plain `AutoModelForCausalLM.from_pretrained(folder)` opens main as the stock class of its family and
leaves the head's weights aside. With `trust_remote_code=True` it opens main with its head, from the
modeling files that lie beside the weights: `mtp` need not be installed.

The chat template is that of the tokenizer with one addition: a generation prompt ends with the
delimiter that opens the first phase, as it did in training.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from ..files import save_atomically
from ..modeling import modeling_mtp
from ..rollouts.prompt_format import PromptFormat
from .build import save_model
from .model_card import CARD, model_card

TEMPLATES = "additional_chat_templates"
"""Folder in which transformers keeps further chat templates of a tokenizer."""
WRITTEN = {".json", ".jinja", ".model", ".py", ".safetensors", ".txt"}
"""Suffixes of what an export writes beside its card. A folder that holds anything else is kept."""


def export(
    model: Any, text: PromptFormat, folder: Path, summary: dict[str, Any], config: Any
) -> None:
    """Write the model for Hugging Face; an earlier export in `folder` is replaced as a whole.

    Args:
        model: an mtp model of one of `modeling_mtp.FAMILIES`.
        text: its tokenizer, phases and system prompt.
        folder: made under a temporary name and moved, so it is never half there.
        summary: what `summary.json` holds; `stages` may be empty where nothing was measured.
        config: the run's `RunConfig`.

    Raises:
        ValueError: if `folder` is a file or holds something that no export wrote.
    """
    folder = Path(folder).resolve()
    check_replaceable(folder)
    save_atomically(folder, lambda path: _write(model, text, path, summary, config))


def check_replaceable(folder: Path) -> None:
    """Raises ValueError unless `folder` is missing, empty or an earlier export."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; an export is a folder, so give another name")
    names = sorted(path.name for path in folder.iterdir())
    foreign = [n for n in names if n not in (CARD, TEMPLATES) and Path(n).suffix not in WRITTEN] + [
        path.name for path in (folder / TEMPLATES).glob("*") if path.suffix != ".jinja"
    ]
    is_export = Path(modeling_mtp.__file__).name in names
    if names and (foreign or not is_export):
        raise ValueError(
            f"{folder} holds files that no export wrote ({', '.join((foreign or names)[:3])}); "
            "give an empty or a new folder"
        )


def _write(
    model: Any, text: PromptFormat, folder: Path, summary: dict[str, Any], config: Any
) -> None:
    save_model(model, text, folder)
    cls = type(model)
    stock = next(
        base
        for base in cls.__mro__
        if issubclass(base, PreTrainedModel) and not issubclass(base, modeling_mtp.MTPMixin)
    )
    code = Path(modeling_mtp.__file__)
    _edit_json(
        folder / "config.json",
        architectures=[stock.__name__],
        auto_map={"AutoModelForCausalLM": f"{code.stem}.{cls.__name__}"},
    )
    limit = config.decoding.max_new_tokens
    _edit_json(folder / "generation_config.json", max_new_tokens=limit)
    _open_first_phase(text, folder)
    for file in [code, *map(Path, get_relative_import_files(code))]:
        shutil.copyfile(file, folder / file.name)
    (folder / CARD).write_text(model_card(model, text, summary, config))


def _edit_json(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _open_first_phase(text: PromptFormat, folder: Path) -> None:
    """Make the generation prompts of the chat templates end with the first phase's delimiter.

    A tokenizer may have several: one for tools lies in a folder of its own.
    """
    if text.opener is None or not text.uses_template:
        return
    tokenizer: Any = text.tokenizer
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
        if not prompt.rstrip().endswith(text.opener):
            opener = json.dumps(text.opener, ensure_ascii=False)
            template.write_text(f"{source}{{{{ {opener} if add_generation_prompt else '' }}}}")
