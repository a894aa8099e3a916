"""Sinks of a run's records, one file per sink."""

from .base import (
    SINKS,
    Log,
    LoggedRun,
    LoggerConfig,
    Sink,
    SinkConfig,
    register_sink,
)
from .files import FilesConfig, FilesSink
from .wandb import WandbConfig, WandbSink

__all__ = [
    "SINKS",
    "FilesConfig",
    "Log",
    "LoggedRun",
    "LoggerConfig",
    "Sink",
    "SinkConfig",
    "WandbConfig",
    "register_sink",
]

register_sink("files", FilesConfig, FilesSink)
register_sink("wandb", WandbConfig, WandbSink)
