"""Monte-Carlo tree search whose edges are passes.

A node is a text at a pass boundary. Its pass of main is run once, when the search first reaches it.
E blocks are sampled from that pass, and the distinct ones are its children: the actions of Sampled
MuZero (Hubert et al., arXiv 2104.06303). The prior of a child is the share of the samples that are
equal to it. A simulation descends by PUCT (AlphaZero's rule: Silver et al., arXiv 1712.01815)

    Q(child) + exploration * prior * sqrt(visits(node)) / (1 + visits(child))

to a node whose pass has not been run, runs it, and continues with the first sampled block. It
continues to the end of the text (a rollout, all passes of which stay in the tree), or stops there
if the scoring function accepts open branches. The score of the result is added to all nodes above.
Q is the mean score, scaled to 0..1 by the lowest and the highest score in the tree; a child without
visits has its parent's.

A node is closed when all its texts have been visited, so every simulation finds something new, and
a search ends when its whole tree is closed. Main reads every token of a tree once: keys and values
are kept by node and concatenated along the path where a simulation branches off.

Ships with checkpoints: imports torch and siblings only.
"""

import math
from dataclasses import dataclass, field

import torch

from .branches import Branch, BranchLoop, Parts, Scorer, SearchConfig, SearchRequest, give_scores


@dataclass(eq=False)
class Node:
    """A branch, and the scores of the simulations that passed through it."""

    branch: Branch
    prior: float = 1.0
    children: list["Node"] = field(default_factory=list)
    """Empty until the branch's pass has been run."""
    visits: int = 0
    total: float = 0.0
    """Sum of the scores of its visits."""
    is_closed: bool = False
    """True if all texts below it have been visited."""

    def expand(self, sampled: list[Branch]) -> None:
        """Make the blocks sampled from the branch's pass its children, in the same order."""
        children: dict[tuple[int, ...], Node] = {}
        for branch in sampled:
            child = children.setdefault(tuple(branch.tokens), Node(branch, 0.0))
            child.prior += 1 / len(sampled)
        self.children = list(children.values())


class Tree:
    """The tree of one prompt."""

    def __init__(self, root: Branch):
        self.root = Node(root)
        self.ended: list[Branch] = []
        """Texts that have ended, in the order of their first visit."""
        self.low, self.high = math.inf, -math.inf

    def descend(self, exploration: float) -> list[Node]:
        """Nodes from the root to one whose pass has not been run, or whose text has ended."""
        path = [self.root]
        while path[-1].children:
            node = path[-1]
            children = [child for child in node.children if not child.is_closed]
            path.append(max(children, key=lambda child: self.worth(node, child, exploration)))
        return path

    def worth(self, node: Node, child: Node, exploration: float) -> float:
        """PUCT value of a child."""
        known = child if child.visits else node
        spread = self.high - self.low
        quality = (known.total / known.visits - self.low) / spread if spread else 0.5
        bonus = child.prior * math.sqrt(node.visits) / (1 + child.visits)
        return quality + exploration * bonus

    def back_up(self, path: list[Node]) -> None:
        """Add the score of a path's last branch to all its nodes."""
        end = path[-1].branch
        self.low, self.high = min(self.low, end.score), max(self.high, end.score)
        for node in path:
            node.visits += 1
            node.total += end.score
        if end.is_open:
            return
        self.ended.append(end)
        path[-1].is_closed = True
        for node in reversed(path[:-1]):
            node.is_closed = all(child.is_closed for child in node.children)


@torch.no_grad()
def mcts(request: SearchRequest, config: SearchConfig, scorer: Scorer | None) -> list[list[Branch]]:
    """The ended texts that the simulations reached, by prompt.

    The trees of a batch grow in parallel, one simulation of each at a time. If the scoring function
    scores open branches and no simulation has ended a text, the last one continues to the end, down
    the tree without the exploration bonus.
    """
    trees = [Tree(root) for root in request.roots()]
    parts = Parts()
    for number in range(config.n):
        growing = [tree for tree in trees if not tree.root.is_closed]
        if not growing:
            break
        last = [number == config.n - 1 and not tree.ended for tree in growing]
        paths = [
            tree.descend(0.0 if is_last else config.exploration)
            for tree, is_last in zip(growing, last, strict=True)
        ]
        grow(request, config, parts, paths, [config.rollouts or is_last for is_last in last])
        give_scores(config, scorer, [path[-1].branch for path in paths])
        for tree, path in zip(growing, paths, strict=True):
            tree.back_up(path)
    return [tree.ended for tree in trees]


def grow(
    request: SearchRequest,
    config: SearchConfig,
    parts: Parts,
    paths: list[list[Node]],
    to_end: list[bool],
) -> None:
    """Lengthen each path by one pass, or by all passes to the end of its text."""
    pairs = zip(paths, to_end, strict=True)
    running = [(path, goes_on) for path, goes_on in pairs if path[-1].branch.is_open]
    if not running:
        return
    branches = [path[-1].branch for path, _ in running]
    loop = BranchLoop(request, branches, config.expand, parts)
    while True:
        sampled: dict[Branch | None, list[Branch]] = {}
        for child in loop.step():
            sampled.setdefault(child.parent, []).append(child)
        for path, _ in running:
            path[-1].expand(sampled[path[-1].branch])
            path.append(path[-1].children[0])
        running = [(path, True) for path, more in running if more and path[-1].branch.is_open]
        if not running:
            return
        loop.fork([path[-1].branch for path, _ in running], config.expand)
