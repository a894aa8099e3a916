"""Every file of conf/task composes to a task that builds, and its documented lengths hold."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from mtp.cli.hydra import register_configs
from mtp.config import to_run_config
from mtp.tasks.base import check_disjoint
from mtp.tasks.reasoning_gym import ReasoningGymConfig
from mtp.tasks.rows import RowsConfig

CONF = Path(__file__).parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "task").glob("*.yaml"))


def task_config(*overrides: str):
    register_configs()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_run_config(compose("train", list(overrides))).task


@pytest.mark.parametrize("name", NAMES)
def test_every_task_composes_and_builds(name, tmp_path):
    overrides = [f"task={name}"]
    if name == "rows":
        rows = "".join(f'{{"prompt": "{i}+1=", "answer": {i + 1}}}\n' for i in range(40))
        (tmp_path / "rows.jsonl").write_text(rows)
        overrides.append(f"task.source={tmp_path / 'rows.jsonl'}")
    task = task_config(*overrides).build()
    check_disjoint(task, num_train=64)
    example = task.example("test", 0)
    assert task.outcome(example, example.answer) == float(task.has_verifier)


def test_settings_from_the_command_line():
    config = task_config(
        "task=reasoning_gym", "task.dataset=gcd", "task.options={max_value: 50}", "task.num_test=9"
    )
    assert config == ReasoningGymConfig(dataset="gcd", options={"max_value": 50}, num_test=9)
    config = task_config("task=chain_sum", "task.options.max_terms=5")
    assert config.options == {"min_terms": 4, "max_terms": 5, "min_digits": 2, "max_digits": 2}
    config = task_config("task=rows", "task.source=a.jsonl", "task.reward=math")
    assert config == RowsConfig(source="a.jsonl", reward="math")


@pytest.mark.parametrize(("name", "longest"), [("leg_counting", 8), ("chain_sum", 3)])
def test_presets_give_short_thoughts(name, longest):
    task = task_config(f"task={name}").build()
    counts = [len(task.example("test", i).thought.split(";")) for i in range(task.size("test"))]
    assert task.size("test") == 512
    assert max(counts) <= longest
