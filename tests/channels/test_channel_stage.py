"""Runs with a comparator: train, evaluate, save, load, resume; what has no effect is refused."""

import json
import shutil

import pytest
from helpers import ROOT
from hydra import compose, initialize_config_dir

from mtp.channels import WriteOptions
from mtp.channels.saving import load_channel
from mtp.channels.table import measure
from mtp.cli.hydra import register_configs
from mtp.cli.main import main
from mtp.config import save_run_config, to_run_config
from mtp.reports.json_lines import read_records
from mtp.tasks.graph_search import GraphSearch
from mtp.trainer import train

TINY = [
    "stages.main.steps=4",
    "stages.main.examples.batch_size=4",
    "stages.main.evaluate_every=2",
    "evaluation.num_problems=8",
    "evaluation.num_interim_problems=4",
    "logger.log_every=1",
    "fabric.accelerator=cpu",
    "fabric.num_threads=1",
    "decoding.max_new_tokens=16",
    "model.config.n_embd=32",
    "model.config.n_inner=48",
    "head.hidden_size=16",
    "head.intermediate_size=24",
]
GRAPH = ["task.min_steps=2", "task.max_steps=2"]
SMALL = {
    **dict.fromkeys(["token_message", "block_message"], ["task.num_nodes=7"]),
    "latent": [*GRAPH, "channel.options.text_steps=1", "channel.options.level_steps=1"],
    "kv": ["task.num_nodes=7", "channel.options.text_steps=2"],
    "vector_memory": [
        "task.num_nodes=7", "channel.options.text_steps=2", "decoding.max_new_tokens=40",
    ],
    "no_memory": [
        "task.num_nodes=7", "channel.options.text_steps=0", "decoding.max_new_tokens=40",
    ],
}  # fmt: skip
"""Settings of the experiments that are not on graph search, or have a curriculum."""


def config(run_dir, name, *overrides):
    register_configs()
    small = SMALL.get(name, GRAPH)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        chosen = [f"experiment=channels/{name}", *TINY, *small, f"run_dir={run_dir}", *overrides]
        return to_run_config(compose("train", chosen))


def weights(folder):
    model, _, channel = load_channel(folder)
    return {**model.state_dict(), **{f"channel.{k}": v for k, v in channel.state_dict().items()}}


def weight_of(model, *_, **__):
    """In place of the reader's measures: which model would be read."""
    return {"reader_nats": sum(p.double().sum().item() for p in model.parameters())}


RL = ["stages.rl.steps=2", "stages.rl.rollouts.num_prompts=2", "stages.rl.rollouts.group_size=4"]


def test_commands_refuse_main_without_its_channel(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    save_run_config(config(folder, "soft"), folder / "config.yaml")
    commands = (
        ["evaluate"],
        ["export"],
        ["generate"],
        ["chat"],
        ["evaluate", "--measure", "thought"],
    )
    for command, *more in commands:
        given = [str(tmp_path / "out")] if command == "export" else ["x"] * (command == "generate")
        assert main([command, str(folder), *given, *more]) == 2
        error = capsys.readouterr().err
        assert "channel.name=soft" in error and "load_channel" in error, command
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["soft", "multiplex", "no_thought", "gated", *sorted(SMALL)])
def test_a_run_trains_and_its_checkpoint_writes_the_same_again(name, tmp_path, capsys):
    more = RL if name == "gated" else []
    run = config(tmp_path / "run", name, *more)
    summary = train(run)
    first = capsys.readouterr().out.splitlines()[0]
    assert f"channel {run.channel.name} with" in first and "head" not in first
    last = summary["stages"][-1]
    assert last["steps"] == (2 if name == "gated" else 4)
    assert 0 <= last["accuracy"] <= 1 and len(last["accuracy_by_budget"]) == 4
    folder = tmp_path / "run" / "stages" / last["name"]
    assert summary["export"] == str(folder)
    assert not (tmp_path / "run" / "export").exists()  # other tools would drop the channel
    model, fmt, channel = load_channel(folder)
    assert vars(channel.options) == json.loads((folder / "channel.json").read_text())["options"]
    task = run.task.build()
    examples = [task.example("test", i) for i in range(8)]
    options = WriteOptions(max_new_tokens=run.decoding.max_new_tokens)
    outputs = channel.write(model, fmt, examples, options)
    right = [w.answer == e.answer for w, e in zip(outputs, examples, strict=True)]
    if not channel.is_random:
        assert sum(right) / 8 == last["accuracy"]
        assert sum(w.passes for w in outputs) / 8 == last["passes"]
    assert train(config(tmp_path / "run", name, *more, "resume=true")) == summary


def test_a_stage_ends_with_all_held_out_sets_and_is_evaluated_on_the_interim_one(
    tmp_path, monkeypatch
):
    accuracies, seen = {"validation": 0.25, "test": 0.5, "unseen": 0.75}, []

    def evaluated(*given, split, num_problems, **limits):
        seen.append((split, num_problems))
        return {"accuracy": accuracies[split], "passes": 2.0, "num_problems": num_problems}

    monkeypatch.setattr("mtp.channels.stage.evaluate_channel", evaluated)
    monkeypatch.setattr("mtp.trainer.check_disjoint", lambda task: None)
    monkeypatch.setattr(GraphSearch, "test_sets", ("test", "unseen"))
    monkeypatch.setattr(GraphSearch, "interim_set", "validation")
    (stage,) = train(config(tmp_path / "run", "soft"))["stages"]
    assert seen == [("validation", 4), ("test", 8), ("unseen", 8)]
    assert stage["accuracy"] == 0.5 and stage["test_sets"]["unseen"]["accuracy"] == 0.75
    names = {"eval/validation/accuracy": 0.25, "eval/accuracy": 0.5, "eval/unseen/accuracy": 0.75}
    found = read_records(tmp_path / "run" / "metrics.jsonl")
    records = [(r["step"], {k: r[k] for k in names if k in r}) for r in found]
    assert [record for record in records if record[1]] == [
        (2, {"eval/validation/accuracy": 0.25}),
        (4, {"eval/accuracy": 0.5, "eval/unseen/accuracy": 0.75}),
    ]


@pytest.mark.parametrize("name", ["latent", "gated", "kv", "vector_memory"])
def test_a_resumed_run_gives_the_same_weights(name, tmp_path):
    """A checkpoint after every step; the second run continues from the third one, after a level of
    the curriculum or within RL.
    """
    more = [*RL, "stages.main.steps=2"] if name == "gated" else ["channel.options.text_steps=2"]
    if name == "latent":
        more += ["channel.options.levels=2"]
    if name == "gated":
        more += ["stages.rl.rollouts.num_prompts=8", "stages.rl.rollouts.group_size=8"]
    run = config(tmp_path / "run", name, *more, "checkpoint_minutes=0")
    last = list(run.active_stages())[-1]
    train(run)
    before = weights(tmp_path / "run" / "stages" / last)
    (tmp_path / "run" / "summary.json").unlink()
    train(config(tmp_path / "run", name, *more, "checkpoint_minutes=0", "resume=step_00000003"))
    after = weights(tmp_path / "run" / "stages" / last)
    assert before.keys() == after.keys()
    differ = {k: float((before[k] - after[k]).abs().max()) for k in before}
    assert not {key: value for key, value in differ.items() if value}


def test_the_table_reads_thoughts_before_and_after_rl(tmp_path, monkeypatch):
    runs = {"token": [], "soft": [], "soft_rl": RL, "other_soft": ["seed=2"]}
    for name, more in runs.items():
        train(config(tmp_path / name, "token" if name == "token" else "soft", *more))
    trained = tmp_path / "soft_rl" / "stages" / "rl"  # two steps may find nothing to learn from
    shutil.rmtree(trained)
    shutil.copytree(tmp_path / "other_soft" / "stages" / "main", trained)
    monkeypatch.setattr("mtp.channels.measure.measure_reader", weight_of)
    soft, both, other = (
        measure(tmp_path / name, 4, 2, tmp_path / "token")
        for name in ("soft", "soft_rl", "other_soft")
    )
    assert both["reader_nats_before_rl"] == soft["reader_nats"] != other["reader_nats"]
    assert both["reader_nats"] == other["reader_nats"]
    assert both["accuracy_before_rl"] == soft["accuracy"]
    assert not [key for key in soft if key.endswith("_before_rl")]


@pytest.mark.parametrize("name", ["latent", "kv", "vector_memory"])
def test_a_dry_run_sees_every_level_of_a_curriculum(name, tmp_path, capsys):
    """The steps of the levels are those of a whole run, which a dry run does not reach."""
    steps = {"channel.options.text_steps": 300, "stages.main.steps": 900}
    if name == "latent":
        steps["channel.options.level_steps"] = 200
    given = [f"{key}={value}" for key, value in steps.items()]
    (stage,) = train(config(tmp_path / "run", name, *given, "dry_run=true"))["stages"]
    assert stage["steps"] == 6
    assert "a full run would take about" in capsys.readouterr().out
    with pytest.raises(ValueError, match="text_steps must be of type int, got 'many'"):
        train(config(tmp_path / "run", name, "channel.options.text_steps=many", "dry_run=true"))


@pytest.mark.parametrize(
    ("name", "override", "error"),
    [
        ("soft", "+channel.options.nois=1", "channel.options.nois is not known; .* noise"),
        ("soft", "channel.options.noise=0.0", "channel.options.noise must be above 0"),
        ("multiplex", "channel.options.num_tokens=0", "num_tokens must be at least 1"),
        ("multiplex", "channel.options.num_tokens=2.5", "num_tokens must be of type int"),
        ("soft", "channel.name=sof", "channel.name must be one of token, block, soft"),
        ("soft", "channel.name=block", "channel.name must be text for an ordinary run"),
        ("soft", "stages.main.train_head=true", "train_head"),
        ("soft", "stages.main.gradient_checkpointing=true", "a comparator does not read it"),
        ("soft", "stages.main.micro_batch_size=2", "a comparator does not read it"),
        ("soft", "stages.main.logits_detach=true", "logits_detach must be left at False"),
        ("soft", "stages.main.objective.main_ce.weight=0.5", "weight must be 1 with"),
        ("gated", "stages.rl.objective.policy.weight=2", "weight must be 1 with"),
        ("gated", "stages.rl.objective.policy.algorithm=rloo", "algorithm must be left out"),
        ("soft", "fabric.precision=bf16-mixed", "one process with precision 32-true"),
        ("soft", "decoding.top_k=3", "decoding.top_k"),
        ("soft", "decoding=plain", "decoding.phases must be a thought and an answer"),
        ("token", "+channel.options.noise=1", "channel.options must be empty"),
        ("latent", "stages.rl.steps=2", "no log-probability"),
        ("vector_memory", "decoding.segments.max_segments=1", "max_segments must be above 1"),
        ("latent", "channel.options.level_steps=4", "steps must be above 5, .* begins, got 4"),
        ("kv", "channel.options.text_steps=4", "steps must be above 4, where the last level"),
        ("vector_memory", "channel.options.text_steps=9", "steps must be above 9, where"),
        ("kv", "task.split=false", "column 'shared', which the sharer reads"),
        ("vector_memory", "decoding.segments.recent_tokens=3", "recent_tokens must be 0"),
    ],
)
def test_settings_without_an_effect_are_refused(name, override, error, tmp_path):
    with pytest.raises(ValueError, match=error):
        train(config(tmp_path / "run", name, override))
