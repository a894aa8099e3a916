"""A comparison: its means and intervals, and that a variant differs only where its name says."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from mtp.cli.hydra import register_configs
from mtp.config import to_run_config
from mtp.reports import comparison, metrics
from mtp.reports.comparison import aggregate, main, read_runs
from mtp.reports.keep import main as keep_main
from mtp.reports.metrics import Metric, declare
from mtp.trainer import train

ROOT = Path(__file__).parents[2]
VARIANTS = {
    "executed_closed": {"channel_gradient": 0.0},
    "reference_kl_only": {"objective.policy.weight": 0.0},
    "no_reference_kl": {"objective.reference_kl.weight": 0.0, "objective.preserve.weight": 0.0},
    "main_reference_kl": {"objective.reference_kl.head_weight": 0.0},
    "auxiliary_ce": {
        "rollouts.mode": "slow",
        "objective.policy.head_weight": 0.0,
        "objective.head_ce.weight": 1.0,
        "objective.head_ce.on_rollouts": True,
    },
    "detach": {
        "rollouts.mode": "slow",
        "channel_gradient": 0.0,
        "objective.policy.head_weight": 0.0,
        "objective.head_ce.weight": 1.0,
        "objective.head_ce.on_rollouts": True,
    },
    "auxiliary_policy": {"rollouts.mode": "slow", "rollouts.recompute_old": True},
}


def config(experiment: str, *overrides: str):
    register_configs()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("train", [f"experiment={experiment}", *overrides])
        return to_run_config(composed)


def flat(settings: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in settings.items():
        out |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_differs_from_the_executed_policy_in_what_it_is_named_for(variant):
    base, other = (
        config("rl_proof/executed_open", "run_dir=x"),
        config(f"rl_proof/{variant}", "run_dir=x"),
    )
    assert other.name == f"rl_proof/{variant}/1"
    before, after = flat(asdict(base.stages["rl"])), flat(asdict(other.stages["rl"]))
    assert {k: v for k, v in after.items() if before[k] != v} == VARIANTS[variant]
    for key in ("model", "head", "task", "decoding", "evaluation", "seed"):
        assert getattr(base, key) == getattr(other, key), key


def weights(value: float) -> dict:
    return {"objective.reference_kl.weight": value, "objective.preserve.weight": value}


RL_ON_MAIN = {
    "rollouts.mode": "slow",
    "objective.policy.head_weight": 0.0,
    "objective.reference_kl.head_weight": 0.0,
    "objective.preserve.weight": 0.0,
}
IMPERFECT_TEACHER = {
    "reward_kl_0.3": weights(0.3),
    "reward_kl_0.1": weights(0.1),
    "reward_kl_0.03": weights(0.03),
    "kl_only": {"objective.policy.weight": 0.0},
    "reward_only": weights(0.0),
    "closed": weights(0.03) | {"channel_gradient": 0.0},
    "main_only": weights(0.03) | RL_ON_MAIN | {"objective.head_kl.weight": 1.0},
    "slow_first": weights(0.03)
    | RL_ON_MAIN
    | {"steps": 1500, "train_head": False, "channel_gradient": 0.0},
    "two_phase_reward_kl_0.03": weights(0.03) | {"steps": 2000},
    "two_phase_kl_only": {"objective.policy.weight": 0.0, "steps": 2000},
    "two_phase_reverse_kl": weights(0.03)
    | {"steps": 2000, "objective.reference_kl.weight": 0.3, "objective.reference_kl.reverse": True},
    "two_phase_new_reference": weights(0.3)
    | {"steps": 500}
    | {f"optimizers.{part}.decay": "constant" for part in ("main", "head")},
    "two_phase_head_kl": weights(0.03) | {"steps": 2000, "objective.head_kl.weight": 1.0},
}


@pytest.mark.parametrize("variant", IMPERFECT_TEACHER)
def test_a_variant_of_the_imperfect_teacher_differs_in_what_it_is_named_for(variant):
    base, other = (
        config(f"imperfect_teacher/{name}", "run_dir=x") for name in ("reward_kl_1", variant)
    )
    assert other.name == f"imperfect_teacher/{variant}/1"
    before, after = flat(asdict(base.stages["rl"])), flat(asdict(other.stages["rl"]))
    assert {k: v for k, v in after.items() if before[k] != v} == IMPERFECT_TEACHER[variant]
    stages = other.active_stages().values()
    before = 1000 if variant.startswith("two_phase") else 0
    assert before + sum(stage.steps for stage in stages) == 3000, "all take as many steps"
    for key in ("head", "task", "decoding", "evaluation", "seed"):
        assert getattr(base, key) == getattr(other, key), key


def write_run(folder: Path, name: str, seed: int, fast: float) -> None:
    home = folder / name
    home.mkdir(parents=True)
    (home / "config.yaml").write_text(f"name: proof/{name}\nseed: {seed}\n")
    last = {"name": "rl", "fast_accuracy": fast, "slow_accuracy": 1.0, "true_steps": 0.5}
    last |= {"empty_thought_accuracy": 0.0, "wrong_thought_accuracy": 0.0, "fast_passes": 8.0}
    last |= {"reference_nats_per_token": 0.2, "unigram_drift": None, "seconds": 50.0}
    (home / "summary.json").write_text(
        json.dumps({"stages": [{"name": "main", "seconds": 20.0}, last]})
    )
    record = {"stage": "rl", "step": 25, "global_step": 25, "eval/fast_accuracy": fast}
    (home / "metrics.jsonl").write_text(json.dumps(record) + "\n")


def test_means_and_intervals_over_seeds_by_hand(tmp_path, capsys):
    for seed, fast in ((1, 0.2), (2, 0.3)):
        write_run(tmp_path, f"start/{seed}", seed, fast)
    for seed, fast in ((1, 0.9), (2, 1.0), (3, 0.95)):
        write_run(tmp_path, f"open/{seed}", seed, fast)
    write_run(tmp_path, "closed/1", 1, 0.25)
    assert main([str(tmp_path)]) == 0
    arms = json.loads((tmp_path / "summary.json").read_text())["arms"]
    assert set(arms) == {"open", "closed"} and arms["open"]["seeds"] == [1, 2, 3]
    assert arms["open"]["seconds"] == 70.0
    half = 4.3027 * 0.05 / math.sqrt(3)
    assert arms["open"]["fast_accuracy"] == pytest.approx(
        {"mean": 0.95, "low": 0.95 - half, "high": 1.0}, rel=1e-4
    )
    assert arms["open"]["start_fast_accuracy"] is None, "seed 3 has no start"
    assert arms["closed"]["start_fast_accuracy"] == 0.2
    assert arms["closed"]["fast_accuracy"] == {"mean": 0.25, "low": None, "high": None}
    assert arms["open"]["fast_passes"] == 8.0
    assert (tmp_path / "variants.png").stat().st_size > 0
    assert (tmp_path / "frontier.png").stat().st_size > 0
    lines = capsys.readouterr().out.splitlines()
    row = next(i for i, line in enumerate(lines) if line.strip().startswith("open "))
    assert " 95.0 % " in lines[row] and " 83–100 " in lines[row + 1]
    assert aggregate(read_runs(tmp_path))["arms"] == arms, "its own summary is no run"


def test_a_metric_declared_elsewhere_is_in_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "METRICS", dict(metrics.METRICS))
    monkeypatch.setattr(comparison, "METRICS", metrics.METRICS)
    write_run(tmp_path, "open/1", 1, 0.9)
    path = tmp_path / "open" / "1" / "summary.json"
    summary = json.loads(path.read_text())
    summary["stages"][-1]["mean_digits"] = 3.25
    path.write_text(json.dumps(summary))
    assert main([str(tmp_path)]) == 0
    assert "3.25" not in capsys.readouterr().out
    declare(Metric("mean_digits", "digits", better="lower", digits=2))
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "3.25" in shown and "digits ↓" in shown
    with pytest.raises(ValueError, match="mean_digits must be declared once"):
        declare(Metric("mean_digits", "other"))


def test_a_folder_without_variants_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "holds no run of a variant that has ended" in capsys.readouterr().err
    write_run(tmp_path, "a/1", 1, 0.5)
    write_run(tmp_path / "again", "a/1", 1, 0.5)
    with pytest.raises(ValueError, match="are both seed 1 of a; keep one of them"):
        read_runs(tmp_path)


def test_variants_begin_where_the_start_of_their_seed_ended(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [
        "evaluation.num_problems=8",
        "evaluation.num_interim_problems=4",
        "fabric.accelerator=cpu",
        "fabric.num_threads=1",
        "model.config.hidden_size=32",
        "model.config.intermediate_size=48",
        "head.hidden_size=16",
        "head.intermediate_size=24",
        "seed=2",
    ]
    steps = ["stages.main.steps=2", "stages.head.steps=2", "stages.joint.steps=2"]
    train(config("rl_proof/start", *small, *steps))
    few = [
        "stages.rl.steps=2",
        "stages.rl.rollouts.num_prompts=4",
        "stages.rl.rollouts.group_size=4",
    ]
    for arm in ("executed_open", "auxiliary_ce", "auxiliary_policy"):
        summary = train(config(f"rl_proof/{arm}", *small, *few))
        assert summary["stages"][0]["reference_in_loss"] is False
    assert main(["runs/rl_proof"]) == 0
    arms = json.loads(Path("runs/rl_proof/summary.json").read_text())["arms"]
    assert set(arms) == {"executed_open", "auxiliary_ce", "auxiliary_policy"}
    assert all(arm["seeds"] == [2] for arm in arms.values())


def test_kept_runs_give_the_same_summary_and_say_how_to_make_them_again(tmp_path, capsys):
    runs, results = tmp_path / "runs", tmp_path / "results"
    write_run(runs, "start/1", 1, 0.2)
    write_run(runs, "open/1", 1, 0.9)
    job = {"overrides": {"seed": "1", "experiment": "proof/other", "k": "2"}, "error": None}
    write_run(runs, "closed/1", 1, 0.25)
    (runs / "closed" / "1" / "job.json").write_text(json.dumps(job))
    assert keep_main([str(runs), str(results)]) == 0
    assert aggregate(read_runs(results)) == aggregate(read_runs(runs))
    assert json.loads((results / "summary.json").read_text()) == aggregate(read_runs(runs))
    config = (runs / "open" / "1" / "config.yaml").read_text()
    assert (results / "open" / "1" / "config.yaml").read_text() == config, "nothing lists overrides"
    assert not (results / "open" / "1" / "run.yaml").exists()
    described = yaml.safe_load((results / "closed" / "1" / "run.yaml").read_text())
    assert described["overrides"] == ["experiment=proof/other", "k=2"]
    job["settings"] = job["overrides"] | {"stages.rl.steps": "3"}
    (runs / "closed" / "1" / "job.json").write_text(json.dumps(job))
    assert keep_main([str(runs), str(results)]) == 0
    described = yaml.safe_load((results / "closed" / "1" / "run.yaml").read_text())
    assert described["overrides"] == ["experiment=proof/other", "k=2", "stages.rl.steps=3"]
    assert keep_main([str(results), str(tmp_path / "again")]) == 2
    assert "must be a run's folder with its config.yaml" in capsys.readouterr().err
