"""Options of the command `mtp` for sampling and search.

Heavy imports wait until a command runs, as in `main.py`.
"""

import argparse
from typing import TYPE_CHECKING

from ..common.bounds import check_number

if TYPE_CHECKING:
    from ..modeling.branches import SearchConfig
    from ..modeling.sampler import Sampler

DEFAULT_SEED = 1
"""Seed of sampling."""


BOUNDS: "dict[str, dict[str, float]]" = {
    "seed": {"at_least": 0, "at_most": 2**63 - 1},
    "temperature": {"at_least": 0},
    "top_k": {"at_least": 0},
    "top_p": {"above": 0, "at_most": 1},
    "max_new_tokens": {"at_least": 1},
    "max_thought_tokens": {"at_least": 1},
    "max_segments": {"at_least": 1},
    "num_problems": {"at_least": 1},
    "others": {"at_least": 1, "at_most": 100_000},
    "n": {"at_least": 1},
    "expand": {"at_least": 1},
}
"""Bounds of the options that hold a number, as `bounds` takes them."""


def check_options(arguments: argparse.Namespace) -> None:
    """Raises ValueError naming the first option whose number is out of its bounds."""
    for name, bounds in BOUNDS.items():
        value = getattr(arguments, name, None)
        if value is not None:
            check_number(f"--{name.replace('_', '-')}", value, bounds)


def add_sampling_options(sub: argparse.ArgumentParser) -> None:
    """Options of sampling."""
    sub.add_argument(
        "--mode",
        choices=["fast", "slow", "verified"],
        help="decoding mode: fast runs each phase in its own mode, and fast phases keep all tokens "
        "of a pass (default if the head is trained); slow gives one token per pass (default "
        "otherwise); verified gives main's own text: the head drafts and main verifies",
    )
    sub.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="sampling temperature, 0: greedy; default: 0; 1 with --search; the run's with "
        "--measure channel",
    )
    sub.add_argument(
        "--top-k", type=int, metavar="K", help="sample from the K likeliest tokens; default: all"
    )
    sub.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the likeliest tokens with total probability P; default: all",
    )
    sub.add_argument("--seed", type=int, help=f"seed of sampling; default: {DEFAULT_SEED}")


def add_writing_options(sub: argparse.ArgumentParser) -> None:
    """Options of the commands that write text."""
    add_sampling_options(sub)
    sub.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="maximum number of new tokens, per segment; default: as the model was trained",
    )
    sub.add_argument(
        "--max-thought-tokens",
        type=int,
        metavar="N",
        help="close the thought, the first phase, after N tokens",
    )
    sub.add_argument(
        "--max-segments",
        type=int,
        metavar="N",
        help="maximum number of segments; default: as the model was trained",
    )


def add_search_options(sub: argparse.ArgumentParser, *of_search: str) -> None:
    """Options of a search; `of_search` are the command's own options that need a search."""
    sub.set_defaults(of_search=("n", "expand", "choose", *of_search))
    sub.add_argument(
        "--search",
        choices=["best_of_n", "beam", "mcts"],
        help="search for the best text: sample several texts, keep a beam of branches at pass "
        "boundaries, or grow a tree of passes",
    )
    sub.add_argument(
        "--n", type=int, metavar="N", help="number of texts, branches or simulations; default: 8"
    )
    sub.add_argument(
        "--expand",
        type=int,
        metavar="E",
        help="number of blocks sampled from each pass (beam, mcts); default: 4",
    )
    sub.add_argument(
        "--choose",
        choices=["score", "majority"],
        help="choose the text with the best score (default), or the most frequent final answer",
    )


def search_config(arguments: argparse.Namespace) -> "SearchConfig | None":
    """Settings of the search, None without --search.

    Raises ValueError for options that require --search.
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
    """The sampler of the options.

    Raises ValueError if the search cannot use it, or one of the options has no effect.
    """
    from ..modeling.sampler import Sampler

    names = ("temperature", "top_k", "top_p")
    given = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    sampler = Sampler(**{"temperature": 0.0 if config is None else 1.0, **given})
    cuts = [name for name in ("top_k", "top_p") if name in given]
    if sampler.temperature == 0 and cuts:
        name = cuts[0].replace("_", "-")
        raise ValueError(
            f"--{name} needs a --temperature above 0, got 0, with which the likeliest token is "
            "taken; add --temperature 1"
        )
    if config is not None:
        config.check(sampler, None, lambda ids: None)
    return sampler
