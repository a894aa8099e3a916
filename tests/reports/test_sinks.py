"""TensorBoard and MLflow for real: what is in their stores after a run, and after a resumed one."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
from helpers import config

from mtp.reports.json_lines import read_records
from mtp.reports.loggers import (
    Log,
    LoggedRun,
    LoggerConfig,
    MlflowConfig,
    SinkConfig,
    TensorBoardConfig,
    WandbConfig,
    scalars,
)
from mtp.trainer import Interrupted, train

ONE_STAGE = ["stages.head.steps=0", "stages.joint.steps=0", "stages.rl.steps=0"]
ROWS = [{"stage": "main", "prompt": "1+1=", "completion": "2|<b>;", "right": True, "segments": [1]}]


def log_of(**sinks: SinkConfig) -> Log:
    return Log.of(LoggerConfig(sinks=sinks))


def events(folder: Path):
    """TensorBoard's own reader, over all event files of a run."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0})
    return found.Reload()


def points(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(name)]


def test_scalars_are_the_numbers_of_a_record():
    record = {"stage": "rl", "step": 3, "global_step": 9, "loss": 2, "reward": None}
    record |= {"eval/acceptance_by_slot": [0.5, 0.25], "kl": math.nan, "name": "x", "on": True}
    assert scalars(record) == {
        "loss": 2.0,
        "eval/acceptance_by_slot/1": 0.5,
        "eval/acceptance_by_slot/2": 0.25,
        "on": 1.0,
    }


def test_tensorboard_has_each_record_once_after_a_run_was_killed_and_resumed(tmp_path):
    pytest.importorskip("tensorboard")
    run = LoggedRun(tmp_path, {"seed": 1, "stages": {"main": {"steps": 4}}}, 0)
    killed = log_of(tensorboard=TensorBoardConfig())
    assert killed.start(run, None) == []
    for step in (1, 2):
        killed.metrics("main", step, step, {"loss": 1.0 / step, "by_slot": [0.5, None]})
    killed.table("completions", ROWS, 2)
    state = json.loads(json.dumps(killed.states()))
    killed.metrics("main", 3, 3, {"loss": 0.25})
    killed.table("completions", ROWS, 3)
    killed.states()  # flushes; the process is then killed

    resumed = log_of(tensorboard=TensorBoardConfig())
    assert resumed.start(LoggedRun(tmp_path, run.settings, 2), state) == []
    resumed.metrics("main", 3, 3, {"loss": 0.25})
    resumed.metrics("rl", 1, 4, {"loss": 0.125})
    resumed.finish(has_ended=True)
    killed.finish(has_ended=False)  # closes its file, which Python would warn about
    assert points(tmp_path, "loss") == [(1, 1.0), (2, 0.5), (3, 0.25), (4, 0.125)]
    assert points(tmp_path, "by_slot/1") == [(1, 0.5), (2, 0.5)]
    found = events(tmp_path)
    texts = {
        name: [(e.step, e.tensor_proto.string_val[0].decode()) for e in found.Tensors(name)]
        for name in found.Tags()["tensors"]
    }
    assert texts["stage/text_summary"] == [(1, "main"), (4, "rl")]
    ((step, text),) = texts["completions/text_summary"]
    assert step == 2 and "    2|<b>;" in text.split("\n"), "a model's text is a code block"
    assert "      main:" in texts["config/text_summary"][0][1]


def test_a_damaged_event_file_is_reported(tmp_path):
    pytest.importorskip("tensorboard")
    log = log_of(tensorboard=TensorBoardConfig())
    log.start(LoggedRun(tmp_path, {}, 0), None)
    log.metrics("main", 1, 1, {"loss": 1.0})
    state = log.states()
    log.finish(has_ended=False)
    (file,) = (tmp_path / "tensorboard").iterdir()
    os.truncate(file, file.stat().st_size - 7)
    (line,) = log_of(tensorboard=TensorBoardConfig()).start(LoggedRun(tmp_path, {}, 1), state)
    assert line == f"{file} is damaged: 7 bytes are missing"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A client of MLflow with a store of its own, in the working folder."""
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tracking.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")


def only_run(store):
    (experiment,) = [e for e in store.search_experiments() if e.name != "Default"]
    (run,) = store.search_runs([experiment.experiment_id])
    return run


def history(store, run, name: str) -> list[tuple[int, float]]:
    return sorted((p.step, p.value) for p in store.get_metric_history(run.info.run_id, name))


def test_mlflow_has_each_record_once_after_a_run_was_killed_and_resumed(tmp_path, store):
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    run = LoggedRun(folder, {"seed": 1, "stages": {"main": {"steps": 4}}, "tags": ["a"]}, 0)
    settings = MlflowConfig(experiment="sums", group="lr_sweep")
    killed = log_of(mlflow=settings)
    assert killed.start(run, None) == []
    killed.metrics("main", 1, 1, {"loss": 1.0, "reward": None})
    state = json.loads(json.dumps(killed.states()))
    killed.metrics("main", 2, 2, {"loss": 0.5})
    killed.table("completions", ROWS, 2)
    assert only_run(store).info.status == "RUNNING"

    resumed = log_of(mlflow=settings)
    assert resumed.start(LoggedRun(folder, run.settings, 1), state) == []
    resumed.metrics("main", 2, 2, {"loss": 0.5})
    resumed.metrics("main", 2, 2, {"eval/accuracy": 0.75})
    resumed.table("completions", ROWS, 2)
    resumed.metrics("rl", 1, 3, {"loss": 0.25})
    (folder / "curves.png").write_bytes(b"png")
    resumed.artifact(folder / "curves.png")
    resumed.finish(has_ended=True)
    found = only_run(store)
    assert found.info.run_id == state["mlflow"]["id"]
    assert found.info.run_name == "mine" and found.info.status == "FINISHED"
    assert history(store, found, "loss") == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert history(store, found, "eval/accuracy") == [(2, 0.75)]
    assert found.data.params == {"seed": "1", "stages.main.steps": "4", "tags": "['a']"}
    assert found.data.tags["group"] == "lr_sweep" and found.data.tags["stage"] == "rl"
    home = Path(found.info.artifact_uri.removeprefix("file://"))
    assert (home / "curves.png").read_bytes() == b"png"
    (table,) = (home / "completions").iterdir()
    assert table.name == "step_00000002.json" and json.loads(table.read_text()) == ROWS


def test_a_run_that_mlflow_has_lost_is_continued_in_a_new_one_and_says_so(tmp_path, store):
    run = LoggedRun(tmp_path, {}, 5)
    log = log_of(mlflow=MlflowConfig())
    (line,) = log.start(run, {"mlflow": {"id": "f" * 32}, "files": {}})
    assert line == f"MLflow has no run {'f' * 32} any more: a new one continues it"
    log.metrics("main", 6, 6, {"loss": 1.0})
    log.finish(has_ended=False)
    found = only_run(store)
    assert found.info.status == "KILLED" and history(store, found, "loss") == [(6, 1.0)]


def test_a_store_that_cannot_be_used_names_its_key(tmp_path, store):
    (tmp_path / "file").write_text("")
    uri = f"sqlite:///{tmp_path}/file/x.db"
    log = log_of(mlflow=MlflowConfig(tracking_uri=uri))
    with pytest.raises(ValueError, match=f"^logger.sinks.mlflow.tracking_uri={uri} cannot be used"):
        log.start(LoggedRun(tmp_path, {}, 0), None)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_missing_package_names_its_extra_before_anything_is_built(tmp_path, monkeypatch, name):
    monkeypatch.setattr("mtp.reports.loggers.base.find_spec", lambda package: None)
    message = (
        rf"^logger={name} needs the package {name}; install it with: pip install '.\[{name}\]'"
    )
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path / "run", *ONE_STAGE, f"logger={name}"))
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_stopped_and_resumed_is_one_run_in_every_sink(tmp_path, store, monkeypatch):
    """TensorBoard and MLflow have the records of the files; the page is an artifact of MLflow."""
    pytest.importorskip("tensorboard")
    folder = tmp_path / "run"
    given = [*ONE_STAGE, "logger=[tensorboard,mlflow]", "stages.main.evaluate_every=4"]
    real, seen = Log.metrics, []

    def stop_after_three(self, stage, step, global_step, values):
        real(self, stage, step, global_step, values)
        seen.append(global_step)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Log, "metrics", stop_after_three)
    with pytest.raises(Interrupted):
        train(config(folder, *given))
    assert only_run(store).info.status == "KILLED"
    train(config(folder, *given, "resume=true"))
    found = only_run(store)
    assert found.info.status == "FINISHED"
    records = read_records(folder / "metrics.jsonl")
    assert [r["global_step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "eval/slow_accuracy", "main/grad_norm"):
        expected = [(r["global_step"], r[name]) for r in records if r.get(name) is not None]
        assert len(expected) > 1
        assert history(store, found, name) == expected
        assert points(folder, name) == [(s, pytest.approx(v)) for s, v in expected]
    home = Path(found.info.artifact_uri.removeprefix("file://"))
    page = (home / "report.html").read_text()
    assert page == (folder / "report.html").read_text() and '"status":"ended"' in page
    assert (home / "curves.png").is_file() and not (home / "export").exists()
    assert events(folder).Images("curves")


def test_without_a_key_wandb_logs_offline_and_says_so(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    log = log_of(wandb=WandbConfig())
    assert log.start(LoggedRun(tmp_path, {}, 0), None) == [
        "no API key of wandb was found, so it logs offline"
    ]
    log.metrics("main", 1, 1, {"loss": 1.0})
    log.finish(has_ended=True)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def test_tables_of_wandb_grow_and_the_page_is_an_artifact(tmp_path, monkeypatch):
    import wandb

    log = log_of(wandb=WandbConfig(mode="offline"))
    log.start(LoggedRun(tmp_path, {}, 0), None)
    run, logged = wandb.run, []
    assert run is not None
    monkeypatch.setattr(run, "log", lambda values, **given: logged.append(values))
    artifacts = []
    monkeypatch.setattr(run, "log_artifact", artifacts.append)
    log.table("completions", ROWS, 2)
    log.table("completions", ROWS, 4)
    log.metrics("main", 4, 4, {"loss": 2.0, "by_slot": [1.0]})
    (tmp_path / "report.html").write_text("<html>")
    log.artifact(tmp_path / "report.html")
    log.finish(has_ended=True)
    table = logged[0]["completions"]
    assert table is logged[1]["completions"] and table.log_mode == "INCREMENTAL"
    assert table.columns == ["global_step", "stage", "prompt", "completion", "right", "segments"]
    assert [row[0] for row in table.data] == [2, 4] and table.data[0][-1] == "[1]"
    at = {"stage": "main", "step": 4, "global_step": 4}
    assert logged[2] == {**at, "loss": 2.0, "by_slot/1": 1.0}
    assert [(one.type, sorted(one.manifest.entries)) for one in artifacts] == [
        ("report", ["report.html"])
    ]
