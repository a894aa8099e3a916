"""A sink from outside of mtp: registered under a name, it gets what the files get."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
from helpers import config

from mtp.config import load_run_config
from mtp.reports.json_lines import read_records
from mtp.reports.loggers import SINKS, FilesConfig, Sink, SinkConfig, register_sink
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

    def finish(self, has_ended):
        self.calls.append(("finish", has_ended))


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
    assert [memory[0], memory[-1]] == [("start", 0, None), ("finish", True)]
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


def test_a_dry_run_logs_to_files_alone(tmp_path, memory, capsys):
    logger = ["logger=[memory_schema]", "logger.sinks.memory.room=b"]
    train(config(tmp_path / "run", *ONE_STAGE, *logger, "dry_run=true"))
    assert memory == [] and "a full run would take about" in capsys.readouterr().out
