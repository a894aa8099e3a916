"""A head that no stage has trained: nothing uses it, and everything that is saved says so."""

import json

import pytest
import torch
from helpers import config
from transformers import AutoModelForCausalLM

from mtp.cli.main import main
from mtp.trainer import train

MAIN_ALONE = ["stages.main.train_head=false", "stages.head.steps=0", "stages.joint.steps=0"]
NO_RL = "stages.rl.steps=0"


def saved_flag(folder):
    return json.loads((folder / "config.json").read_text())["mtp_head_is_trained"]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A run of main alone."""
    folder = tmp_path_factory.mktemp("untrained") / "run"
    train(config(folder, *MAIN_ALONE, NO_RL))
    return folder


def test_an_export_writes_slowly_and_refuses_fast_mode(untrained):
    folder = untrained / "export"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    prompt = torch.tensor([[3, 4, 5]])
    slow = model.generate(prompt, mtp_mode="slow", max_new_tokens=4)
    checked = model.generate(prompt, mtp_mode="verified", max_new_tokens=4)
    assert torch.equal(slow, checked)  # main decides, so a poor proposal is no error
    with pytest.raises(ValueError, match="mtp_mode must be slow .* no stage has trained, got fast"):
        model.generate(prompt, mtp_mode="fast", max_new_tokens=4)
    model.config.mtp_head_is_trained = True
    model.generate(prompt, mtp_mode="fast", max_new_tokens=4)
    card = (folder / "README.md").read_text()
    assert "No stage up to this model trained the head" in card and "mtp_mode" not in card


def test_the_command_writes_slowly_and_exports_no_drafter(untrained, tmp_path, capsys):
    assert main(["generate", str(untrained / "export"), "1+2="]) == 0
    assert "slow: " in capsys.readouterr().out
    refused = [
        (["generate", str(untrained / "export"), "1+2=", "--mode", "fast"], "is untrained"),
        (
            ["export", str(untrained), str(tmp_path / "out"), "--format", "eagle3"],
            "--format eagle3 writes a head",
        ),
        (["export", str(untrained), str(tmp_path / "out"), "--default-mode", "fast"], "got fast"),
    ]
    for arguments, message in refused:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_from_it_neither_samples_nor_measures_fast_mode_until_it_trains_the_head(
    untrained, tmp_path, capsys
):
    source = f"model.source={untrained / 'stages' / 'main'}"
    rl = ["stages.rl.steps=1", "stages.rl.train_head=false", "stages.rl.rollouts.mode=slow"]
    with pytest.raises(ValueError, match="mode=fast needs a head that is trained"):
        train(config(tmp_path / "fast", source, *MAIN_ALONE, *rl, "stages.rl.rollouts.mode=fast"))
    stages = train(
        config(tmp_path / "slow", source, "stages.main.steps=0", NO_RL, "stages.joint.steps=0")
    )["stages"]
    assert saved_flag(untrained / "stages" / "main") is saved_flag(untrained / "export") is False
    assert stages[-1]["name"] == "head" and "fast_accuracy" in stages[-1]
    assert saved_flag(tmp_path / "slow" / "stages" / "head") is True
    again = f"model.source={tmp_path / 'slow' / 'export'}"
    stages = train(config(tmp_path / "again", again, *MAIN_ALONE, NO_RL))["stages"]
    assert "fast_accuracy" in stages[-1] and saved_flag(tmp_path / "again" / "export") is True
    assert "no head is trained" not in capsys.readouterr().out
