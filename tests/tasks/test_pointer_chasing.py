"""Pointer chasing: thoughts follow the tables, which are single cycles; steps are checked."""

from collections import Counter

import pytest

from mtp.tasks.base import check_disjoint
from mtp.tasks.pointer_chasing import PointerChasingConfig

NODES = "abcdefghijklmnopqrstuvwxyz"


def follow(tables: list[str], node: str, hops: int) -> list[str]:
    """The nodes hop after hop, reading the tables in turn."""
    out = []
    for hop in range(hops):
        node = tables[hop % len(tables)][NODES.index(node)]
        out.append(node)
    return out


@pytest.mark.parametrize("split", [False, True])
def test_a_thought_follows_the_pointers_to_the_answer(split):
    task = PointerChasingConfig(num_nodes=9, hops=5, split=split).build()
    for index in range(100):
        example = task.example("train", index)
        table, question = example.prompt.removesuffix("=").split("?")
        tables = [table, example.columns["shared"]] if split else [table]
        assert ("shared" in example.columns) == split and question[1:] == ("" if split else "5")
        nodes = [question[0], *follow(tables, question[0], 5)]
        edges = [a + b for a, b in zip(nodes, nodes[1:], strict=False)]
        left = [""] * 5 if split else "43210"
        assert example.thought == ";".join(e + n for e, n in zip(edges, left, strict=True))
        assert example.answer == nodes[-1]
        for one in tables:  # one cycle through all nodes
            assert sorted(follow([one], "a", 9)) == list("abcdefghi")


def test_the_prompt_of_a_split_problem_does_not_give_the_answer_away():
    """Each other node is the answer as often, whatever the prompt's table has for its node."""
    task = PointerChasingConfig(num_nodes=8, split=True).build()
    counts = Counter()
    for index in range(1400):
        example = task.example("train", index)
        middle = example.thought[1]
        counts[(NODES.index(example.answer) - NODES.index(middle)) % 8] += 1
    assert counts[0] == 0 and set(counts) == set(range(1, 8))
    assert all(160 <= n <= 240 for n in counts.values())  # 200 expected, 3 deviations are 39


def test_steps_are_checked_against_both_tables():
    task = PointerChasingConfig(hops=3, split=True).build()
    example = task.example("test", 0)
    first, second, third = example.thought.split(";")
    assert [s.is_true for s in task.steps(example, example.thought)] == [True] * 3
    assert [s.expected for s in task.steps(example, example.thought)] == [first, second, third]
    thought = f"{first};{second};{third[0]}{first[0]}"
    assert [s.is_true for s in task.steps(example, thought)] == [True, True, False]
    assert [s.is_true for s in task.steps(example, f"{second};{third}")] == [False, False]
    assert [s.is_true for s in task.steps(example, "")] == [False]


def test_steps_of_one_table_count_down():
    task = PointerChasingConfig(hops=4).build()
    example = task.example("test", 1)
    assert [s.is_true for s in task.steps(example, example.thought)] == [True] * 4
    miscounted = example.thought.replace("2", "1", 1)
    assert [s.is_true for s in task.steps(example, miscounted)] == [True, False, True, True]
    longer = example.thought + ";" + example.thought[:3]
    assert [s.is_true for s in task.steps(example, longer)] == [True] * 4 + [False]


@pytest.mark.parametrize("split", [False, True])
def test_a_thought_of_nodes_leaves_the_last_hop_to_the_answer(split):
    task = PointerChasingConfig(num_nodes=9, hops=4, split=split, thought="nodes").build()
    example = task.example("train", 3)
    table, question = example.prompt.removesuffix("=").split("?")
    tables = [table, example.columns["shared"]] if split else [table]
    first, second, third, last = follow(tables, question[0], 4)
    assert (example.thought, example.answer) == (f"{first};{second};{third}", last)
    assert [s.is_true for s in task.steps(example, example.thought)] == [True] * 3
    assert [s.expected for s in task.steps(example, example.thought)] == [first, second, third]
    longer = f"{example.thought};{last}"
    assert [s.is_true for s in task.steps(example, longer)] == [True] * 3 + [False]
    assert [s.is_true for s in task.steps(example, f"{second};{first}")] == [False, False]


def test_splits_are_disjoint_and_repeatable():
    task = PointerChasingConfig(num_nodes=8, split=True).build()
    check_disjoint(task, 512)
    assert task.example("test", 7) == PointerChasingConfig(num_nodes=8, split=True).build().example(
        "test", 7
    )


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"hops": 1, "split": True}, "task.hops must be at least 2 with task.split=true, got 1"),
        ({"thought": "edge"}, "task.thought must be edges or nodes, got 'edge'"),
        ({"hops": 1, "thought": "nodes"}, "must be at least 2 with task.thought=nodes, got 1"),
        ({"num_nodes": 8, "hops": 8}, "hops must not be a multiple of task.num_nodes=8, got 8"),
        ({"num_nodes": 6}, "task.num_nodes=6 leaves too few prompts to split; raise it to 7"),
    ],
)
def test_impossible_settings_are_refused(settings, error):
    with pytest.raises(ValueError, match=error):
        PointerChasingConfig(**settings).build()
