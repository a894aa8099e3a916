"""A run: resuming gives the same numbers, an interrupt loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, TINY, checks_configs, config, records
from safetensors import safe_open
from safetensors.torch import load_file

from mtp.reference import evaluation_reference, reference_in_loss, stage_reference
from mtp.stages.loop import over_updates
from mtp.trainer import Interrupted, train


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(config(folder))


def test_a_run_leaves_what_the_readme_says(whole_run):
    folder, summary = whole_run
    assert json.loads((folder / "summary.json").read_text()) == summary
    for name in ("metrics.jsonl", "metrics.csv", "config.yaml", "curves.png"):
        assert (folder / name).stat().st_size > 0, name
    assert (folder / "export" / "model.safetensors").is_file()
    assert [stage["name"] for stage in summary["stages"]] == ["main", "head", "joint", "rl"]
    main, head = summary["stages"][:2]
    assert main["fast_accuracy"] is None and main["fast_passes"] is None
    assert head["fast_accuracy"] is not None
    assert all(stage["num_problems"] == 8 for stage in summary["stages"])
    assert summary["seconds"] == pytest.approx(sum(s["seconds"] for s in summary["stages"]), abs=1)
    lines = (folder / "metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + len(records(folder))


def test_only_what_a_stage_trains_moves(whole_run):
    folder, _ = whole_run
    names = ("main", "head", "joint", "rl")
    saved = {
        n: load_file(folder / "stages" / n / "model.safetensors")
        | load_file(folder / "stages" / n / "mtp_head" / "model.safetensors")
        for n in names
    }

    def moved(a: str, b: str) -> set[str]:
        changed = {k for k in saved[a] if not torch.equal(saved[a][k], saved[b][k])}
        return {"head" if k.startswith("mtp_head.") else "main" for k in changed}

    assert moved("main", "head") == {"head"}
    assert moved("head", "joint") == {"main", "head"}
    assert moved("joint", "rl") == {"main", "head"}


@pytest.mark.parametrize("stage", ["joint", "rl"])
def test_a_resumed_run_gives_the_very_same_numbers(whole_run, tmp_path, monkeypatch, stage):
    import mtp.stages.loop as stage_loop

    folder, summary = whole_run
    original = stage_loop.step_batches

    def stop_after_two_steps(run, stage_run, step):
        if stage_run.name == stage and step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(run, stage_run, step)

    monkeypatch.setattr(stage_loop, "step_batches", stop_after_two_steps)
    with pytest.raises(Interrupted, match=f"stage {stage} after step 2 of 4; use resume=true"):
        train(config(tmp_path))
    monkeypatch.setattr(stage_loop, "step_batches", original)
    resumed = train(config(tmp_path, "resume=true"))
    assert records(tmp_path) == records(folder)
    for mine, theirs in zip(resumed["stages"], summary["stages"], strict=True):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}


def test_a_run_that_is_there_is_not_overwritten_unasked(whole_run, tmp_path):
    folder, _ = whole_run
    before = (folder / "summary.json").read_text()
    with pytest.raises(ValueError, match="already holds a run; use resume=true"):
        train(config(folder))
    with pytest.raises(ValueError, match="stages.rl.steps was 4 and is now 5"):
        train(config(folder, "resume=true", "stages.rl.steps=5"))
    with pytest.raises(ValueError, match="resume=true needs a checkpoint"):
        train(config(tmp_path / "none", "resume=true"))
    assert (folder / "summary.json").read_text() == before


def test_a_dry_run_leaves_nothing_and_says_what_a_full_run_costs(tmp_path, capsys):
    folder = tmp_path / "dry"
    summary = train(config(folder, "dry_run=true"))
    assert [stage["name"] for stage in summary["stages"]] == ["main", "head", "joint", "rl"]
    assert list(tmp_path.iterdir()) == []
    assert "a full run would take about" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("head.taps=[9]", "head.taps must be layers between 0 and 4"),
        ("decoding.phases.answer.opened_by=null", "decoding.phases.answer.opened_by is missing"),
        pytest.param(
            "model.config.hidden_size=33",
            "model.config does not fit|hidden_size",
            marks=checks_configs,
        ),
        (
            "stages.main.objective.reference_kl.weight=1",
            "main.objective.reference_kl needs a stage before it",
        ),
        ("decoding.temperature=0", "decoding.temperature must be above 0, got 0: an advantage"),
        (
            "stages.rl.objective.policy.correction_cap=2",
            "policy.correction_cap=2 needs stages.rl.rollouts.recompute_old=true",
        ),
    ],
)
def test_impossible_settings_name_their_key_and_leave_nothing(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path / "run", override))
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_head_that_no_stream_has_a_gradient_for_is_not_trained(tmp_path):
    off = ["policy.head_weight=0", "reference_kl.head_weight=0"]
    changes = [f"stages.rl.objective.{change}" for change in (*off, "preserve.weight=1")]
    with pytest.raises(ValueError, match="stages.rl.train_head is true but no stream trains the"):
        train(config(tmp_path / "run", *changes))
    assert list(tmp_path.iterdir()) == []


def test_references_with_the_same_main_are_one_model(tmp_path):
    """Stage head leaves main as it was, and so does a run without stages before it."""
    without_joint = config(tmp_path, "stages.joint.steps=0", "stages.rl.reference=head")
    assert evaluation_reference(without_joint) == "main"
    assert stage_reference(without_joint, "rl") == "head"
    assert reference_in_loss(without_joint, "rl")
    assert not reference_in_loss(without_joint, "head"), "it has no reference in the loss"
    assert not reference_in_loss(config(tmp_path, "stages.rl.reference=joint"), "rl")
    begun = ["stages.main.steps=0", "stages.joint.steps=0", "evaluation.reference=start"]
    assert reference_in_loss(config(tmp_path, *begun, "stages.rl.reference=head"), "rl")


def test_fast_rollouts_need_a_head_that_some_stage_trains(tmp_path):
    without = ["stages.head.steps=0", "stages.joint.steps=0", "stages.rl.train_head=false"]
    with pytest.raises(ValueError, match="stages.rl.rollouts.mode=fast needs a head .* to slow"):
        train(config(tmp_path / "run", *without))
    assert list(tmp_path.iterdir()) == []
    for change in ("rollouts.mode=slow", "train_head=true"):
        train(config(tmp_path / "run", *without, f"stages.rl.{change}", "dry_run=true"))


def test_an_accuracy_of_fast_mode_to_stop_at_needs_a_head_that_some_stage_trains(tmp_path):
    with pytest.raises(ValueError, match=r"stages.main.stop_accuracy=0.5 .* needs a head that is"):
        train(config(tmp_path / "run", "stages.main.stop_accuracy=0.5"))
    assert list(tmp_path.iterdir()) == []
    train(config(tmp_path / "run", "stages.joint.stop_accuracy=0.5", "dry_run=true"))


def test_a_run_in_bfloat16_ends_and_its_weights_are_bfloat16(tmp_path, caplog):
    """Its reference is in bfloat16 too; new tensors are float32, as counters have to be."""
    summary = train(config(tmp_path / "run", "fabric.precision=bf16-true"))
    assert [stage["name"] for stage in summary["stages"]] == ["main", "head", "joint", "rl"]
    assert "the weights are bfloat16: a step that changes one by less than" in caplog.text
    with safe_open(tmp_path / "run" / "stages" / "rl" / "model.safetensors", "pt") as saved:
        assert {saved.get_tensor(name).dtype for name in saved.keys()} == {torch.bfloat16}  # noqa: SIM118
    same = ["fabric.precision=32-true", "model.dtype=bfloat16"]
    train(config(tmp_path / "same", *same))
    assert records(tmp_path / "run") == records(tmp_path / "same")


def test_main_learns_from_the_first_step_of_a_ramp_through_the_channel_alone(tmp_path):
    ramp = ["stages.joint.channel_ramp_steps=2", "stages.joint.objective.main_ce.weight=0"]
    train(config(tmp_path / "run", *ramp, "stages.rl.steps=0"))


def test_two_processes_take_the_same_step_as_one(whole_run, tmp_path):
    """Streams are divided by their global counts, so DDP changes nothing but rounding."""
    overrides = [*TINY, "stages.rl.steps=0", "fabric.devices=2", f"run_dir={tmp_path}"]
    command = [sys.executable, "train.py", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    alone, together = (
        [
            (r["stage"], r["loss"], r.get("main/grad_norm", 0.0), r.get("head/grad_norm", 0.0))
            for r in records(folder)
            if "loss" in r and r["stage"] != "rl"
        ]
        for folder in (whole_run[0], tmp_path)
    )
    assert len(alone) == len(together) == 14
    for one, two in zip(alone, together, strict=True):
        assert one[0] == two[0]
        for a, b in zip(one[1:], two[1:], strict=True):
            assert a == pytest.approx(b, rel=2e-3), one[0]


def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path):
    overrides = [*TINY, "stages.main.steps=100000", "logger.log_every=1", "fabric.devices=2"]
    command = [sys.executable, "train.py", *overrides, f"run_dir={tmp_path}"]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGINT)
    try:
        said, _ = job.communicate(timeout=60)
    finally:
        job.kill()
    assert b"stopped in stage main after step" in said
    assert list((tmp_path / "checkpoints").glob("step_*.safetensors"))


def test_a_stage_ends_once_training_problems_are_solved_well_enough(tmp_path, monkeypatch):
    import mtp.stages.evaluation as stage_evaluation

    asked = []

    def half_solved(model, text, examples, *rest):
        asked.append([example.prompt for example in examples])
        return 0.5 if len(asked) == 2 else 0.25

    monkeypatch.setattr(stage_evaluation, "fast_accuracy", half_solved)
    overrides = ["stages.joint.steps=9", "stages.joint.stop_every=2", "stages.rl.steps=0"]
    summary = train(config(tmp_path, *overrides, "stages.joint.stop_accuracy=0.5"))
    assert [stage["steps"] for stage in summary["stages"]] == [6, 4, 4]
    task = config(tmp_path).task.build()
    drawn = 64 * (6 + 4)  # sequences of the stages before
    assert asked == [
        [task.example("train", drawn + 64 * step + i).prompt for i in range(4)] for step in (2, 4)
    ]


def test_a_step_of_several_updates_logs_their_means_and_maxima():
    updates = [{"loss": 1.0, "difference_max": 3.0}, {"loss": 2.0, "difference_max": 1.0}]
    assert over_updates(updates) == {"loss": 1.5, "difference_max": 3.0}
