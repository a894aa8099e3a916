"""Exports: a model as a folder in one of the formats of `mtp.hub.formats`.

A folder is written under a temporary name and moved, so it is never incomplete. An earlier export
is replaced as a whole; no other folder is replaced.
"""

from pathlib import Path
from typing import Any

from ..common.files import save_atomically
from ..rollouts.prompt_format import PromptFormat
from .formats import FORMATS, Format, find_format
from .formats.huggingface import MODELING
from .model_card import CARD, TAG

TEMPLATES = "additional_chat_templates"
"""Folder in which transformers keeps further chat templates of a tokenizer."""


def export(
    model: Any,
    fmt: PromptFormat,
    folder: Path,
    summary: dict[str, Any],
    config: Any,
    format: str = "huggingface",
) -> None:
    """Write a model with its card; an earlier export in `folder` is replaced as a whole.

    Args:
        model: a model with a head, of any family.
        fmt: its tokenizer, phases and system prompt.
        folder: made with its parents if it is missing.
        summary: content of `summary.json`; `stages` may be empty if nothing was measured.
        config: the run's `RunConfig`.
        format: name of a registered format.

    Raises:
        ValueError: if `folder` is a file or holds files that no export wrote, or if there is no
            such format.
    """
    found = find_format(format)
    folder = Path(folder).resolve()
    check_replaceable(folder)

    def write(path: Path) -> None:
        found.write(model, fmt, path, config)
        write_card(found, model, fmt, path, summary, config)

    save_atomically(folder, write)


def write_card(
    format: Format,
    model: Any,
    fmt: PromptFormat,
    folder: Path,
    summary: dict[str, Any],
    config: Any,
) -> None:
    """Write the model card."""
    (folder / CARD).write_text(format.card(model, fmt, summary, config))


def check_replaceable(folder: Path) -> None:
    """Raises ValueError unless `folder` is missing, empty or an earlier export."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; an export is a folder, so give another name")
    names = sorted(path.name for path in folder.iterdir())
    written = {suffix for format in FORMATS.values() for suffix in format.suffixes}
    foreign = [n for n in names if n not in (CARD, TEMPLATES) and Path(n).suffix not in written] + [
        path.name for path in (folder / TEMPLATES).glob("*") if path.suffix != ".jinja"
    ]
    if names and (foreign or not _is_export(folder)):
        raise ValueError(
            f"{folder} holds files that no export wrote ({', '.join((foreign or names)[:3])}); "
            "give an empty or a new folder"
        )


def _is_export(folder: Path) -> bool:
    """True for a folder with a card of mtp, or with the code that earlier versions wrote."""
    if (folder / MODELING.name).is_file():
        return True
    card = folder / CARD
    return card.is_file() and f"- {TAG}" in card.read_text(errors="replace").splitlines()
