"""The measures and the table, by hand-worked outputs of a scripted channel."""

import itertools
import json

import pytest
import torch
from helpers import ROOT
from scripted import Scripted

from mtp.channels import build_channel
from mtp.channels.cells import ROWS, TASKS, plan
from mtp.channels.channel import WriteOptions, Written
from mtp.channels.equal_flops import add_equal_flops
from mtp.channels.measure import (
    evaluate_channel,
    measure_attempts,
)
from mtp.channels.table import (
    accuracy_at_steps,
    markdown,
    write_plots,
    write_table,
)
from mtp.modeling.sampler import Sampler
from mtp.tasks.graph_search import GraphSearchConfig

TASK = GraphSearchConfig().build()
LIMITS = {"batch_size": 64, "max_new_tokens": 8}


def test_an_answer_after_too_long_a_thought_is_wrong():
    """Four problems: right after 2, 6 and 9 passes of thought, and wrong after 1."""
    thought = [2, 6, 9, 1]

    def script(i, example, seed):
        return Written("?" if i == 3 else example.answer, thought[i] + 2, thought[i], "")

    found = evaluate_channel(
        None, None, Scripted(script), TASK, num_problems=4, budgets=(1, 2, 8, 16), **LIMITS
    )
    assert found["accuracy"] == 0.75
    # A whole number would be a command's exit code.
    always = Scripted(lambda i, example, seed: Written(example.answer, 1, 1, ""))
    found_always = evaluate_channel(None, None, always, TASK, num_problems=4, **LIMITS)
    assert found_always["accuracy"] == 1 and type(found_always["accuracy"]) is float
    assert found["accuracy_by_budget"] == [0.0, 0.25, 0.5, 0.75]
    assert found["thought_passes"] == 4.5 and found["passes"] == 6.5


def test_problems_are_those_of_the_named_set():
    """The training set in place of the held-out one."""
    seen = []
    asked = Scripted(lambda i, example, seed: seen.append(example) or Written("?", 1, 1, ""))
    evaluate_channel(None, None, asked, TASK, num_problems=2, split="train", **LIMITS)
    assert seen == [TASK.example("train", i) for i in range(2)]


def test_majority_and_best_of_several_attempts():
    """Problem 0 is right in attempts 1 to 3 of 5, problem 1 in attempt 2 only, problem 2 never."""
    right = [{1, 2, 3}, {2}, set()]

    def script(i, example, attempt):
        return Written(example.answer if attempt in right[i] else "?", 1, 1, "")

    found = measure_attempts(
        None, None, Scripted(script), TASK, num_problems=3, num_attempts=5, temperature=1.0,
        **LIMITS,
    )  # fmt: skip
    assert found["mean_accuracy"] == pytest.approx(4 / 15)
    assert found["best_accuracy"] == pytest.approx(2 / 3)
    assert found["majority_accuracy"] == pytest.approx(1 / 3)
    assert found["majority_gain"] == pytest.approx(1 / 3 - 4 / 15)


def test_attempts_without_an_answer_have_no_vote():
    def script(i, example, attempt):
        return Written(example.answer if attempt == 4 else None, 1, 1, "")

    found = measure_attempts(
        None, None, Scripted(script), TASK, num_problems=2, num_attempts=4, temperature=1.0,
        **LIMITS,
    )  # fmt: skip
    assert found["majority_accuracy"] == 1.0
    assert found["mean_accuracy"] == 0.25


def test_the_plan_has_every_row_of_every_task_and_the_first_seed_first(tmp_path):
    cells = plan(ROWS, TASKS, [1, 2], tmp_path, ["stages.main.steps=5"])
    of_task = {name: {c.row for c in cells if c.task == name} for name in TASKS}
    assert of_task["two_models"] == {
        "no_message", "token_message", "block_message_1", "block_message_3", "block_message_5",
        "kv",
    }  # fmt: skip
    assert of_task["segments"] == {"no_memory", "text_memory", "vector_memory"}
    assert of_task["projects"] == {"own_memory", "text_memory_shared", "vector_memory_shared"}
    others = set(ROWS) - of_task["two_models"] - of_task["segments"] - of_task["projects"]
    with_rl = {"token_rl", "block_3_rl", "block_8_rl", "soft_rl", "multiplex_rl", "gated_rl"}
    assert of_task["pointers"] == others
    others -= with_rl
    every = ("running_sum_5", "graph_search")
    assert all(of_task[name] == others for name in every)
    text = {"token", "block_1", "block_2", "block_3", "block_5", "block_8"}
    assert of_task["running_sum_3"] == of_task["running_sum_7"] == text
    llm = {"no_thought", "token", "block_5", "soft", "multiplex"}
    assert of_task["chain_sum"] == llm
    assert len(cells) == 2 * (3 * len(others) + len(with_rl) + 2 * len(text) + len(llm) + 6 + 3 + 3)
    assert len({cell.folder for cell in cells}) == len(cells)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    command = cells[-1].command("resume=auto")
    assert "stages.main.steps=5" in command and "seed=2" in command
    with pytest.raises(ValueError, match="--rows must be of .* got vq"):
        plan(["vq"], TASKS, [1], tmp_path, [])
    with pytest.raises(ValueError, match="of the rows kv, got graph_search; kv has two_models"):
        plan(["kv"], ["graph_search"], [1], tmp_path, [])


def test_rows_hold_means_over_the_seeds_that_are_measured(tmp_path):
    cells = plan(["token", "latent"], ["graph_search"], [1, 2, 3], tmp_path, [])
    base = {"thought_passes": 3, "passes": 5, "sequential_passes": 1, "bytes_per_example": 1000.0}
    base |= {"training_seconds": 2.0, "mean_accuracy": 0.5, "majority_accuracy": 0.5}
    base |= {"best_accuracy": 1.0, "seconds_per_example": 0.001, "message_swap_bits": 2.0}
    base |= {"message_zero_bits": None, "accuracy_at_step": {"5": 0.25, "10": 0.5}}
    base |= {"flops_per_example": 7.0, "training_batch_size": 2, "training_steps": 10}
    for cell, accuracy in ((cells[0], 0.5), (cells[2], 1.0)):  # token, seeds 1 and 2
        cell.folder.mkdir(parents=True)
        at_passes = {n: accuracy / 2 for n in ("4", "8", "16", "32", "64")}
        found = base | {"accuracy": accuracy, "accuracy_at_passes": at_passes}
        (cell.folder / "measured.json").write_text(json.dumps(found))
    (row,) = write_table(cells, tmp_path / "table.json")
    assert (row["channel"], row["task"], row["seeds"]) == ("token", "graph_search", [1, 2])
    assert row["accuracy_by_seed"] == [0.5, 1.0] and row["accuracy"] == 0.75
    assert set(row["accuracy_at_passes"].values()) == {0.375}
    assert row["command"] == "train.py experiment=channels/token"
    assert row["message_swap_bits"] == 2.0 and row["message_zero_bits"] is None
    # Another machine has measured seed 3, and seed 2 again.
    for cell, accuracy in ((cells[2], 0.0), (cells[4], 0.25)):
        cell.folder.mkdir(parents=True, exist_ok=True)
        found = base | {"accuracy": accuracy, "accuracy_at_passes": at_passes}
        (cell.folder / "measured.json").write_text(json.dumps(found))
    (merged,) = write_table([cells[2], cells[4]], tmp_path / "table.json")
    assert merged["seeds"] == [1, 2, 3] and merged["accuracy_by_seed"] == [0.5, 0.0, 0.25]
    assert merged["accuracy"] == 0.25 and list(merged["by_seed"]) == ["1", "2", "3"]
    # Seeds of another command, or without some number, are not averaged with these.
    threads, other = (
        plan(["token"], ["graph_search"], [3], tmp_path / folder, [override])
        for folder, override in (("", "fabric.num_threads=1"), ("few", "stages.main.steps=5"))
    )
    assert write_table(threads, tmp_path / "table.json")[0]["seeds"] == [1, 2, 3]
    (tmp_path / "other.json").write_text((tmp_path / "table.json").read_text())
    other[0].folder.mkdir(parents=True)
    (other[0].folder / "measured.json").write_text(json.dumps(found | {"passes": 6}))
    assert write_table(other, tmp_path / "other.json")[0]["seeds"] == [3]
    found["accuracy_at_passes"] |= {"48": 0.25}
    (cells[4].folder / "measured.json").write_text(json.dumps(found))
    assert write_table(threads, tmp_path / "table.json")[0]["seeds"] == [3]
    with pytest.raises(ValueError, match="lacks accuracy_at_passes.48; remove it"):
        write_table([cells[2], cells[4]], tmp_path / "table.json")
    assert "| token | 50.0, 100.0 | 37.5 | 37.5 | 37.5 | 37.5 | 3.0 |" in markdown([row])
    write_plots([row], tmp_path)
    assert (tmp_path / "channels_block_size.png").stat().st_size > 0


def test_a_part_of_the_table_keeps_the_rows_of_the_others_and_has_a_plot_for_each_task(tmp_path):
    kept = ROOT / "docs" / "results" / "channels" / "table.json"
    path = tmp_path / "table.json"
    path.write_text(kept.read_text())
    rows = write_table(plan(["token"], ["graph_search"], [1], tmp_path, []), path)
    assert rows == json.loads(kept.read_text())["rows"] == json.loads(path.read_text())["rows"]
    write_plots(rows, tmp_path)
    made = {file.name for file in tmp_path.glob("*.png")}
    names = [*{row["task"] for row in rows}, "block_size"]
    assert made == {f"channels_{name}.png" for name in names}


def test_accuracy_at_equal_flops_is_that_at_the_cost_of_the_cheapest_row():
    """10 steps at 2 FLOPs are 20: 5 steps at 4, and 4 at 5, between those at 3 and 5; none at 9,
    evaluated at steps 3 and 6. A curriculum of 4 steps at 2 and then 3 has 4 more at step 8.
    """
    row = {"task": "a", "channel": "token", "training_batch_size": 1}
    steps = {"3": 0.3, "5": 0.5, "10": 0.9}
    rows = [
        row | {"training_steps": 10, "flops_per_example": 2, "accuracy_at_step": steps},
        row | {"training_steps": 10, "flops_per_example": 4, "accuracy_at_step": steps},
        row | {"training_steps": 6, "flops_per_example": 9, "accuracy_at_step": {"3": 0, "6": 1}},
        row | {"training_steps": 4, "flops_per_example": 2, "accuracy_at_step": steps},  # with RL
        row | {"training_steps": 10, "flops_per_example": 5, "accuracy_at_step": steps},
        row
        | {
            "training_steps": 10,
            "flops_per_example": 3,
            "flops_per_example_from_step": {"0": 2, "4": 3},
            "accuracy_at_step": {"4": 0.0, "8": 0.8, "10": 1.0},
        },
    ]
    control = {"channel": "no_thought", "training_steps": 10, "flops_per_example": 1}
    rows.append(row | control | {"accuracy_at_step": steps})
    add_equal_flops(rows)
    assert [r["accuracy_at_equal_flops"] for r in rows] == pytest.approx(
        [0.9, 0.5, None, None, 0.4, 0.8, 0.9]
    )
    assert [r["training_flops"] for r in rows] == [20, 40, 54, None, 50, 26, 10]


@pytest.mark.parametrize("name", ["token", "block", "soft", "multiplex", "gated", "latent"])
def test_the_log_probability_of_an_answer_after_its_recorded_thought(name, built, task):
    """The answer's log-probability is that of one forward over question, thought and answer."""
    model, fmt = built
    channel = build_channel(name, {}, model)
    with torch.no_grad():  # so that thoughts and answers end after a few passes
        weight = model.lm_head.weight
        weight[fmt.delimiter_id("</think>")] += 0.3
        weight[fmt.eos_id] += 0.3
    options = WriteOptions(sampler=Sampler(), max_new_tokens=24, seed=2)
    examples = [task.example("test", i) for i in range(96)]
    outputs = channel.write(model, fmt, examples, options)
    chosen = [i for i, o in enumerate(outputs) if o.answer and o.vectors is not None]
    assert len(chosen) >= 2
    prompts = [fmt.prompt_ids(examples[i].prompt) for i in chosen]
    thoughts, texts = [outputs[i].vectors for i in chosen], [outputs[i].text for i in chosen]
    problems, outputs = [examples[i] for i in chosen], [outputs[i] for i in chosen]
    together = channel.answer_log_probs(model, fmt, problems, outputs, thoughts)
    embed = model.get_input_embeddings()
    for b, text in enumerate(texts):
        parts = [embed(torch.tensor(prompts[b])), thoughts[b], embed(torch.tensor(text))]
        hidden = model.mtp_decoder(inputs_embeds=torch.cat(parts)[None]).last_hidden_state[0]
        log_p = model.lm_head(hidden).log_softmax(-1)
        first = len(prompts[b]) + len(thoughts[b])
        alone = sum(log_p[first + t - 1, token] for t, token in enumerate(text) if t)
        assert float(together[b]) == pytest.approx(float(alone.detach()), abs=1e-4)


@pytest.mark.parametrize("name", ["token", "soft", "multiplex", "gated"])
def test_attempts_sample_different_thoughts(name, built, task):
    """The seeds of attempts differ for torch's generator, not only as numbers."""
    model, fmt = built
    channel, traces = build_channel(name, {}, model), []
    write = channel.write

    def recorded(*args):
        out = write(*args)
        traces.append([written.trace for written in out])
        return out

    channel.write = recorded
    measure_attempts(
        model, fmt, channel, task, num_problems=4, num_attempts=3, temperature=1.0, **LIMITS
    )
    assert len(traces) == 3
    assert all(a != b for a, b in itertools.combinations(traces, 2))


@pytest.mark.parametrize("name", ["accuracy", "fast_accuracy", "slow_accuracy"])
def test_accuracy_by_step_is_that_of_the_channels_own_mode(name, tmp_path):
    """Runs without a head have a fast accuracy of null in their summary."""
    first = {"name": "main", "slow_accuracy": 0.5, "fast_accuracy": None} | {name: 0.75}
    records = [{"stage": "main", "step": n, f"eval/{name}": n / 8} for n in (2, 4)]
    records += [{"stage": "main", "step": 3, "loss": 1.0}]
    records += [{"stage": "rl", "step": 2, f"eval/{name}": 0.1}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert accuracy_at_steps(tmp_path, {"stages": [first]}) == {"2": 0.25, "4": 0.5}
