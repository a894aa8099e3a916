"""The package from a wheel, outside of a checkout: training, help and the doctor."""

import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from helpers import ROOT, TINY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The command `mtp` of a fresh environment with this package's wheel.

    The dependencies are those of the environment of the tests, except for mtp itself.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    shutil.rmtree(source)
    (wheel,) = folder.glob("mtp_eavesdrop-*.whl")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    python = folder / "env" / "bin" / "python"
    install = ["--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *install], check=True, capture_output=True)
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    # A folder of links: neither mtp itself nor the .pth file of its editable install is read.
    links = folder / "links"
    links.mkdir()
    for home in site.getsitepackages():
        for path in Path(home).iterdir():
            if not path.name.startswith(("mtp_eavesdrop", "__editable__", "mtp")):
                (links / path.name).symlink_to(path)
    (packages / "dependencies.pth").write_text(f"{links}\n")
    return folder / "env" / "bin" / "mtp"


def run(program: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = {**kept, "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    return subprocess.run(
        [str(program), *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_it_is_the_wheel_that_runs(program, tmp_path):
    code = "import mtp, mtp_kernels; print(mtp.__path__[0]); print(mtp_kernels.__path__[0])"
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    shown = subprocess.run(
        [str(program.with_name("python")), "-c", code],
        cwd=tmp_path, env=kept, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert len(shown) == 2
    assert all(Path(path).is_relative_to(program.parents[1]) for path in shown)


def test_every_setting_is_in_the_wheel(program):
    (conf,) = program.parents[1].glob("lib/python*/site-packages/mtp/conf")
    assert not conf.is_symlink()
    expected = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    assert {path.relative_to(conf) for path in conf.rglob("*.yaml")} == expected


def test_train_shows_its_help_and_finishes_a_dry_run(program, tmp_path):
    shown = run(program, tmp_path, "train", "--help")
    assert shown.returncode == 0 and "  mtp train dry_run=true " in shown.stdout
    done = run(program, tmp_path, "train", "dry_run=true", *TINY)
    assert done.returncode == 0, done.stderr
    assert "a full run would take about" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_setting_of_ones_own_is_found(program, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "short.yaml").write_text(
        "# @package _global_\nname: short\nevaluation: {num_problems: 7}\n"
    )
    done = run(
        program, tmp_path, "train", "--config-dir", "mine", "experiment=short", "--cfg", "job"
    )
    assert done.returncode == 0, done.stderr
    assert "name: short\n" in done.stdout and "num_problems: 7\n" in done.stdout


def test_two_processes_start_the_same_command(program, tmp_path):
    arguments = ["fabric.devices=2", "stages.head.steps=0", "stages.joint.steps=0"]
    arguments += ["stages.rl.steps=0", "stages.main.steps=2"]
    done = run(program, tmp_path, "train", *TINY, *arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "default" / "summary.json").is_file()


def test_the_doctor_finds_nothing_broken(program, tmp_path):
    done = run(program, tmp_path, "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing is broken" in done.stdout.splitlines()[-1]
