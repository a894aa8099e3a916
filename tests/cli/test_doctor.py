"""`mtp doctor`: each finding from a machine that is described, and the command on this one."""

import json
import shutil
from pathlib import Path

import pytest

from mtp.cli import doctor
from mtp.cli.main import main

GIB = 2**30


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_nothing_is_broken_here_and_the_kernels_give_the_right_value(tmp_path, capsys):
    assert main(["doctor", "--runs", str(tmp_path / "runs"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    topics = {one["topic"]: one for one in found}
    assert not [one for one in found if one["level"] == "broken"]
    assert topics["kernels"]["level"] == "ok" and "values checked" in topics["kernels"]["text"]
    assert "torch 2." in topics["packages"]["text"]
    assert f"GiB free at {tmp_path}" in topics["disk"]["text"]
    assert list(tmp_path.iterdir()) == [], "it leaves no trace"


def test_a_folder_that_cannot_be_written_is_broken(capsys):
    assert main(["doctor", "--runs", "/dev/null/runs"]) == 1
    shown = capsys.readouterr().out
    assert "--runs=/dev/null/runs cannot be written" in shown
    assert shown.splitlines()[-1].startswith("1 broken; ")


def test_a_check_that_fails_is_a_finding(monkeypatch, tmp_path):
    def fails():
        raise RuntimeError("no such thing\nsecond line")
        yield

    monkeypatch.setattr(doctor, "slurm", fails)
    found = [one for one in doctor.examine(tmp_path) if one.topic == "Slurm"]
    assert found == [doctor.Finding("broken", "Slurm", "RuntimeError: no such thing")]


def test_kernels_that_give_a_wrong_value_are_broken(monkeypatch):
    import mtp_kernels

    right = mtp_kernels.linear_loss

    def wrong(*given, impl="auto"):
        out = right(*given, impl=impl)
        return out if impl == "reference" else out._replace(loss=2 * out.loss)

    monkeypatch.setattr(mtp_kernels, "linear_loss", wrong)
    first = next(doctor.kernels())
    assert first.level == "broken" and "gives a loss of" in first.text


def test_a_library_newer_than_all_tested_ones_is_noted(monkeypatch):
    needs = ["torch>=2.8", "transformers>=5.0,<6", "rich>=14"]
    have = {"torch": "2.13.1+cpu", "transformers": "5.99.0", "rich": "99.0"}
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needs)
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.1.0")
    monkeypatch.setattr(doctor, "installed", have.get)
    (note,) = [one for one in doctor.packages() if one.level == "note"]
    assert note.text.startswith("transformers 5.99.0 is newer than all that mtp was tested with")


def test_a_package_that_is_missing_or_too_old_is_broken(monkeypatch):
    needs = ["torch>=2.13", "rich>=14", "wandb>=0.31", 'mlflow-skinny>=3; extra == "mlflow"']
    have = {"torch": "2.1.0", "rich": "15.0.0"}
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needs)
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.1.0")
    monkeypatch.setattr(doctor, "installed", have.get)
    monkeypatch.setattr(doctor, "extra_of", lambda r: "mlflow" if r.name.startswith("ml") else "")
    found = [(one.level, one.text) for one in doctor.packages()][1:]
    assert found == [
        ("broken", "torch must be >=2.13, got 2.1.0; pip install 'torch>=2.13'"),
        ("broken", "wandb is not installed; pip install 'wandb>=0.31'"),
        ("ok", "mtp-eavesdrop 0.1.0, rich 15.0.0"),
        (
            "note",
            "[mlflow] is not installed: mlflow-skinny missing; pip install 'mtp-eavesdrop[mlflow]'",
        ),
    ]


def test_extras_are_told_from_what_mtp_itself_needs(monkeypatch):
    from packaging.requirements import Requirement

    class About:
        def get_all(self, name):
            return ["dev", "mlflow"]

    monkeypatch.setattr(doctor.metadata, "metadata", lambda name: About())
    for text, extra in (
        ("torch>=2", ""),
        ("triton>=3; platform_system == 'Linux'", ""),
        ("mlflow-skinny>=3; extra == 'mlflow'", "mlflow"),
    ):
        assert doctor.extra_of(Requirement(text)) == extra


@pytest.mark.parametrize(
    ("content", "cores"), [("150000 100000", 1.5), ("max 100000", 8.0), ("1600000 100000", 8.0)]
)
def test_cores_are_those_of_the_quota(tmp_path, monkeypatch, content, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    assert doctor.usable_cores(written(tmp_path / "cpu.max", content)) == cores
    assert doctor.usable_cores(tmp_path / "absent") == 8.0


@pytest.mark.parametrize(
    ("threads", "variable", "level", "why"),
    [
        (8, None, "slow", "more threads than cores wait for each other; set fabric.num_threads=2"),
        (1, "1", "slow", "OMP_NUM_THREADS=1 leaves cores unused"),
        (2, None, "ok", "threads: 2"),
    ],
)
def test_threads_that_do_not_fit_the_cores_are_slow(monkeypatch, threads, variable, level, why):
    monkeypatch.setattr(doctor, "usable_cores", lambda: 2.0)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    (found,) = doctor.processor()
    assert found.level == level and why in found.text


def test_a_gpu_that_torch_cannot_use_says_why():
    assert "was built without CUDA" in doctor.no_gpu("2.13.0+cpu", None, True).text
    assert "driver does not fit CUDA 13.0" in doctor.no_gpu("2.13.0", "13.0", True).text
    assert doctor.no_gpu("2.13.0", "13.0", False).text.startswith("none: ")


def test_a_network_file_system_is_slow(tmp_path):
    mounts = written(
        tmp_path / "mounts",
        f"/dev/a / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\nno /other tmpfs rw 0 0\n",
    )
    first, second = doctor.disk(tmp_path / "runs" / "new", mounts)
    assert first.topic == "disk" and str(tmp_path) in first.text
    assert second.level == "slow" and f"{tmp_path} is on nfs4" in second.text


@pytest.mark.parametrize(
    ("free", "level"), [(0.5 * GIB, "broken"), (2 * GIB, "note"), (50 * GIB, "ok")]
)
def test_disk_space_by_what_is_free(tmp_path, monkeypatch, free, level):
    usage = shutil.disk_usage(tmp_path)._replace(free=int(free))
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert next(doctor.disk(tmp_path, tmp_path / "absent")).level == level


def test_memory_is_that_of_the_container(tmp_path):
    info = written(
        tmp_path / "meminfo", f"MemTotal: {64 * 2**20} kB\nMemAvailable: {60 * 2**20} kB\n"
    )
    (found,) = doctor.memory(info, written(tmp_path / "max", "max\n"))
    assert (found.level, found.text) == ("ok", "60.0 of 64.0 GiB available")
    (found,) = doctor.memory(info, written(tmp_path / "max", f"{2 * GIB}\n"))
    assert found.level == "note" and "limited to 2.0 GiB" in found.text


def test_little_shared_memory_is_noted(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(total=64 * 2**20)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    (found,) = doctor.shared_memory(tmp_path)
    assert found.level == "note" and found.text.startswith("0.06 GiB")


def test_slurm_is_found_by_its_command(tmp_path, monkeypatch):
    sbatch = written(tmp_path / "sbatch", "#!/bin/sh\necho slurm 24.05.1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (found,) = doctor.slurm()
    assert found.text.startswith("slurm 24.05.1")
