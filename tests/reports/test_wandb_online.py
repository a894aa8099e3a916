"""wandb's own client, online, against a stand-in of its server on this machine."""

import json

import pytest
from wandb_server import WandbServer

from mtp.reports.loggers import Log, LoggedRun, LoggerConfig, WandbConfig

ROW = {"stage": "main", "prompt": "1+1=", "completion": "2", "right": True, "segments": [1, 2]}


@pytest.fixture
def server(tmp_path, monkeypatch):
    import wandb

    wandb.teardown()  # the client's process keeps the settings that it was started with
    server = WandbServer()
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    for name, value in (
        ("BASE_URL", server.url),
        ("API_KEY", "0123456789" * 4),
        ("X_DISABLE_STATS", "true"),
        ("SILENT", "true"),
        ("MODE", None),
    ):
        if value is None:
            monkeypatch.delenv(f"WANDB_{name}", raising=False)
        else:
            monkeypatch.setenv(f"WANDB_{name}", value)
    yield server
    wandb.teardown()
    server.shutdown()
    server.server_close()


def log_of() -> Log:
    return Log.of(LoggerConfig(sinks={"wandb": WandbConfig(group="g", tags=["t"])}))


def test_a_resumed_run_continues_in_its_run_with_its_table_and_its_page(server, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    stopped = log_of()
    assert stopped.start(LoggedRun(folder, {"seed": 7}, 0), None) == [], "there is a key: online"
    stopped.metrics("main", 1, 1, {"loss": 1.0, "eval/acceptance_by_slot": [0.5, 0.25]})
    stopped.table("completions", [ROW], 1)
    state = json.loads(json.dumps(stopped.states()))
    stopped.finish(has_ended=False)

    resumed = log_of()
    resumed.start(LoggedRun(folder, {"seed": 7}, 1), state)
    resumed.metrics("rl", 1, 2, {"loss": 0.5})
    resumed.table("completions", [ROW | {"prompt": "2+2="}], 2)
    (folder / "report.html").write_text("<html>the page")
    resumed.artifact(folder / "report.html")
    resumed.finish(has_ended=True)

    ((name, run),) = server.runs.items()
    assert name == state["wandb"]["id"] and server.resumed == [name]
    assert (run["project"], run["groupName"], run["tags"]) == ("mtp", "g", ["t"])
    assert json.loads(run["config"])["seed"] == {"value": 7}
    lines = server.history[name]
    shown = [{k: line[k] for k in line if k != "completions"} for line in lines]
    slots = {"eval/acceptance_by_slot/1": 0.5, "eval/acceptance_by_slot/2": 0.25}
    assert shown == [
        {"stage": "main", "step": 1, "global_step": 1, "loss": 1.0, **slots},
        {"global_step": 1},
        {"stage": "rl", "step": 1, "global_step": 2, "loss": 0.5},
        {"global_step": 2},
    ]
    assert [("completions" in line) for line in lines] == [False, True, False, True]
    kinds = [artifact["artifactTypeName"] for artifact in server.artifacts]
    assert sorted(kinds) == ["report", "wandb-run-incremental-table", "wandb-run-incremental-table"]
    assert len(server.committed) == 3
    page = server.artifacts[kinds.index("report")]
    assert page["artifactCollectionName"] == f"report-{name}"
    assert server.uploads[f"{1 + kinds.index('report')}/report.html"] == b"<html>the page"
    tables = [
        json.loads(content)
        for name, content in server.uploads.items()
        if name[0].isdigit() and name.endswith(".table.json")  # the others are the run's own files
    ]
    assert tables[0]["columns"] == ["global_step", *ROW]
    rows = [row for table in tables for row in table["data"]]
    assert rows == [
        [1, "main", "1+1=", "2", True, "[1, 2]"],
        [2, "main", "2+2=", "2", True, "[1, 2]"],
    ]
