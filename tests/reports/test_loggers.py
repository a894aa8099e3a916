"""Sinks of a run's log: several at once, each with its own state."""

from pathlib import Path

import pytest
from helpers import config
from omegaconf import OmegaConf

from mtp.config import load_run_config, save_run_config
from mtp.reports.json_lines import read_records
from mtp.reports.loggers import FilesConfig, Log, LoggedRun, LoggerConfig, SinkConfig, WandbConfig

ONE_STAGE = ["stages.head.steps=0", "stages.joint.steps=0", "stages.rl.steps=0"]


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
        log.finish(has_ended=True)
        log.finish(has_ended=True)
    assert states[1]["wandb"] == {"id": "abc123"} != states[0]["wandb"]
    assert list(tmp_path.glob("wandb/offline-run-*-abc123"))
    assert len(read_records(tmp_path / "metrics.jsonl")) == 2
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1] == "main,1,1,2.5,"


def test_impossible_settings_name_their_key():
    with pytest.raises(ValueError, match=r"logger.sinks.wandb.mode must be one of .* got 'x'"):
        LoggerConfig(sinks={"wandb": WandbConfig(mode="x")}).validate()
    with pytest.raises(ValueError, match=r"logger.sinks must be of .*'files'.*, got 'wendb'"):
        LoggerConfig(sinks={"wendb": WandbConfig()}).validate()


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
