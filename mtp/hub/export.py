"""Exports: a model as a folder in one of the formats of `mtp.hub.formats`.

A folder is written under a temporary name and moved, so it is never incomplete. An earlier export
is replaced as a whole; no other folder is replaced.
"""

import copy
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..common.files import save_atomically
from ..modeling.contract import head_is_trained
from ..modeling.phases import MODES
from ..modeling.saving import HEAD_FILE
from ..rollouts.prompt_format import PromptFormat
from .formats import FORMATS, Format, find_format
from .formats.huggingface import MODELING
from .model_card import CARD, TAG
from .pretrained import blame

FOLDERS = {"additional_chat_templates": ".jinja", Path(HEAD_FILE).parent.name: ".safetensors"}
"""Folders within an export, and the suffix of their files: further chat templates, the head."""


def export(
    model: Any,
    fmt: PromptFormat,
    folder: Path,
    summary: dict[str, Any],
    config: Any,
    format: str = "huggingface",
    default_mode: str | None = None,
) -> None:
    """Write a model with its card; an earlier export in `folder` is replaced as a whole.

    Args:
        model: a model with a head, of any family.
        fmt: its tokenizer, phases and system prompt.
        folder: made with its parents if it is missing.
        summary: content of `summary.json`; `stages` may be empty if nothing was measured.
        config: the run's `RunConfig`.
        format: name of a registered format.
        default_mode: `fast`, `slow` or `verified`: mode of `generate` where a call names none.
            None: the stock `generate` on main.

    Raises:
        ValueError: if `folder` is a file or holds files that no export wrote, if there is no such
            format, or if it would use a head that no stage has trained.
    """
    found = find_format(format)
    folder = Path(folder).resolve()
    check_replaceable(folder)
    check_default_mode(default_mode, format)
    check_trained(model, found, format, default_mode)

    def write(path: Path) -> None:
        found.write(model, fmt, path, config)
        write_card(found, model, fmt, path, summary, config)

    before = model.generation_config
    if default_mode is not None:
        model.generation_config = copy.deepcopy(before)
        model.generation_config.mtp_mode = default_mode
    try:
        save_atomically(folder, write)
    finally:
        model.generation_config = before


def check_default_mode(mode: str | None, format: str) -> None:
    """Raises ValueError for a mode that is none, or for a format without the head."""
    if mode is None:
        return
    if mode not in MODES:
        raise ValueError(f"--default-mode must be one of {', '.join(MODES)}, got {mode!r}")
    if format != "huggingface":
        raise ValueError(
            f"--default-mode must be left out with --format {format}, which has no head, got "
            f"{mode}; use --format huggingface"
        )


def check_trained(model: Any, found: Format, format: str, default_mode: str | None) -> None:
    """Raises ValueError for a format or a mode that would use a head that no stage has trained."""
    if head_is_trained(model.config):
        return
    if found.needs_trained_head:
        raise ValueError(
            f"--format {format} writes a head that no stage has trained; train it first, or use "
            "--format main"
        )
    if default_mode == "fast":
        raise ValueError(
            "--default-mode must be slow for a head that no stage has trained, got fast; train the "
            "head first"
        )


def push(
    folder: Path,
    repo: str,
    private: bool = False,
    *,
    endpoint: str | None = None,
    token: str | None = None,
) -> str:
    """Upload an export to the Hugging Face Hub; returns the address of the commit.

    The repository is made if it is missing, and files that the export does not have are deleted
    from it. Without `endpoint` and `token`, huggingface_hub finds them (`HF_ENDPOINT`, `HF_TOKEN`,
    `hf auth login`).

    Raises ValueError if the Hub refuses.
    """
    api = HfApi(endpoint=endpoint, token=token)
    remedy = f"log in with `hf auth login`, or upload {folder} with `hf upload`"
    with blame(f"--push {repo} failed", remedy):
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Export",
            delete_patterns=[f"*{suffix}" for suffix in sorted(written_suffixes())],
        )
    return str(done.commit_url)


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


def written_suffixes() -> set[str]:
    """Suffixes of the files of all formats."""
    return {suffix for format in FORMATS.values() for suffix in format.suffixes}


def check_replaceable(folder: Path) -> None:
    """Raises ValueError unless `folder` is missing, empty or an earlier export."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; an export is a folder, so give another name")
    names = sorted(path.name for path in folder.iterdir())
    written = written_suffixes()
    foreign = [n for n in names if n not in (CARD, *FOLDERS) and Path(n).suffix not in written]
    for name, suffix in FOLDERS.items():
        foreign += [path.name for path in (folder / name).glob("*") if path.suffix != suffix]
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
