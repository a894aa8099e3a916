"""Completion in a real bash: commands and options by the script, overrides by Hydra."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from mtp.cli.completion import choices_of_group
from mtp.cli.main import make_parser
from mtp.cli.train import CONF

COMPLETE = """
eval "$(mtp completion bash)"
{breaks}
COMP_LINE={line!r} COMP_POINT={point} COMP_WORDS=({words}) COMP_CWORD={last} COMP_TYPE=9
$(complete -p mtp | sed 's/.*-F \\([^ ]*\\).*/\\1/') mtp {word!r} 2>/dev/null
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def complete(line: str, words: list[str], tmp_path: Path, breaks: str = "") -> set[str]:
    """Completions of a line in bash, which splits it into `words`."""
    program = tmp_path / "mtp"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m mtp.cli.main "$@"\n')
    program.chmod(0o755)
    script = COMPLETE.format(
        line=line,
        point=len(line),
        words=" ".join(f"'{word}'" for word in words),
        last=len(words) - 1,
        word=words[-1],
        breaks=breaks,
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return set(done.stdout.split())


bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@bash
def test_bash_completes_commands_and_options(tmp_path):
    assert complete("mtp e", ["mtp", "e"], tmp_path) == {"evaluate", "export"}
    words = ["mtp", "chat", "runs/x", "--mode", ""]
    assert complete("mtp chat runs/x --mode ", words, tmp_path) == {"fast", "slow", "verified"}
    assert complete("mtp sweep s", ["mtp", "sweep", "s"], tmp_path) == {"status"}


@bash
def test_bash_completes_the_choices_of_a_group(tmp_path):
    words = ["mtp", "train", "experiment", "=", "running"]
    found = {"running_sum", "running_sum_supervised"}
    assert complete("mtp train experiment=running", words, tmp_path) == found
    whole = ["mtp", "train", "experiment=running"]
    unbroken = complete(
        "mtp train experiment=running", whole, tmp_path, "COMP_WORDBREAKS=${COMP_WORDBREAKS//=}"
    )
    assert unbroken == {f"experiment={name}" for name in found}


@bash
def test_bash_completes_keys_as_hydra_does(tmp_path):
    found = complete(
        "mtp train seed=3 evaluation.num_p", ["mtp", "train", "evaluation.num_p"], tmp_path
    )
    assert found == {"evaluation.num_problems="}


def test_choices_of_a_group_are_read_from_conf_alone(monkeypatch):
    monkeypatch.setenv("COMP_LINE", "mtp -m seed=1,2 logger=")
    expected = {f"logger={path.stem}" for path in (ROOT / "conf" / "logger").glob("*.yaml")}
    found = choices_of_group(["-sc", "query=bash"], CONF)
    assert found is not None and set(found.split()) == expected
    assert choices_of_group(["logger=files"], CONF) is None, "it was not asked for completions"
    monkeypatch.setenv("COMP_LINE", "mtp stages.rl.steps=")
    assert choices_of_group(["-sc", "query=bash"], CONF) is None


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_reads_the_script():
    import shtab  # noqa: F401

    from mtp.cli.completion import script

    done = subprocess.run(
        ["zsh", "-n"], input=script(make_parser(), "zsh"), capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
