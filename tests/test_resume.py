"""Resuming a run: its content, its refusals, and its files after a crash or damage."""

import json
import os
import pickle
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, TINY, config, records
from transformers import LlamaConfig

import mtp.stages.evaluation as stage_evaluation
import mtp.stages.loop as stage_loop
import mtp.trainer as trainer
from mtp.common.files import save_atomically
from mtp.hub.checkpoint import checkpoints, damage_of, read_state, write_state
from mtp.hub.run_folder import RunFolder, changed_settings
from mtp.reports.json_lines import read_records
from mtp.trainer import Interrupted, train

CLOCKS = {"seconds"}


def content(folder: Path, *patterns: str) -> dict[str, bytes]:
    """Bytes of the files in a folder, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for pattern in patterns or ("**/*",)
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }


def without_clocks(summary: dict) -> list[dict]:
    return [{k: v for k, v in s.items() if k not in CLOCKS} for s in summary["stages"]]


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """A run that has ended."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    train(config(folder))
    return folder


@pytest.fixture
def copy(ended, tmp_path) -> Path:
    """The same run, to be spoiled."""
    folder = tmp_path / "run"
    shutil.copytree(ended, folder)
    return folder


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


def same_run(mine: Path, theirs: Path) -> None:
    """Weights, metrics, completions, summary and export are equal bit for bit but for clocks."""
    assert records(mine) == records(theirs)
    read = [read_records(folder / "completions.jsonl") for folder in (mine, theirs)]
    assert read[0] == read[1]
    assert (mine / "metrics.csv").read_bytes().count(b"\n") == len(records(theirs)) + 1
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (mine, theirs)]
    assert without_clocks(summaries[0]) == without_clocks(summaries[1])
    for name in ("stages", "export"):
        assert content(mine / name, "**/*.safetensors") == content(
            theirs / name, "**/*.safetensors"
        )


def test_a_run_that_has_ended_is_resumed_without_a_change(ended, copy, capsys):
    before = content(copy)
    summary = train(config(copy, "resume=true"))
    assert content(copy) == before
    assert summary == json.loads((copy / "summary.json").read_text())
    assert "has ended; use overwrite=true to run it again" in capsys.readouterr().out


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
    "made", ["export/mine", "checkpoints/mine", "stages/mine", "wandb/mine", "notes.txt"]
)
def test_a_folder_that_holds_what_no_run_wrote_is_refused(tmp_path, made):
    folder = tmp_path / "run"
    (folder / made).parent.mkdir(parents=True)
    (folder / made).write_text("mine")
    for extra in ((), ("overwrite=true",), ("resume=auto",)):
        with pytest.raises(ValueError, match="holds files that no run wrote"):
            train(config(folder, *extra))
    assert content(folder) == {made: b"mine"}


def test_a_new_run_replaces_a_run_and_keeps_what_lies_beside_it(copy, ended):
    (copy / "notes.txt").write_text("mine")
    train(config(copy, "overwrite=true"))
    assert (copy / "notes.txt").read_text() == "mine"
    same_run(copy, ended)


def test_an_export_that_holds_anothers_files_is_not_replaced(copy):
    (copy / "export" / "mine.bin").write_text("mine")
    with pytest.raises(ValueError, match="holds files that no export wrote"):
        train(config(copy, "overwrite=true"))
    assert (copy / "stages").is_dir()


@pytest.mark.parametrize("name", ["..", "''", "a/../../b", "/tmp/x", "a//b", "' '"])
def test_a_name_stays_below_runs(name):
    with pytest.raises(ValueError, match="name must be a folder below runs/"):
        config(Path("runs/x"), f"name={name}")


@pytest.mark.parametrize("run_dir", [".", "..", "/"])
def test_a_run_does_not_write_into_the_working_folder_or_above(tmp_path, monkeypatch, run_dir):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(ValueError, match="run_dir must be a folder of its own"):
        train(config(Path(run_dir)))
    assert content(tmp_path) == {}


def test_a_dry_run_does_not_touch_a_folder_that_is_not_its_own(tmp_path):
    (tmp_path / "run-dry_run").mkdir()
    (tmp_path / "run-dry_run" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="holds files that no run wrote"):
        train(config(tmp_path / "run", "dry_run=true"))
    assert content(tmp_path) == {"run-dry_run/mine": b"mine"}


def test_a_run_that_is_refused_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError):
        train(config(tmp_path / "a" / "b", "head.taps=[9]"))
    assert list(tmp_path.iterdir()) == []


def test_two_runs_cannot_write_into_one_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        train(config(tmp_path / "run", "resume=auto"))
    folder.release()
    assert not (tmp_path / "run").exists()


def test_a_dead_process_holds_no_lock(tmp_path):
    code = (
        "import sys, os, time; from pathlib import Path; from mtp.hub.run_folder import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1])); folder.lock()\n"
        "print('locked', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert owner.stdout is not None and owner.stdout.readline() == b"locked\n"
    with pytest.raises(ValueError, match=f"in use by process {owner.pid}"):
        RunFolder(tmp_path / "run").lock()
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    folder.release()


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


def test_a_late_process_of_a_new_run_waits_for_the_first(tmp_path):
    """The second process looks at the folder when the first has already begun the run there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    overrides = [*TINY, "stages.rl.steps=0", "stages.joint.steps=0", "fabric.devices=2"]
    command = [sys.executable, "train.py", *overrides, f"run_dir={tmp_path / 'run'}"]
    jobs = []
    for rank in range(2):
        environment = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_PORT": port}
        environment |= {"MASTER_ADDR": "127.0.0.1"}
        jobs.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        time.sleep(4 * (1 - rank))
    said = [job.communicate(timeout=240)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]


def test_a_harmless_setting_may_change_and_is_recorded(copy, capsys):
    (copy / "summary.json").unlink()
    train(config(copy, "resume=true", "checkpoint_minutes=3"))
    assert "checkpoint_minutes was 10.0 and is now 3.0" in capsys.readouterr().out
    summary = json.loads((copy / "summary.json").read_text())
    changed = [change for change in summary["changed_on_resume"] if change["key"] != "run_dir"]
    assert changed == [{"key": "checkpoint_minutes", "then": 10.0, "now": 3.0, "global_step": 18}]
    assert "checkpoint_minutes: 3.0" in (copy / "config.yaml").read_text()


def test_written_files_have_the_permissions_of_the_umask(ended):
    umask = os.umask(0)
    os.umask(umask)
    for path in ended.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert mode == expected, (path, oct(mode))


def test_a_replaced_folder_is_always_there(tmp_path):
    """Another process looks for the folder while it is replaced many times."""
    target = tmp_path / "out"

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "file").write_text("x" * 100)

    save_atomically(target, write)
    code = (
        "import os, sys, time\n"
        "print('looking', flush=True)\n"
        "end = time.monotonic() + 2\n"
        "print(sum(not os.path.isdir(sys.argv[1]) for _ in iter(lambda: time.monotonic() < end, "
        "False)))"
    )
    watcher = subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True
    )
    assert watcher.stdout is not None and watcher.stdout.readline() == "looking\n"
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        save_atomically(target, write)
    assert watcher.communicate()[0].strip() == "0"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_whose_replacement_was_cut_short_is_put_back(tmp_path, monkeypatch):
    """If names cannot be exchanged in one step, a crash between two renames is repaired."""
    import mtp.common.files as files

    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    target = tmp_path / "out"

    def write(text: str):
        def make(folder: Path) -> None:
            folder.mkdir()
            (folder / "file").write_text(text)

        return make

    save_atomically(target, write("old"))
    target.rename(tmp_path / ".out.mtp-old")  # as a crash between the renames leaves it
    (tmp_path / ".out.mtp-tmp").mkdir()
    files.remove_temporary(tmp_path)
    assert content(tmp_path) == {"out/file": b"old"}
    save_atomically(target, write("new"))
    assert content(tmp_path) == {"out/file": b"new"}


def test_a_file_beside_an_export_is_left_alone(tmp_path):
    for name in ("out.tmp", "out.old"):
        (tmp_path / name).write_text("mine")
    save_atomically(tmp_path / "out", lambda file: file.write_text("new"))
    assert content(tmp_path) == {"out": b"new", "out.old": b"mine", "out.tmp": b"mine"}


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
