"""Exports: a model as a folder that others open, in one of the formats of `mtp.hub.formats`.

A folder is written under a temporary name and moved, so it is never half there. An earlier export
is replaced as a whole, and nothing else is.
"""

from pathlib import Path
from typing import Any

from ..common.files import save_atomically
from ..modeling.saving import HEAD_FILE
from ..rollouts.prompt_format import PromptFormat
from .formats import FORMATS, Format, find_format
from .formats.huggingface import MODELING
from .model_card import CARD, TAG

FOLDERS = {"additional_chat_templates": ".jinja", Path(HEAD_FILE).parent.name: ".safetensors"}
"""Folders within an export, and the suffix of their files: further chat templates, the head."""


def export(
    model: Any,
    text: PromptFormat,
    folder: Path,
    summary: dict[str, Any],
    config: Any,
    format: str = "huggingface",
) -> None:
    """Write a model with its card; an earlier export in `folder` is replaced as a whole.

    Args:
        model: an mtp model of one of `modeling_mtp.FAMILIES`.
        text: its tokenizer, phases and system prompt.
        folder: made with its parents if it is missing.
        summary: content of `summary.json`; `stages` may be empty where nothing was measured.
        config: the run's `RunConfig`.
        format: name of a registered format.

    Raises:
        ValueError: if `folder` is a file or holds something that no export wrote, or if there is no
            such format.
    """
    found = find_format(format)
    folder = Path(folder).resolve()
    check_replaceable(folder)

    def write(path: Path) -> None:
        found.write(model, text, path, config)
        write_card(found, model, text, path, summary, config)

    save_atomically(folder, write)


def write_card(
    format: Format,
    model: Any,
    text: PromptFormat,
    folder: Path,
    summary: dict[str, Any],
    config: Any,
) -> None:
    """Write the model card."""
    (folder / CARD).write_text(format.card(model, text, summary, config))


def check_replaceable(folder: Path) -> None:
    """Raises ValueError unless `folder` is missing, empty or an earlier export."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; an export is a folder, so give another name")
    names = sorted(path.name for path in folder.iterdir())
    written = {suffix for format in FORMATS.values() for suffix in format.suffixes}
    foreign = [n for n in names if n not in (CARD, *FOLDERS) and Path(n).suffix not in written]
    for name, suffix in FOLDERS.items():
        foreign += [path.name for path in (folder / name).glob("*") if path.suffix != suffix]
    if names and (foreign or not _is_export(folder)):
        raise ValueError(
            f"{folder} holds files that no export wrote ({', '.join((foreign or names)[:3])}); "
            "give an empty or a new folder"
        )


def _is_export(folder: Path) -> bool:
    """True for a folder with a card of ours, or with the code that earlier versions wrote."""
    if (folder / MODELING.name).is_file():
        return True
    card = folder / CARD
    return card.is_file() and f"- {TAG}" in card.read_text(errors="replace").splitlines()
