"""Pointer chasing: follow the pointers of a table from a node, for a number of hops.

    prompt   `caeb...?b3=`    the next node of a, b, c, ... in this order; the node and hops left
    thought  `ba2;ac1;ce0`    the edges, each with the hops left after it
    answer   `e`              the last node

With `thought: nodes` the thought is `a;c`, the nodes between the first and the last.

With `split: true` there are two tables, and hops read one and the other in turn. The prompt has the
first table and the node; the second is the example's column `shared`, for another model to read
(`mtp/channels/two_models.py`). Neither half alone has the answer. This is the two-party form of
the problem in communication complexity (Papadimitriou & Sipser 1984, Nisan & Wigderson 1993). The
hops left are not written then: they matter where a thought has several segments, which do not read
each other.

With `project_size: 4` four problems in a row are a project and share one table. The first prompt
shows it, the later ones show the node alone: `?b3=`. So a later problem needs a memory that has the
table (`decoding.segments.memory_scope`); without one all nodes but the first are equally likely.
The first summary of a solved example notes it: `write table caeb...`.

A table is one random cycle through all nodes, so a hop never stays at its node and all last nodes
are equally likely. The hash of a prompt decides its split, or the hash of its table in a project,
so the splits are disjoint by construction.
"""

import hashlib
import math
import random
import string
from dataclasses import dataclass, replace
from typing import Any

from ..common.bounds import bounded
from .base import Example, Split, Step, Task, TaskConfig, steps_between

SHARED = "shared"
"""Column of the table that another model reads."""
TABLE = "table"
"""Column of a project's table, and the key under which a memory has it."""
_TEST_SHARE = 16
"""One prompt in this many is a test prompt."""


@dataclass(kw_only=True)
class PointerChasingConfig(TaskConfig):
    """Settings for `task=pointer_chasing`."""

    num_nodes: int = bounded(16, at_least=2, at_most=26)
    """Number of nodes of a table."""
    hops: int = bounded(2, at_least=1, at_most=9)
    """Number of hops from the first node to the answer."""
    thought: str = "edges"
    """Solved thought: `edges`, each with the hops left after it, or `nodes`, which every hop but
    the last one reaches, so that the answer takes a hop of its own."""
    split: bool = False
    """Two tables, read in turn, of which the prompt has the first only."""
    project_size: int = bounded(1, at_least=1, at_most=1000)
    """Number of problems that share a table, which only the first of them shows."""
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
        if not self.split and self.hops % self.num_nodes == 0:
            raise ValueError(
                f"task.hops must not be a multiple of task.num_nodes={self.num_nodes}, got "
                f"{self.hops}: a table is one cycle, so the last node would be the first"
            )
        if self.thought not in ("edges", "nodes"):
            raise ValueError(f"task.thought must be edges or nodes, got {self.thought!r}")
        if self.thought == "nodes" and self.hops < 2:
            raise ValueError(
                f"task.hops must be at least 2 with task.thought=nodes, got {self.hops}: a thought "
                "has the nodes before the last"
            )
        if self.project_size > 1:
            self._check_projects()
        if math.factorial(self.num_nodes) < 64 * _TEST_SHARE:
            raise ValueError(
                f"task.num_nodes={self.num_nodes} leaves too few prompts to split; raise it to 7"
            )
        return PointerChasing(self)

    def _check_projects(self) -> None:
        """Raises ValueError for settings of problems that do not fit projects."""
        if self.split:
            raise ValueError(
                f"task.project_size must be 1 with task.split=true, got {self.project_size}: "
                "another model reads the second table of each problem; set one of the two"
            )
        if self.num_train % self.project_size:
            raise ValueError(
                f"task.num_train must be a multiple of task.project_size={self.project_size}, got "
                f"{self.num_train}"
            )
        if math.factorial(self.num_nodes - 1) < 64 * _TEST_SHARE:
            raise ValueError(
                f"task.num_nodes={self.num_nodes} leaves too few tables to split; raise it to 8"
            )


def _is_in(split: Split, text: str) -> bool:
    """True if the hash of a text puts it into the split."""
    bucket = hashlib.sha256(text.encode()).digest()[0] % _TEST_SHARE
    return (bucket == 0) == (split == "test")


class PointerChasing(Task):
    """Pointers in one table or in two, see the module."""

    name = "pointer_chasing"

    def __init__(self, config: PointerChasingConfig):
        self.config, self.project_size = config, config.project_size
        self.nodes = string.ascii_lowercase[: config.num_nodes]
        self.alphabet = self.nodes + string.digits + ";?="
        """Characters of prompts, thoughts and answers."""

    def size(self, split: Split) -> int | None:
        return self.config.num_train or None if split == "train" else None

    def example(self, split: Split, index: int) -> Example:
        if self.project_size > 1:
            return self._of_project(split, *divmod(index, self.project_size))
        rng = random.Random(f"{self.config.seed}/{split}/{index}")
        while True:
            tables = [self._table(rng) for _ in range(1 + self.config.split)]
            example = self._solved(tables, rng.choice(self.nodes))
            if _is_in(split, example.prompt):
                return example

    def _of_project(self, split: Split, number: int, place: int) -> Example:
        """A problem of a project, whose table all of them share."""
        name = f"{split}/{number}"
        rng = random.Random(f"{self.config.seed}/{name}")
        table = self._table(rng)
        while not _is_in(split, table):
            table = self._table(rng)
        start = [rng.choice(self.nodes) for _ in range(place + 1)][-1]
        example = self._solved([table], start)
        project: dict[str, Any] = {"project": name, "place": place, "columns": {TABLE: table}}
        if place == 0:
            return replace(example, note=f"write {TABLE} {table}", **project)
        prompt = example.prompt.removeprefix(table)
        return replace(example, prompt=prompt, memory=f"{TABLE}: {table}", **project)

    def _solved(self, tables: list[str], first: str) -> Example:
        """The problem from a node, and its solution."""
        node = first
        steps = []
        for hop in range(self.config.hops):
            node, before = tables[hop % len(tables)][self.nodes.index(node)], node
            steps.append(self._step(hop, before, node))
        columns = {SHARED: tables[1]} if self.config.split else {}
        prompt = f"{tables[0]}?{first}{self._left(0)}="
        if self.config.thought == "nodes":
            del steps[-1]
        return Example(prompt, node, ";".join(steps), columns)

    def _step(self, hop: int, before: str, node: str) -> str:
        """The step of a hop, as a thought shows it."""
        return node if self.config.thought == "nodes" else before + node + self._left(hop + 1)

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
        table = example.columns.get(TABLE, table)
        tables = [table, example.columns.get(SHARED, table)]
        solved = (example.thought or "").split(";")
        befores = iter(enumerate([start[:1], *thought.split(";")]))

        def is_true(step: str) -> bool:
            hop, before = next(befores)
            in_nodes = self.config.thought == "nodes"
            node = before[:1] if hop == 0 or in_nodes else before[1:2]
            if not node or node not in self.nodes or hop >= self.config.hops - in_nodes:
                return False
            following = tables[hop % 2][self.nodes.index(node)]
            return step == self._step(hop, node, following)

        def expected(number: int, text: str) -> str | None:
            return solved[number] if number < len(solved) else None

        return steps_between(";", thought, is_true, expected)
