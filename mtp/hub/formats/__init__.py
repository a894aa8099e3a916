"""Export formats: one file per format writes a model's files."""

from ..model_card import gguf_card, main_card, model_card
from .base import FORMATS, Format, find_format, register_format
from .gguf import FILE as GGUF_FILE
from .gguf import write as write_gguf
from .huggingface import write as write_huggingface
from .main import write as write_main

__all__ = ["FORMATS", "Format", "find_format", "register_format"]

register_format("huggingface", Format(write_huggingface, model_card))
register_format("main", Format(write_main, main_card))
register_format("gguf", Format(write_gguf, gguf_card, (f".{GGUF_FILE.rpartition('.')[2]}",)))
