"""Export formats: one file per format writes a model's files."""

from ..model_card import main_card, model_card
from .base import FORMATS, Format, find_format, register_format
from .huggingface import write as write_huggingface
from .main import write as write_main

__all__ = ["FORMATS", "Format", "find_format", "register_format"]

register_format("huggingface", Format(write_huggingface, model_card))
register_format("main", Format(write_main, main_card))
