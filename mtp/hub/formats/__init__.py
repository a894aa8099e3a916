"""Export formats: one file per format writes a model's files."""

from pathlib import Path
from typing import Any

from ..model_card import draft_card, gguf_card, main_card, model_card, native_mtp_card
from .base import FORMATS, Format, find_format, register_format
from .eagle3 import write as write_eagle3
from .huggingface import write as write_huggingface
from .main import write as write_main
from .native_mtp import write as write_native_mtp
from .speculators import write as write_speculators

__all__ = ["FORMATS", "Format", "find_format", "register_format"]


def write_gguf(model: Any, fmt: Any, folder: Path, config: Any) -> None:
    """See `gguf.py`, which is imported when it is needed."""
    from .gguf import write

    write(model, fmt, folder, config)


register_format("huggingface", Format(write_huggingface, model_card))
register_format("main", Format(write_main, main_card))
register_format("gguf", Format(write_gguf, gguf_card, (".gguf",)))
register_format("native_mtp", Format(write_native_mtp, native_mtp_card))
register_format("eagle3", Format(write_eagle3, draft_card, needs_trained_head=True))
register_format("speculators", Format(write_speculators, draft_card, needs_trained_head=True))
