"""Graph search: the answer is reachable, the other candidate is not, and a thought is its path."""

import pytest

from mtp.tasks.base import check_disjoint
from mtp.tasks.graph_search import GraphSearchConfig


def reachable(edges: list[str], root: str) -> set[str]:
    found = {root}
    while True:
        more = {child for parent, child in edges if parent in found} - found
        if not more:
            return found
        found |= more


def test_one_candidate_is_reachable_and_the_thought_is_the_path_to_it():
    task = GraphSearchConfig(min_steps=2, max_steps=5, width=3).build()
    depths = set()
    for index in range(200):
        example = task.example("train", index)
        graph, question = example.prompt.removesuffix("=").split("?")
        root, candidates = question.split(":")
        edges = graph.split(",")
        found = reachable(edges, root)
        assert [c for c in candidates if c in found] == [example.answer]
        steps = example.thought.split(";")
        nodes = [root, *(step[1] for step in steps)]
        assert steps == [a + b for a, b in zip(nodes, nodes[1:], strict=False)]
        assert set(steps) <= set(edges) and nodes[-1] == example.answer
        depths.add(len(steps))
        layers = example.columns["layers"]
        assert {node for layer in layers for node in layer} | {root} == found
        assert all(node in layer for node, layer in zip(nodes[1:], layers, strict=True))
    assert depths == {2, 3, 4, 5}


def test_parents_and_layers_are_the_same_graph_as_edges_and_a_path():
    """Forms of one problem: `prompt` and `thought` change its text, and not what is asked."""
    settings = {"min_steps": 3, "max_steps": 3}
    by_edges = GraphSearchConfig(**settings).build()
    task = GraphSearchConfig(prompt="parents", thought="layers", **settings).build()
    for index in range(50):
        example = task.example("train", index)
        graph, question = example.prompt.removesuffix("=").split("?")
        assert len(graph) == 14 and graph.count("-") == 2
        edges = {up + node for up, node in zip(graph, "abcdefghijklmn", strict=True) if up != "-"}
        root, candidates = question.split(":")
        found = reachable(sorted(edges), root)
        assert [c for c in candidates if c in found] == [example.answer]
        layers = example.thought.split(";")
        assert layers == example.columns["layers"]
        assert set("".join(layers)) | {root} == found
        for before, layer in zip([root, *layers], layers, strict=False):
            assert sorted(layer) == sorted(c for up, c in edges if up in before)
    with_edges = by_edges.example("test", 3)
    assert by_edges.steps(with_edges, with_edges.thought)[2].is_true


def test_layers_of_a_thought_are_checked_against_the_graph():
    task = GraphSearchConfig(min_steps=3, max_steps=3, prompt="parents", thought="layers").build()
    example = task.example("test", 0)
    first, second, third = example.thought.split(";")
    swapped = ";".join([first[::-1], second[::-1], third])
    assert [s.is_true for s in task.steps(example, swapped)] == [True] * 3
    thought = ";".join([first, second[0], third])
    assert [s.is_true for s in task.steps(example, thought)][:2] == [True, False]
    assert [s.is_true for s in task.steps(example, f"{first};{second}{first}")] == [True, False]
    assert task.steps(example, "")[0].is_true is False


def test_inner_layers_leave_the_last_step_of_the_search_to_the_answer():
    settings = {"min_steps": 3, "max_steps": 3, "prompt": "parents"}
    whole = GraphSearchConfig(thought="layers", **settings).build()
    task = GraphSearchConfig(thought="inner_layers", **settings).build()
    for index in range(20):
        example, longer = task.example("train", index), whole.example("train", index)
        first, second, third = longer.thought.split(";")
        assert (example.prompt, example.answer) == (longer.prompt, longer.answer)
        assert example.thought == f"{first};{second}"
        assert example.columns["layers"] == [first, second]
        assert [s.is_true for s in task.steps(example, example.thought)] == [True, True]
        assert not task.steps(example, f"{first};{third}")[1].is_true


def test_inner_layers_of_a_search_of_one_step_are_refused():
    with pytest.raises(ValueError, match="thought=inner_layers needs problems of at least two"):
        GraphSearchConfig(thought="inner_layers", min_train_steps=1).build()


def test_short_problems_are_in_the_training_split_only():
    task = GraphSearchConfig(min_steps=3, max_steps=3, min_train_steps=1).build()
    lengths = {
        split: {len(task.example(split, i).columns["layers"]) for i in range(50)}
        for split in ("train", "test")
    }
    assert lengths == {"train": {1, 2, 3}, "test": {3}}


def test_both_trees_have_one_shape_so_degree_and_position_do_not_give_the_answer_away():
    task = GraphSearchConfig().build()
    first = 0
    for index in range(400):
        example = task.example("train", index)
        graph, question = example.prompt.removesuffix("=").split("?")
        edges, candidates = graph.split(","), question[2:]
        assert all(sum(edge[1] == c for edge in edges) == 1 for c in candidates)
        assert not any(edge[0] in candidates for edge in edges)
        first += candidates[0] == example.answer
    assert 160 <= first <= 240  # 3 standard deviations are 30


def test_steps_of_a_thought_are_checked_against_the_graph():
    task = GraphSearchConfig(min_steps=3, max_steps=3).build()
    example = task.example("test", 0)
    steps = example.thought.split(";")
    assert [s.is_true for s in task.steps(example, example.thought)] == [True] * 3
    edges = example.prompt.split("?")[0].split(",")
    elsewhere = next(edge for edge in edges if edge[0] not in steps[0] and edge != steps[1])
    thought = ";".join([steps[0], elsewhere, "zz"])
    found = task.steps(example, thought)
    assert [s.is_true for s in found] == [True, False, False]
    assert [s.expected for s in found] == steps
    assert task.steps(example, "")[0].is_true is False


def test_splits_are_disjoint_and_repeatable():
    task = GraphSearchConfig().build()
    check_disjoint(task, 512)
    again = GraphSearchConfig().build()
    assert task.example("test", 7) == again.example("test", 7)
    assert task.example("test", 7) != task.example("test", 8)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"min_steps": 5, "max_steps": 4}, "task.min_steps must be at most task.max_steps=4"),
        ({"min_train_steps": 5}, "task.min_train_steps must be at most task.max_steps=4, got 5"),
        ({"prompt": "matrix"}, "task.prompt must be edges or parents, got 'matrix'"),
        ({"thought": "tree"}, "task.thought must be path, layers or inner_layers, got 'tree'"),
        ({"width": 5, "max_steps": 6}, "need 62 nodes, but only 52 letters"),
        ({"min_steps": 1, "max_steps": 1, "width": 1}, "leave too few questions to split"),
    ],
)
def test_impossible_settings_are_refused(settings, error):
    with pytest.raises(ValueError, match=error):
        GraphSearchConfig(**settings).build()
