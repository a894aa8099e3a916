"""The folder of a run: what is never overwritten, its lock, its permissions."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, TINY, config
from runs import content, same_run
from transformers import AutoConfig

import mtp.stages.loop as stage_loop
from mtp.hub.run_folder import MARK, REPLACED, RunFolder
from mtp.trainer import train


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


@pytest.mark.parametrize(
    "unusable",
    [
        "kernels=triton",
        "logger.sinks.mlflow.tracking_uri=/dev/null/store",
        "evaluation.reference=FOREIGN",
    ],
)
def test_a_run_stays_until_the_one_that_replaces_it_trains(
    copy, ended, tmp_path, monkeypatch, unusable
):
    monkeypatch.setattr("mtp.trainer.triton_interpreted", lambda: False)
    if "mlflow" in unusable:
        pytest.importorskip("mlflow")
        unusable = ("logger=[files,mlflow]", unusable)
    else:
        AutoConfig.for_model("llama").save_pretrained(tmp_path / "foreign")
        unusable = (unusable.replace("FOREIGN", str(tmp_path / "foreign")),)
    with pytest.raises(ValueError, match="kernels=triton|tracking_uri|no model that mtp saved"):
        train(config(copy, "overwrite=true", *unusable))
    same_run(copy, ended)
    assert content(copy) == content(ended)


def test_a_run_stays_until_the_one_that_replaces_it_has_taken_a_step(copy, ended, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(stage_loop, "take_update", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(config(copy, "overwrite=true"))
    assert content(copy) == content(ended)


@pytest.mark.parametrize("key", ["model.source", "evaluation.reference"])
def test_a_run_does_not_replace_what_it_reads(copy, ended, key):
    with pytest.raises(ValueError, match=f"{key}=.* belongs to the run that this one would repl"):
        train(config(copy, "overwrite=true", f"{key}={copy / 'stages' / 'main'}"))
    same_run(copy, ended)


class Killed(BaseException):
    """Ends an action at once, as SIGKILL ends a process."""


def killed_at(monkeypatch, number: int, action) -> bool:
    """Do it until its file operation of this number; False if it had fewer."""
    left = iter(range(number))
    originals = {name: getattr(Path, name) for name in ("rename", "unlink", "mkdir", "rmdir")}
    with monkeypatch.context() as patch:
        for name, original in originals.items():

            def step(self, *args, original=original, **kwargs):
                if next(left, None) is None:
                    raise Killed
                return original(self, *args, **kwargs)

            patch.setattr(Path, name, step)
        try:
            action()
        except Killed:
            return True
    return False


def test_a_run_that_a_killed_one_was_about_to_replace_is_put_back(copy, ended, monkeypatch):
    """Killed at any moment: while it sets the run aside, trains, or puts it back."""
    before, number = content(copy), 0
    while killed_at(monkeypatch, number, RunFolder(copy).begin):
        RunFolder(copy).check()
        RunFolder(copy).tidy()
        assert content(copy) == before, number
        number += 1
    assert number > 5
    restored = 0
    for number in range(100):
        if not (copy / REPLACED).is_dir():
            RunFolder(copy).begin()
        (copy / "metrics.jsonl").write_text("of the new run")
        (copy / "stages").mkdir()
        if not killed_at(monkeypatch, number, RunFolder(copy).restore_replaced):
            break
        restored += 1
        RunFolder(copy).tidy()
        assert content(copy) == before, number
    assert restored > 5
    assert content(copy) == before
    folder = RunFolder(copy)
    folder.begin()
    folder.discard_replaced()
    assert list(content(copy)) == [MARK]


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


def test_a_dry_run_does_not_replace_a_run_of_that_name(copy, ended):
    copy.rename(copy.with_name("run-dry_run"))
    with pytest.raises(ValueError, match="run-dry_run holds a run, which a dry run would remove"):
        train(config(copy, "dry_run=true"))
    assert content(copy.with_name("run-dry_run")) == content(ended)


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


def test_written_files_have_the_permissions_of_the_umask(ended):
    umask = os.umask(0)
    os.umask(umask)
    for path in ended.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert mode == expected, (path, oct(mode))
