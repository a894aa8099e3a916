"""Resuming a run: what it holds then, and what is refused."""

import json
import os
import pickle
import shutil
import signal
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import config
from runs import content, same_run
from transformers import LlamaConfig

import mtp.stages.evaluation as stage_evaluation
import mtp.stages.loop as stage_loop
import mtp.trainer as trainer
from mtp.hub.checkpoint import checkpoints, damage_of, read_state, write_state
from mtp.hub.run_folder import changed_settings
from mtp.reports.json_lines import read_records
from mtp.trainer import Interrupted, train


def stop_at(monkeypatch, function: str, times: int = 1) -> None:
    """Let the run die (as by SIGKILL, but within this process) at a call of that function."""
    module = stage_loop if hasattr(stage_loop, function) else trainer
    original, calls = getattr(module, function), []

    def die(*args, **kwargs):
        calls.append(1)
        if len(calls) == times:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, function, die)


def test_a_run_that_has_ended_is_resumed_without_a_change(ended, copy, capsys):
    before = content(copy)
    summary = train(config(copy, "resume=true"))
    assert content(copy) == before
    assert summary == json.loads((copy / "summary.json").read_text())
    assert "has ended; use overwrite=true to run it again" in capsys.readouterr().out


def test_later_steps_stay_until_the_run_that_replaces_them_trains(copy):
    pytest.importorskip("mlflow")
    before = content(copy)
    first = checkpoints(copy / "checkpoints")[0].stem
    sinks = ("logger=[files,mlflow]", "logger.sinks.mlflow.tracking_uri=/dev/null/store")
    with pytest.raises(ValueError, match="tracking_uri"):
        train(config(copy, f"resume={first}", *sinks))
    assert {**content(copy), "config.yaml": before["config.yaml"]} == before


def test_a_run_that_has_ended_stays_ended_without_its_checkpoints(copy, capsys):
    shutil.rmtree(copy / "checkpoints")
    before = content(copy)
    assert train(config(copy, "resume=auto")) == json.loads((copy / "summary.json").read_text())
    assert "has ended" in capsys.readouterr().out
    with pytest.raises(ValueError, match="seed was 1 and is now 2"):
        train(config(copy, "resume=auto", "seed=2"))
    assert content(copy) == before
    (copy / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"a run without its checkpoints, .*overwrite=true"):
        train(config(copy, "resume=auto"))
    assert {**content(copy), "summary.json": before["summary.json"]} == before


def test_a_run_that_continues_from_its_best_step_can_be_continued_again(copy, ended, monkeypatch):
    """Also if that step's own checkpoint is gone, and the run dies soon after."""
    folder = copy / "checkpoints"
    first, *later = checkpoints(folder)
    step = read_state(first)["progress"]["global_step"]
    first.rename(folder / "best.safetensors")
    stop_at(monkeypatch, "stop_if_asked")
    with pytest.raises(KeyboardInterrupt):
        train(config(copy, "resume=best"))
    assert checkpoints(folder)[0] == first or step == 0
    monkeypatch.undo()
    train(config(copy, "resume=true"))
    same_run(copy, ended)


@pytest.mark.parametrize("lost", ["summary.json", "export"])
def test_a_lost_export_or_summary_is_made_again_from_the_trained_weights(ended, copy, lost):
    path = copy / lost
    path.unlink() if path.is_file() else shutil.rmtree(path)
    train(config(copy, "resume=true"))
    assert content(copy / "export") == content(ended / "export")
    same_run(copy, ended)


@pytest.mark.parametrize(
    ("function", "times"),
    [
        ("train_stage", 2),  # after the first stage's end, before another checkpoint
        ("step_batches", 3),  # within the first stage, before any checkpoint of it
        ("step_batches", 17),  # within rl
        ("end_stage", 1),  # in the evaluation
        ("end_stage", 4),
        ("finish", 1),
        ("export", 1),
        ("save_curves", 1),
        ("print_table", 1),  # after the summary: nothing is left to do
    ],
)
def test_a_run_that_died_continues_to_the_very_same_bits(
    ended, tmp_path, monkeypatch, function, times
):
    folder = tmp_path / "run"
    stop_at(monkeypatch, function, times)
    with pytest.raises(KeyboardInterrupt):
        train(config(folder))
    monkeypatch.undo()
    train(config(folder, "resume=auto"))
    same_run(folder, ended)


def test_the_last_two_checkpoints_and_the_best_are_kept(tmp_path, monkeypatch):
    original, accuracies = stage_evaluation.evaluate, iter([0.25, 0.75, 0.5])

    def graded(*args, **kwargs):
        metrics, shown = original(*args, **kwargs)
        if not kwargs.get("controls", True) and kwargs["use_head"]:
            metrics["fast_accuracy"] = next(accuracies)
        return metrics, shown

    monkeypatch.setattr(stage_evaluation, "evaluate", graded)
    overrides = ["stages.joint.evaluate_every=0", "stages.rl.evaluate_every=1"]
    train(config(tmp_path / "run", "checkpoint_minutes=0", *overrides))
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in sorted(folder.iterdir())] == [
        "best.safetensors",
        "step_00000017.safetensors",
        "step_00000018.safetensors",
    ]
    assert all(damage_of(path) is None for path in folder.iterdir())
    progress = read_state(folder / "best.safetensors")["progress"]
    assert (progress["global_step"], progress["best_accuracy"]) == (16, 0.75)


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def halved(path: Path, at: int) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path, at: int) -> None:
    os.truncate(path, 0)


def garbage(path: Path, at: int) -> None:
    path.write_bytes(os.urandom(5000))


@pytest.mark.parametrize("resume", ["true", "auto"])
@pytest.mark.parametrize(
    ("spoil", "at"), [(flipped, -1), (flipped, 200), (halved, 0), (emptied, 0), (garbage, 0)]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(copy, spoil, at, resume):
    (copy / "summary.json").unlink()
    first, last = checkpoints(copy / "checkpoints")
    spoil(last, at)
    with pytest.raises(ValueError) as caught:
        train(config(copy, f"resume={resume}"))
    assert f"checkpoint {last} is damaged" in str(caught.value)
    progress = read_state(first)["progress"]
    where = f"step {progress['step']} of stage {progress['stage'] + 1}"
    assert f"use resume={first.stem} to continue from {where}" in str(caught.value)
    assert not (copy / ".mtp-lock").exists()


def test_the_checkpoint_that_is_offered_continues_to_the_same_run(copy, ended):
    first, last = checkpoints(copy / "checkpoints")
    halved(last, 0)
    train(config(copy, f"resume={first.stem}"))
    same_run(copy, ended)


def test_every_flipped_byte_of_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    state = {"model": {"w": torch.arange(6.0)}, "progress": {"step": 3}, "pair": (1, None, "a")}
    write_state(path, state)
    assert damage_of(path) is None
    found = read_state(path)
    assert torch.equal(found.pop("model")["w"], torch.arange(6.0))
    assert found == {"progress": {"step": 3}, "pair": (1, None, "a")}
    whole = path.read_bytes()
    for at in range(len(whole)):
        flipped(path, at)
        assert damage_of(path) is not None, at
        path.write_bytes(whole)


def test_a_checkpoint_holds_tensors_that_share_memory(tmp_path):
    whole = torch.arange(6.0)
    state = {"whole": whole, "part": whole[:2], "same": whole, "other": whole.view(2, 3)}
    write_state(tmp_path / "a.safetensors", state)
    read = read_state(tmp_path / "a.safetensors")
    assert all(torch.equal(read[name], value) for name, value in state.items())


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="resume must be true, false, auto or a checkpoint in"):
        train(config(tmp_path / "run", "resume=maybe"))
    assert list(tmp_path.iterdir()) == []


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/mtp-payload-ran"),))


@pytest.mark.parametrize("name", ["last.ckpt", "step_00000009.safetensors"])
def test_a_pickle_in_place_of_a_checkpoint_is_never_run(tmp_path, name):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / ".mtp-run").touch()
    (folder / "checkpoints" / name).write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="not opened|is damaged"):
        train(config(folder, "resume=true"))
    assert not Path("/tmp/mtp-payload-ran").exists()


def test_damaged_logs_keep_what_can_be_read_and_the_rest_is_said(copy, ended, capsys):
    first, last = checkpoints(copy / "checkpoints")
    last.unlink()
    reached = read_state(first)["progress"]["global_step"]
    metrics = (ended / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join([*metrics[:3], metrics[3][:20], *metrics[4:7]]))
    with (copy / "completions.jsonl").open("a") as file:
        file.write('{"global_step": 18, "prom')
    train(config(copy, "resume=true"))
    said = capsys.readouterr().out
    assert "metrics.jsonl is damaged: 6 records are kept, 1 lines could not be read" in said
    kept = [json.loads(line) for line in metrics[:3] + metrics[4:7]]
    written = read_records(copy / "metrics.jsonl")
    assert written[:6] == kept
    assert written[6]["global_step"] == reached + 1
    assert read_records(copy / "completions.jsonl") == read_records(ended / "completions.jsonl")


def test_a_run_whose_metrics_are_gone_ends_with_what_it_wrote_since(copy):
    (copy / "metrics.jsonl").unlink()
    checkpoints(copy / "checkpoints")[-1].unlink()
    train(config(copy, "resume=true"))
    assert {record["stage"] for record in read_records(copy / "metrics.jsonl")} == {"rl"}
    assert b"\0" not in (copy / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("fabric.precision=bf16-mixed", "fabric.precision was '32-true' and is now 'bf16-mixed'"),
        ("kernels=reference", "kernels was 'auto' and is now 'reference'"),
        ("evaluation.num_problems=9", "evaluation.num_problems was 8 and is now 9"),
        ("seed=2", "seed was 1 and is now 2"),
    ],
)
def test_a_setting_that_decides_the_numbers_cannot_change(copy, override, key):
    before = content(copy)
    with pytest.raises(ValueError) as caught:
        train(config(copy, "resume=true", override))
    assert key in str(caught.value)
    assert content(copy) == before


def test_the_kind_of_device_cannot_change_and_the_number_of_processes_can():
    saved = {"fabric": {"processes": 1, "device_type": "cpu", "num_threads": 1}, "name": "a"}
    now = {**saved, "fabric": {**saved["fabric"], "device_type": "cuda"}}
    with pytest.raises(ValueError, match="fabric.device_type was .* and is now"):
        changed_settings(saved, now)
    now = {**saved, "fabric": {**saved["fabric"], "num_threads": 2, "processes": 2}}
    assert changed_settings(saved, now) == {
        "fabric.processes": (1, 2),
        "fabric.num_threads": (1, 2),
    }


@pytest.mark.parametrize("key", ["stages", "decoding.phases"])
def test_the_order_of_stages_and_phases_cannot_change(tmp_path, key):
    saved = json.loads(json.dumps(asdict(config(tmp_path))))
    now = deepcopy(saved)
    *path, last = key.split(".")
    node = now
    for name in path:
        node = node[name]
    node[last] = dict(reversed(node[last].items()))
    assert now == saved and changed_settings(saved, saved) == {}
    with pytest.raises(ValueError, match=f"the order of {key} was .* and is now"):
        changed_settings(saved, now)


def test_an_earlier_stage_is_not_measured_by_a_model_that_it_has_to_repeat(tmp_path, monkeypatch):
    """The run has ended, and continues from a checkpoint within its first stage."""
    steps = ["stages.main.steps=4", "stages.main.evaluate_every=2", "stages.joint.steps=2"]
    others = ["stages.head.steps=0", "stages.rl.steps=0", "evaluation.reference=joint"]
    monkeypatch.setattr(
        "mtp.stages.loop.interim_evaluation", lambda run, stage: stage.name == "main"
    )

    def measured(*overrides):
        stages = train(config(tmp_path / "run", *steps, *others, *overrides))["stages"]
        return {stage["name"]: stage["reference_nats_per_token"] for stage in stages}

    first = measured()
    assert first["main"] is None and first["joint"] is not None
    assert measured("resume=best") == first


def test_dropout_ties_a_run_to_its_number_of_processes():
    change = {"key": "fabric.processes", "then": 1, "now": 2, "global_step": 3}
    progress = trainer.Progress(global_step=3, changed=[change])
    drops = SimpleNamespace(config=LlamaConfig(attention_dropout=0.1))
    with pytest.raises(ValueError, match="must stay 1, got 2: the model's attention_dropout=0.1"):
        trainer.check_processes(drops, progress)
    drops.config.attention_dropout = 0.0
    trainer.check_processes(drops, progress)
    drops.config.attention_dropout = 0.1
    progress.global_step = 4  # of an earlier resumption
    trainer.check_processes(drops, progress)


def test_a_harmless_setting_may_change_and_is_recorded(copy, capsys):
    (copy / "summary.json").unlink()
    train(config(copy, "resume=true", "checkpoint_minutes=3"))
    assert "checkpoint_minutes was 10.0 and is now 3.0" in capsys.readouterr().out
    summary = json.loads((copy / "summary.json").read_text())
    changed = [change for change in summary["changed_on_resume"] if change["key"] != "run_dir"]
    assert changed == [{"key": "checkpoint_minutes", "then": 10.0, "now": 3.0, "global_step": 18}]
    assert "checkpoint_minutes: 3.0" in (copy / "config.yaml").read_text()


def test_a_signal_in_an_evaluation_stops_the_run_after_it(tmp_path, ended, monkeypatch):
    original, folder = stage_loop.end_stage, tmp_path / "run"

    def signalled(run, stage):
        if stage.name == "head":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, stage)

    monkeypatch.setattr(stage_loop, "end_stage", signalled)
    with pytest.raises(Interrupted, match="stopped after stage head; use resume=true"):
        train(config(folder))
    monkeypatch.undo()
    train(config(folder, "resume=true"))
    same_run(folder, ended)
