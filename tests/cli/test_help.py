"""Help is there at once: it names every choice, fits a screen and imports nothing heavy."""

import subprocess
import sys

import pytest
from helpers import ROOT

from mtp.cli.help import GROUPS, described, help_text

HEAVY = ("torch", "transformers", "lightning", "hydra", "datasets", "matplotlib", "triton", "wandb")


def run(*command: str, cwd=ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout


def test_help_of_train_works_from_any_folder_and_names_every_choice(tmp_path):
    shown = run(sys.executable, str(ROOT / "train.py"), "--help", cwd=tmp_path)
    assert shown == help_text(ROOT / "conf") + "\n"
    for path in (ROOT / "conf").glob("*/**/*.yaml"):
        name = path.relative_to(ROOT / "conf").with_suffix("").as_posix().partition("/")[2]
        assert f"\n    {name} " in shown, name
    assert max(map(len, shown.splitlines())) <= 100
    assert "..." not in shown.replace("seed=1 ...", "")


def test_help_of_mtp_train_is_that_of_train_with_its_own_name(tmp_path):
    shown = run(sys.executable, "-m", "mtp.cli.main", "train", "--help", cwd=tmp_path)
    assert shown == help_text(ROOT / "conf", "mtp train") + "\n"
    assert "  mtp train experiment=NAME " in shown and "train.py" not in shown


def test_groups_stand_in_the_order_in_which_they_are_chosen():
    lines = help_text(ROOT / "conf").splitlines()
    assert [line.strip() for line in lines if line.strip() in GROUPS] == list(GROUPS)


def test_experiments_of_a_study_come_after_those_that_stand_alone():
    names = list(described(ROOT / "conf" / "experiment"))
    in_study = ["/" in name for name in names]
    assert in_study == sorted(in_study) and any(in_study)


COMMANDS = [
    ["mtp", "--help"],
    ["mtp", "train", "--help"],
    ["mtp", "doctor", "--help"],
    ["mtp", "sweep", "status", "--help"],
    ["mtp", "completion", "bash"],
    ["train.py", "--help"],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_help_imports_nothing_that_a_run_needs(arguments):
    code = (
        "import runpy, sys\n"
        f"sys.argv = {arguments!r}\n"
        "try:\n"
        + (
            "    runpy.run_path('train.py', run_name='__main__')\n"
            if arguments[0] == "train.py"
            else "    runpy.run_module('mtp.cli.main', run_name='__main__')\n"
        )
        + "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert run(sys.executable, "-c", code).splitlines()[-1] == "heavy: []"
