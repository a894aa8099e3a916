"""Sinks of a run's records, one file per sink."""

from .base import (
    SINKS,
    Log,
    LoggedRun,
    LoggerConfig,
    Sink,
    SinkConfig,
    register_sink,
    scalars,
)
from .files import FilesConfig, FilesSink
from .mlflow import MlflowConfig, MlflowSink
from .tensorboard import TensorBoardConfig, TensorBoardSink
from .wandb import WandbConfig, WandbSink

__all__ = [
    "SINKS",
    "FilesConfig",
    "Log",
    "LoggedRun",
    "LoggerConfig",
    "MlflowConfig",
    "Sink",
    "SinkConfig",
    "TensorBoardConfig",
    "WandbConfig",
    "register_sink",
    "scalars",
]

register_sink("files", FilesConfig, FilesSink)
register_sink("wandb", WandbConfig, WandbSink)
register_sink("tensorboard", TensorBoardConfig, TensorBoardSink)
register_sink("mlflow", MlflowConfig, MlflowSink)
