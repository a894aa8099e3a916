"""Pointer chasing: follow the pointers of a table from a node, for a number of hops.

    prompt   `caeb...?b3=`    the next node of a, b, c, ... in this order; the node and hops left
    thought  `ba2;ac1;ce0`    the edges, each with the hops left after it
    answer   `e`              the last node

With `split: true` there are two tables, and hops read one and the other in turn. The prompt has the
first table and the node; the second is the example's column `shared`, for another model to read
(`mtp/channels/two_models.py`). Neither half alone has the answer. This is the two-party form of
the problem in communication complexity (Papadimitriou & Sipser 1984, Nisan & Wigderson 1993). The
hops left are not written then: they matter where a thought has several segments, which do not read
each other.

A table is one random cycle through all nodes, so a hop never stays at its node and all last nodes
are equally likely. The hash of a prompt decides its split, so the splits are disjoint by
construction.
"""

import hashlib
import math
import random
import string
from dataclasses import dataclass

from ..common.bounds import bounded
from .base import Example, Split, Step, Task, TaskConfig, steps_between

SHARED = "shared"
"""Column of the table that another model reads."""
_TEST_SHARE = 16
"""One prompt in this many is a test prompt."""


@dataclass(kw_only=True)
class PointerChasingConfig(TaskConfig):
    """Settings for `task=pointer_chasing`."""

    num_nodes: int = bounded(16, at_least=2, at_most=26)
    """Number of nodes of a table."""
    hops: int = bounded(2, at_least=1, at_most=9)
    """Number of hops from the first node to the answer."""
    split: bool = False
    """Two tables, read in turn, of which the prompt has the first only."""
    num_train: int = bounded(0, at_least=0)
    """Number of training problems, which repeat every epoch; 0: no limit."""
    seed: int = bounded(0, at_least=0, at_most=2**63 - 1)
    """Seed of the examples; the splits do not depend on it."""

    def build(self) -> "PointerChasing":
        if self.split and self.hops < 2:
            raise ValueError(
                f"task.hops must be at least 2 with task.split=true, got {self.hops}; one hop "
                "reads the prompt's table only"
            )
        if math.factorial(self.num_nodes) < 64 * _TEST_SHARE:
            raise ValueError(
                f"task.num_nodes={self.num_nodes} leaves too few prompts to split; raise it to 7"
            )
        return PointerChasing(self)


class PointerChasing(Task):
    """Pointers in one table or in two, see the module."""

    name = "pointer_chasing"

    def __init__(self, config: PointerChasingConfig):
        self.config = config
        self.nodes = string.ascii_lowercase[: config.num_nodes]
        self.alphabet = self.nodes + string.digits + ";?="
        """Characters of prompts, thoughts and answers."""

    def size(self, split: Split) -> int | None:
        return self.config.num_train or None if split == "train" else None

    def example(self, split: Split, index: int) -> Example:
        rng = random.Random(f"{self.config.seed}/{split}/{index}")
        while True:
            example = self._sample(rng)
            bucket = hashlib.sha256(example.prompt.encode()).digest()[0] % _TEST_SHARE
            if (bucket == 0) == (split == "test"):
                return example

    def _sample(self, rng: random.Random) -> Example:
        tables = [self._table(rng) for _ in range(1 + self.config.split)]
        first = node = rng.choice(self.nodes)
        steps = []
        for hop in range(self.config.hops):
            node, before = tables[hop % len(tables)][self.nodes.index(node)], node
            steps.append(before + node + self._left(hop + 1))
        columns = {SHARED: tables[1]} if self.config.split else {}
        prompt = f"{tables[0]}?{first}{self._left(0)}="
        return Example(prompt, node, ";".join(steps), columns)

    def _left(self, hops: int) -> str:
        """The hops left after a number of them, as a text shows them."""
        return "" if self.config.split else str(self.config.hops - hops)

    def _table(self, rng: random.Random) -> str:
        """The next node of each node: one cycle through all, in random order."""
        order = rng.sample(self.nodes, len(self.nodes))
        following = dict(zip(order, order[1:] + order[:1], strict=True))
        return "".join(following[node] for node in self.nodes)

    def steps(self, example: Example, thought: str) -> list[Step]:
        """The steps; one is true if it continues the step before it along the tables."""
        table, _, start = example.prompt.removesuffix("=").partition("?")
        tables = [table, example.columns.get(SHARED, table)]
        solved = (example.thought or "").split(";")
        befores = iter(enumerate([start[:1], *thought.split(";")]))

        def is_true(step: str) -> bool:
            hop, before = next(befores)
            node = before[:1] if hop == 0 else before[1:2]
            if not node or node not in self.nodes or hop >= self.config.hops:
                return False
            following = tables[hop % 2][self.nodes.index(node)]
            return step == node + following + self._left(hop + 1)

        def expected(number: int, text: str) -> str | None:
            return solved[number] if number < len(solved) else None

        return steps_between(";", thought, is_true, expected)
