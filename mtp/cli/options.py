"""Options of the command `mtp` that say how text is drawn and searched for.

Heavy imports wait until a command runs, as in `cli.py`.
"""

import argparse
from typing import TYPE_CHECKING

from ..common.bounds import check_number

if TYPE_CHECKING:
    from ..modeling.branches import SearchConfig
    from ..modeling.sampler import Sampler

DEFAULT_SEED = 1
"""Of sampling."""


BOUNDS: "dict[str, dict[str, float]]" = {
    "seed": {"at_least": 0, "at_most": 2**63 - 1},
    "temperature": {"at_least": 0},
    "top_k": {"at_least": 0},
    "top_p": {"above": 0, "at_most": 1},
    "max_new_tokens": {"at_least": 1},
    "max_thought_tokens": {"at_least": 1},
    "max_segments": {"at_least": 1},
    "num_problems": {"at_least": 1},
    "n": {"at_least": 1},
    "expand": {"at_least": 1},
}
"""Of the options that hold a number, as `bounds` takes them."""


def check_options(arguments: argparse.Namespace) -> None:
    """Raises ValueError naming the first option whose number is out of its bounds."""
    for name, bounds in BOUNDS.items():
        value = getattr(arguments, name, None)
        if value is not None:
            check_number(f"--{name.replace('_', '-')}", value, bounds)


def add_sampling_options(sub: argparse.ArgumentParser) -> None:
    """How tokens are drawn."""
    sub.add_argument(
        "--mode",
        choices=["fast", "slow", "verified"],
        help="fast: each phase in its own mode, fast phases keep all tokens of a pass (the default "
        "where the head is trained); slow: one token a pass; verified: main's own text, the head "
        "proposes and main decides",
    )
    sub.add_argument(
        "--temperature", type=float, metavar="T", help="0: greedy (the default); of a search: 1"
    )
    sub.add_argument("--top-k", type=int, metavar="K", help="default: all tokens")
    sub.add_argument("--top-p", type=float, metavar="P", help="default: all tokens")
    sub.add_argument("--seed", type=int, help=f"of sampling; default: {DEFAULT_SEED}")


def add_writing_options(sub: argparse.ArgumentParser) -> None:
    """Options of the commands that write text."""
    add_sampling_options(sub)
    sub.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="of each segment; default: what the model was trained with",
    )
    sub.add_argument(
        "--max-thought-tokens", type=int, metavar="N", help="close the first phase after N tokens"
    )
    sub.add_argument(
        "--max-segments", type=int, metavar="N", help="default: what the model was trained with"
    )


def add_search_options(sub: argparse.ArgumentParser, *of_search: str) -> None:
    """Options of a search; those of the command that make sense with one only are `of_search`."""
    sub.set_defaults(of_search=("n", "expand", "choose", *of_search))
    sub.add_argument(
        "--search",
        choices=["best_of_n", "beam", "mcts"],
        help="sample several texts, keep a beam of branches at pass boundaries, or grow a tree of "
        "passes",
    )
    sub.add_argument(
        "--n", type=int, metavar="N", help="texts, branches of the beam, or simulations; default: 8"
    )
    sub.add_argument(
        "--expand", type=int, metavar="E", help="blocks drawn of a pass (beam, mcts); default: 4"
    )
    sub.add_argument(
        "--choose",
        choices=["score", "majority"],
        help="take the best text (the default), or the most frequent final answer",
    )


def search_config(arguments: argparse.Namespace) -> "SearchConfig | None":
    """The search that a command was asked for, None without one.

    Raises ValueError for options that make sense with a search only.
    """
    names = getattr(arguments, "of_search", ())
    given = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if getattr(arguments, "search", None) is None:
        if given:
            raise ValueError(f"--{next(iter(given)).replace('_', '-')} is an option of --search")
        return None
    from ..modeling.branches import SearchConfig

    settings = {name: given[name] for name in ("n", "expand", "choose") if name in given}
    return SearchConfig(method=arguments.search, **settings)


def make_sampler(arguments: argparse.Namespace, config: "SearchConfig | None") -> "Sampler":
    """The sampler that a command was asked for. Raises ValueError if its search cannot use it."""
    from ..modeling.sampler import Sampler

    names = ("temperature", "top_k", "top_p")
    given = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    sampler = Sampler(**{"temperature": 0.0 if config is None else 1.0, **given})
    if config is not None:
        config.check(sampler, None, lambda ids: None)
    return sampler
