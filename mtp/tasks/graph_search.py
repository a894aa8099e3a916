"""Search in a small directed graph: which of two nodes can be reached from a root.

    prompt   `ab,cd,bf,ag,de,...?a:ef=`   edges in random order, the root, two candidates
    thought  `ab;bf`                      the edges of the path to the candidate that is reachable
    answer   `f`

The graph consists of two trees of the same shape. The root of one is the question's; each tree has
one of the candidates in its last layer, so neither degree nor depth gives the answer away. A text
must choose the right edge at every branch before it has seen where the branch ends; a vector, or
several tokens at once, can hold all nodes of a layer. ProsQA (Hao et al., arXiv 2412.06769) has
this form in English sentences; the generator here is our own.

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
    width: int = bounded(2, at_least=1, at_most=25)
    """Number of nodes in each layer of a tree but the first, which is the root."""
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
        self.alphabet = self.nodes + ",;?:="
        """Characters of prompts, thoughts and answers."""

    def size(self, split: Split) -> int | None:
        return self.config.num_train or None if split == "train" else None

    def example(self, split: Split, index: int) -> Example:
        """The example; its column `layers` has the nodes of each layer below the root."""
        rng = random.Random(f"{self.config.seed}/{split}/{index}")
        while True:
            example = self._sample(rng)
            bucket = hashlib.sha256(example.prompt.encode()).digest()[0] % _TEST_SHARE
            if (bucket == 0) == (split == "test"):
                return example

    def _sample(self, rng: random.Random) -> Example:
        config = self.config
        steps = rng.randint(config.min_steps, config.max_steps)
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
        path, node = [], answer
        while node in parents:
            path.append(parents[node] + node)
            node = parents[node]
        prompt = f"{','.join(edges)}?{names[0]}:{''.join(candidates)}="
        return Example(prompt, answer, ";".join(reversed(path)), {"layers": layers})

    def steps(self, example: Example, thought: str) -> list[Step]:
        """The steps; one is true if it is an edge that continues the path from the root."""
        graph, _, question = example.prompt.partition("?")
        edges, root = set(graph.split(",")), question[:1]
        solved = (example.thought or "").split(";")
        ends = [root, *(step[-1:] for step in thought.split(";"))]
        starts = iter(ends)

        def is_true(step: str) -> bool:
            start = next(starts)
            return step in edges and step[0] == start

        def expected(number: int, text: str) -> str | None:
            return solved[number] if number < len(solved) else None

        return steps_between(";", thought, is_true, expected)


def _tree(names: list[str], width: int, rng: random.Random) -> dict[str, str]:
    """The parent of each node but the first, the root: a random one of the layer above."""
    parents: dict[str, str] = {}
    above = names[:1]
    for first in range(1, len(names), width):
        layer = names[first : first + width]
        parents |= {node: rng.choice(above) for node in layer}
        above = layer
    return parents
