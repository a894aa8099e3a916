"""Sinks of a run's log: several at once, each with its own state, and from outside of mtp."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import config
from omegaconf import OmegaConf

from mtp.config import load_run_config, save_run_config
from mtp.reports.json_lines import read_records
from mtp.reports.loggers import (
    SINKS,
    FilesConfig,
    Log,
    LoggedRun,
    LoggerConfig,
    Sink,
    SinkConfig,
    WandbConfig,
    register_sink,
)
from mtp.trainer import train

ONE_STAGE = ["stages.head.steps=0", "stages.joint.steps=0", "stages.rl.steps=0"]


@dataclass(kw_only=True)
class MemoryConfig(SinkConfig):
    room: str = "a"


class MemorySink(Sink):
    """Keeps what it is given in a dict of the test, by `room`."""

    rooms: dict[str, list[Any]] = {}

    def __init__(self, settings: MemoryConfig):
        self.calls = self.rooms.setdefault(settings.room, [])

    def start(self, run, state):
        self.calls.append(("start", run.global_step, state))
        return [] if state is None else ["memory continues"]

    def metrics(self, record):
        self.calls.append(("metrics", record))

    def table(self, name, rows, global_step):
        self.calls.append(("table", name, len(rows), global_step))

    def artifact(self, path):
        self.calls.append(("artifact", path.name, path.exists()))

    def state(self):
        return {"calls": len(self.calls)}

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def memory():
    """The sink `memory`, registered for one test, and what it was given."""
    register_sink("memory", MemoryConfig, MemorySink)
    MemorySink.rooms.clear()
    yield MemorySink.rooms.setdefault("b", [])
    del SINKS["memory"]


def test_a_sink_from_outside_gets_what_the_files_get(tmp_path, memory):
    logger = ["logger=[files,memory_schema]", "logger.sinks.memory.room=b"]
    train(config(tmp_path / "run", *ONE_STAGE, *logger))
    assert [memory[0], memory[-1]] == [("start", 0, None), ("finish",)]
    records = [call[1] for call in memory if call[0] == "metrics"]
    assert json.loads(json.dumps(records)) == read_records(tmp_path / "run" / "metrics.jsonl")
    assert ("table", "completions", 4, 6) in memory
    assert [call for call in memory if call[0] == "artifact"] == [
        ("artifact", "export", True),
        ("artifact", "curves.png", True),
    ]
    loaded = load_run_config(tmp_path / "run" / "config.yaml")
    assert loaded.logger.sinks == {"files": FilesConfig(), "memory": MemoryConfig(room="b")}
    del SINKS["memory"]
    loaded = load_run_config(tmp_path / "run" / "config.yaml")
    assert list(loaded.logger.sinks) == ["files"], "a run opens without its sink"
    register_sink("memory", MemoryConfig, MemorySink)


def test_a_resumed_run_gives_each_sink_its_own_state(tmp_path, memory, capsys):
    given = [*ONE_STAGE, "logger=[files,memory_schema]", "logger.sinks.memory.room=b"]
    train(config(tmp_path / "run", *given))
    (tmp_path / "run" / "summary.json").unlink()
    memory.clear()
    train(config(tmp_path / "run", *given, "resume=true"))
    kind, step, state = memory[0]
    assert (kind, step) == ("start", 6) and state["calls"] > 0
    assert "memory continues" in capsys.readouterr().out


def test_a_name_is_registered_once(memory):
    register_sink("memory", MemoryConfig, MemorySink)
    with pytest.raises(ValueError, match="a sink must have a name of its own, got 'memory'"):
        register_sink("memory", MemoryConfig, Sink)


def test_a_resumed_run_continues_the_wandb_run_of_its_id(tmp_path):
    run = LoggedRun(tmp_path, {"seed": 1}, 0)
    settings = LoggerConfig(sinks={"files": FilesConfig(), "wandb": WandbConfig()})
    states = []
    for state in (None, {"wandb": {"id": "abc123"}}):
        log = Log.of(settings)
        assert log.start(run, state) == []
        log.metrics("main", 1, 1, {"loss": 2.5, "reward": None})
        log.table("completions", [{"prompt": "1+1=", "segments": [1]}], 1)
        states.append(log.states())
        log.finish()
        log.finish()
    assert states[1]["wandb"] == {"id": "abc123"} != states[0]["wandb"]
    assert list(tmp_path.glob("wandb/offline-run-*-abc123"))
    assert len(read_records(tmp_path / "metrics.jsonl")) == 2
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1] == "main,1,1,2.5,"


def test_impossible_settings_name_their_key():
    with pytest.raises(ValueError, match=r"logger.sinks.wandb.mode must be one of .* got 'x'"):
        LoggerConfig(sinks={"wandb": WandbConfig(mode="x")}).validate()
    with pytest.raises(ValueError, match=r"logger.sinks must be of .*'files'.*, got 'wendb'"):
        LoggerConfig(sinks={"wendb": WandbConfig()}).validate()
    with pytest.raises(ValueError, match="logger.log_every must be at least 1, got 0"):
        LoggerConfig(log_every=0).validate()


@pytest.mark.parametrize("with_wandb", [False, True])
def test_the_logger_of_an_earlier_config_is_read(tmp_path, with_wandb):
    path = tmp_path / "config.yaml"
    save_run_config(config(Path("run"), *ONE_STAGE), path)
    content = OmegaConf.load(path)
    content.logger = {
        "wandb": with_wandb,
        "project": "mine",
        "entity": None,
        "mode": "online",
        "group": "g",
        "tags": ["t"],
        "log_every": 3,
    }
    OmegaConf.save(content, path)
    logger = load_run_config(path).logger
    expected: dict[str, SinkConfig] = {"files": FilesConfig()}
    if with_wandb:
        expected["wandb"] = WandbConfig(project="mine", mode="online", group="g", tags=["t"])
    assert logger == LoggerConfig(log_every=3, sinks=expected)


def test_a_dry_run_logs_to_files_alone(tmp_path, memory, capsys):
    logger = ["logger=memory_schema", "logger.sinks.memory.room=b"]
    train(config(tmp_path / "run", *ONE_STAGE, *logger, "dry_run=true"))
    assert memory == [] and "a full run would take about" in capsys.readouterr().out
