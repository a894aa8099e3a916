"""Export: one folder, two doors. Plain transformers opens main; with trust_remote_code, the head too."""

from pathlib import Path
from typing import Any

from .models import save_model
from .text import TextFormat


def export(
    model: Any, text: TextFormat, folder: Path, summary: dict[str, Any], config: Any
) -> None:
    """Write the model for Hugging Face."""
    save_model(model, text, folder)
