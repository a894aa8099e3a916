"""Search in a small directed graph: which of two nodes can be reached from a root.

    prompt   `ab,cd,bf,ag,de,...?a:ef=`   edges in random order, the root, two candidates
             `-a-cd...?a:ef=`             or with `prompt: parents`, the parent of a, b, c, ...
    thought  `ab;bf`                      the edges of the path to the candidate that is reachable
             `bc;fg`                      or with `thought: layers`, the nodes of each layer
             `bc`                         or with `thought: inner_layers`, without the last layer
    answer   `f`

The graph consists of two trees of the same shape. The root of one is the question's; each tree has
one of the candidates in its last layer, so neither degree nor depth gives the answer away. A path
must choose the right edge at every branch before it has seen where the branch ends. Layers need no
such choice, but more tokens; a vector can hold all nodes of a layer. ProsQA (Hao et al., arXiv
2412.06769) has this form in English sentences; the generator here is our own.

The hash of a question decides its split, so the splits are disjoint by construction.
"""

import hashlib
import random
import string
from dataclasses import dataclass

from ..common.bounds import bounded
from .base import Example, Split, Step, Task, TaskConfig, steps_between

_TEST_SHARE = 16
"""One question in this many is a test question."""
_NODES = string.ascii_letters


@dataclass(kw_only=True)
class GraphSearchConfig(TaskConfig):
    """Settings for `task=graph_search`."""

    min_steps: int = bounded(3, at_least=1, at_most=25)
    """Smallest number of edges from the root to the answer."""
    max_steps: int = bounded(4, at_least=1, at_most=25)
    """Largest number of edges from the root to the answer; sampled uniformly between the two."""
    min_train_steps: int = bounded(0, at_least=0, at_most=25)
    """Smallest number of edges in training problems, where short ones teach the first edge; 0: as
    min_steps."""
    width: int = bounded(2, at_least=1, at_most=25)
    """Number of nodes in each layer of a tree but the first, which is the root."""
    thought: str = "path"
    """Solved thought: `path`, the edges to the answer; `layers`, the nodes of each layer in random
    order; or `inner_layers`, the same without the last layer, so that the answer takes the last
    step of the search itself."""
    prompt: str = "edges"
    """Form of the graph: `edges` in random order, or `parents`, the parent of each node in the
    order of the nodes' names, `-` for a root. The second needs one lookup for a step of the search,
    and small models learn it with far fewer examples."""
    num_train: int = bounded(0, at_least=0)
    """Number of training problems, which repeat every epoch; 0: no limit."""
    seed: int = bounded(0, at_least=0, at_most=2**63 - 1)
    """Seed of the examples; the splits do not depend on it."""

    def build(self) -> "GraphSearch":
        if self.min_steps > self.max_steps:
            raise ValueError(
                f"task.min_steps must be at most task.max_steps={self.max_steps}, got "
                f"{self.min_steps}"
            )
        if self.min_train_steps > self.max_steps:
            raise ValueError(
                f"task.min_train_steps must be at most task.max_steps={self.max_steps}, got "
                f"{self.min_train_steps}"
            )
        if self.thought not in ("path", "layers", "inner_layers"):
            raise ValueError(
                f"task.thought must be path, layers or inner_layers, got {self.thought!r}"
            )
        if self.thought == "inner_layers" and min(self.min_steps, self.min_train_steps or 25) < 2:
            raise ValueError(
                "task.thought=inner_layers needs problems of at least two edges, or their thought "
                "is empty; raise task.min_steps and task.min_train_steps to 2"
            )
        if self.prompt not in ("edges", "parents"):
            raise ValueError(f"task.prompt must be edges or parents, got {self.prompt!r}")
        nodes = 2 * (1 + self.width * self.max_steps)
        if nodes > len(_NODES):
            raise ValueError(
                f"task.width={self.width} and task.max_steps={self.max_steps} need {nodes} nodes, "
                f"but only {len(_NODES)} letters name nodes; lower one of them"
            )
        if nodes < 6:
            raise ValueError(
                f"task.width={self.width} and task.max_steps={self.max_steps} leave too few "
                "questions to split; raise one of them"
            )
        return GraphSearch(self)


class GraphSearch(Task):
    """Reachability in two trees, see the module."""

    name = "graph_search"

    def __init__(self, config: GraphSearchConfig):
        self.config = config
        self.nodes = _NODES[: 2 * (1 + config.width * config.max_steps)]
        self.alphabet = self.nodes + (",;?:=" if config.prompt == "edges" else "-;?:=")
        """Characters of prompts, thoughts and answers."""

    def size(self, split: Split) -> int | None:
        return self.config.num_train or None if split == "train" else None

    def example(self, split: Split, index: int) -> Example:
        """The example; its column `layers` has the nodes of each layer below the root, without
        the last one if `thought` is inner_layers.
        """
        rng = random.Random(f"{self.config.seed}/{split}/{index}")
        config = self.config
        fewest = (split == "train" and config.min_train_steps) or config.min_steps
        while True:
            example = self._sample(rng, rng.randint(fewest, config.max_steps))
            bucket = hashlib.sha256(example.prompt.encode()).digest()[0] % _TEST_SHARE
            if (bucket == 0) == (split == "test"):
                return example

    def _sample(self, rng: random.Random, steps: int) -> Example:
        config = self.config
        size = 1 + config.width * steps
        names = rng.sample(self.nodes, 2 * size)
        trees = [_tree(names[:size], config.width, rng), _tree(names[size:], config.width, rng)]
        parents = trees[0] | trees[1]
        edges = [parent + child for child, parent in parents.items()]
        rng.shuffle(edges)
        layers = [
            "".join(names[1 + config.width * t : 1 + config.width * (t + 1)]) for t in range(steps)
        ]
        answer = rng.choice(layers[-1])
        candidates = [answer, rng.choice(names[-config.width :])]
        rng.shuffle(candidates)
        path: list[str] = []
        node = answer
        while node in parents:
            path.insert(0, parents[node] + node)
            node = parents[node]
        if config.thought == "inner_layers":
            layers.pop()
        thought = ";".join(path if config.thought == "path" else layers)
        if config.prompt == "edges":
            graph = ",".join(edges)
        else:
            graph = "".join(parents.get(node, "-") for node in self.nodes)
        prompt = f"{graph}?{names[0]}:{''.join(candidates)}="
        return Example(prompt, answer, thought, {"layers": layers})

    def steps(self, example: Example, thought: str) -> list[Step]:
        """The steps of a thought.

        A step of a path is true if it is an edge that continues the path from the root. A layer is
        true if it has the children of the layer before it, each once.
        """
        graph, _, question = example.prompt.partition("?")
        edges, root = self._edges(graph), question[:1]
        solved = (example.thought or "").split(";")
        befores = iter([root, *thought.split(";")])

        def is_true(step: str) -> bool:
            before = next(befores)
            if self.config.thought != "path":
                children = sorted(edge[1] for edge in edges if edge[0] in before)
                return bool(step) and sorted(step) == children
            return step in edges and step[0] == before[-1:]

        def expected(number: int, text: str) -> str | None:
            return solved[number] if number < len(solved) else None

        return steps_between(";", thought, is_true, expected)

    def _edges(self, graph: str) -> set[str]:
        """The edges of a graph in a prompt."""
        if self.config.prompt == "edges":
            return set(graph.split(","))
        return {f"{up}{node}" for up, node in zip(graph, self.nodes, strict=True) if up != "-"}


def _tree(names: list[str], width: int, rng: random.Random) -> dict[str, str]:
    """The parent of each node but the first, the root: a random one of the layer above."""
    parents: dict[str, str] = {}
    above = names[:1]
    for first in range(1, len(names), width):
        layer = names[first : first + width]
        parents |= {node: rng.choice(above) for node in layer}
        above = layer
    return parents
