"""The commands that write text: `mtp generate` and `mtp chat`.

Heavy imports wait until a command runs, as in `main.py`.
"""

import argparse
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .opening import choose_device, open_model
from .options import DEFAULT_SEED, make_sampler, search_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from ..rollouts.prompt_format import PromptFormat

DEFAULT_MAX_NEW_TOKENS = 256
"""Limit if neither the command line nor the folder sets one."""


@dataclass
class Writer:
    """A model that is ready to write, with the options of `mtp generate` or `mtp chat`."""

    console: "Console"
    model: Any
    fmt: "PromptFormat"
    mode: str
    choose_mode: "Callable[[str], str]"
    """See `Opened.choose_mode`."""
    check_length: "Callable[[list[int]], None]"
    """Raises ValueError for prompt ids that leave too few positions for the new tokens."""
    write: "Callable[[list[int], str], list[int]]"
    """(prompt ids, mode) -> completion ids, shown as they are sampled."""


def open_writer(arguments: argparse.Namespace) -> Writer:
    """The model of a writing command. Raises ValueError for settings that it cannot follow."""
    opened = open_model(arguments.folder, arguments.stage)
    mode = opened.choose_mode(arguments.mode)
    config = search_config(arguments)
    if config is not None and (arguments.max_segments or 1) > 1:
        raise ValueError(
            f"a search writes one segment, got --max-segments {arguments.max_segments}; drop it"
        )
    sampler = make_sampler(arguments, config)
    import torch

    from ..modeling.decode_options import DecodeOptions
    from ..modeling.segments import check_segments
    from ..reports.progress import make_console
    from .streaming import write_live
    from .streaming_search import write_found

    device = choose_device(arguments.device)
    model, fmt = opened.load(device)
    limit = arguments.max_new_tokens
    if limit is None and opened.config is not None:
        limit = opened.config.decoding.max_new_tokens
    if limit is None:
        limit = model.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    if arguments.max_segments is not None:
        fmt.segments = replace(fmt.segments, max_segments=arguments.max_segments)
        check_segments(fmt.segments, fmt.phases, "decoding")
    seed = DEFAULT_SEED if arguments.seed is None else arguments.seed
    generator = torch.Generator(device=device).manual_seed(seed)
    options = DecodeOptions(sampler=sampler, max_new_tokens=limit, generator=generator)
    console = make_console()

    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def check_length(prompt: list[int]) -> None:
        if positions is not None and len(prompt) + limit > positions:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and {limit} new ones must fit in the model's "
                f"{positions} positions; shorten the prompt or lower --max-new-tokens"
            )

    def write(prompt: list[int], mode: str) -> list[int]:
        plan = fmt.plan(mode)
        if arguments.max_thought_tokens is not None:
            plan.max_tokens[0] = arguments.max_thought_tokens
        if config is not None:
            return write_found(console, model, fmt, prompt, plan, options, config, mode=mode)
        return write_live(console, model, fmt, prompt, plan, options, mode=mode)

    return Writer(console, model, fmt, mode, opened.choose_mode, check_length, write)


def generate(arguments: argparse.Namespace) -> None:
    """`mtp generate`."""
    writer = open_writer(arguments)
    writer.fmt.check_prompt(arguments.prompt)
    prompt = writer.fmt.prompt_ids(arguments.prompt)
    writer.check_length(prompt)
    style = "dim" if writer.console.is_terminal else ""
    writer.console.print(arguments.prompt, end=" ", style=style, markup=False, emoji=False)
    writer.write(prompt, writer.mode)


def chat(arguments: argparse.Namespace) -> None:
    """`mtp chat`."""
    from .chat import Conversation, typed_lines

    writer = open_writer(arguments)
    conversation = Conversation(
        console=writer.console,
        fmt=writer.fmt,
        write=writer.write,
        mode=writer.mode,
        choose_mode=writer.choose_mode,
        check=writer.fmt.check_prompt,
        check_length=writer.check_length,
    )
    if writer.console.is_terminal:
        conversation.show_help()
        if not writer.fmt.uses_template:
            note = "the tokenizer has no chat template: messages are read without earlier ones"
            writer.console.print(note, style="dim", markup=False)
    conversation.run(typed_lines(writer.console))
