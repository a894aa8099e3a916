"""`mtp plan`."""

import json

import pytest

from mtp.cli.main import main


def test_a_plan_says_what_fits_and_what_bounds_it(capsys):
    assert main(["plan", "--main", "1b", "--gpus", "1,64"]) == 0
    out = capsys.readouterr().out
    assert "main 1.24 B" in out and "1 GPU: 1024 rollouts do not fit; at most 256" in out
    assert "64 GPUs: ddp" in out and "bound by" in out and "asynchronous: " in out
    assert main(["plan", "--main", "8b", "--gpus", "64"]) == 0
    assert "asynchronous (rollouts.lag is refused with fsdp2): " in capsys.readouterr().out


def test_a_plan_in_json_has_bytes_and_seconds(capsys):
    assert main(["plan", "--main", "1b", "--gpus", "1,8", "--rollouts", "128", "--json"]) == 0
    one, eight = json.loads(capsys.readouterr().out)
    assert one["fits"] and one["layout"]["strategy"] == "ddp" and one["asynchronous"] is None
    assert one["memory"]["update"]["optimizer"] == eight["memory"]["update"]["optimizer"]
    assert one["step"]["step"] > eight["step"]["step"] > 0


def test_a_device_replays_no_more_rollouts_at_once_than_it_has(capsys):
    assert main(["plan", "--main", "1b", "--gpus", "64", "--rollouts", "128"]) == 0
    assert "micro-batch 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--main", "9b"], "--main must be one of"),
        (["--gpus", "0"], "--gpus must be numbers between 1"),
        (["--gpus", "2048"], "--rollouts must be at least the number of GPUs, 2048, got 1024"),
        (["--slots", "0"], "--slots must be a number of at least 1, got 0"),
        (["--tokens-per-pass", "9"], "tokens_per_pass must be between 1 and 6"),
    ],
)
def test_impossible_options_are_named(options, message, capsys):
    assert main(["plan", *options]) == 2
    assert message in capsys.readouterr().err
