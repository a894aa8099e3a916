"""Text on the screen as it is sampled: by block, coloured by emitter; and conversations."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from ..modeling.decode_options import DecodableModel, DecodeOptions
from ..modeling.memory import Memory
from ..modeling.phases import MODES, PhasePlan
from ..modeling.records import FORCED, Block
from ..modeling.segments import decode_segments
from ..rollouts.prompt_format import PromptFormat

STYLES = {
    "main": "not dim bold yellow",
    "head": "not dim cyan",
    "accepted": "not dim green",
    "forced": "not dim magenta",
}
"""Colour of each emitter; `accepted` is a token that the head proposed and main accepted."""


def emitter(slot: int, accepted: int) -> str:
    """Emitter of a token, as `STYLES` names it."""
    if slot == FORCED:
        return "forced"
    return "head" if slot else "accepted" if accepted else "main"


class TextPieces:
    """The text that each token adds. Bytes of an unfinished character come with its last one."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.read = self.shown = 0

    def add(self, token: int) -> str:
        """The text that one more token adds."""
        self.ids.append(token)
        piece = self.pending()
        if piece.endswith("�"):
            return ""
        # The tokens before are decoded with it, since some tokenizers drop a text's first space.
        self.read, self.shown = self.shown, len(self.ids)
        return piece

    def pending(self) -> str:
        """Text of the tokens that have not been shown."""
        before = self.tokenizer.decode(self.ids[self.read : self.shown])
        return str(self.tokenizer.decode(self.ids[self.read :]))[len(before) :]


@dataclass
class LiveText:
    """Prints the blocks of a batch of one. Uses colours on a terminal, else separators `|`."""

    console: Console
    tokenizer: Any
    ids: list[int] = field(default_factory=list)
    """Tokens of the segment so far."""
    num_passes: int = 0
    num_tokens: int = 0
    num_segments: int = 1

    def __post_init__(self) -> None:
        self.pieces, self.began = TextPieces(self.tokenizer), time.perf_counter()
        self.emitters: set[str] = set()

    def __call__(self, block: Block) -> None:
        """Print the tokens that a pass added."""
        length = int(block.lengths[0])
        shown = Text()
        if self.ids and not self.console.is_terminal:
            shown.append("|")
        self.num_passes += 1
        columns = [x[0, :length].tolist() for x in (block.tokens, block.slots, block.accepted)]
        for token, slot, accepted in zip(*columns, strict=True):
            self.ids.append(token)
            self.num_tokens += 1
            who = emitter(slot, accepted)
            self.emitters.add(who)
            style = STYLES[who] if self.console.is_terminal else ""
            shown.append(self.pieces.add(token), style=style)
        self.console.print(shown, end="")

    def next_segment(self, trajectory: int, context: list[int], memory: Memory) -> None:
        """End the line, show the memory file and begin a segment."""
        self.console.print(self.pending())
        self.console.print(f"memory: {memory.text or 'empty'}", style="dim", markup=False)
        self.ids, self.pieces = [], TextPieces(self.tokenizer)
        self.num_segments += 1

    def pending(self) -> str:
        """Text of an unfinished character."""
        return self.pieces.pending() if self.pieces.shown < len(self.ids) else ""

    def end(self, mode: str, note: str = "") -> None:
        """End the line and print the speed."""
        seconds = time.perf_counter() - self.began
        self.console.print(self.pending())
        if self.console.is_terminal:
            legend = [(f"{who} ", style) for who, style in STYLES.items() if who in self.emitters]
            self.console.print(Text.assemble(*legend))
        number, passes = self.num_tokens, self.num_passes
        parts = f" and {self.num_segments} segments" if self.num_segments > 1 else ""
        self.console.print(
            f"{mode}: {number} tokens in {passes} passes{parts}, "
            f"{number / passes:.2f} tokens per pass, {number / seconds:.0f} tokens/s{note}",
            style="dim",
        )


def write_live(
    console: Console,
    model: DecodableModel,
    fmt: PromptFormat,
    prompt: list[int],
    plan: PhasePlan,
    options: DecodeOptions,
    *,
    mode: str,
) -> list[int]:
    """Complete one prompt on the screen; returns ids of the completion, or of its last segment."""
    live = LiveText(console, fmt.tokenizer)
    device = next(model.parameters()).device
    out = decode_segments(
        model,
        torch.tensor([prompt], device=device),
        torch.tensor([len(prompt)], device=device),
        plan,
        replace(options, pad_id=fmt.pad_id),
        fmt.segments,
        fmt.tokenizer,
        on_block=live,
        on_segment=live.next_segment,
    )
    live.end(mode, "" if out.out.finished[-1] else f"; cut at {options.max_new_tokens} new tokens")
    return live.ids


HELP = "/mode fast|slow|verified changes the mode, /new forgets the conversation, /quit ends it"


def converse(
    lines: Iterable[str],
    console: Console,
    fmt: PromptFormat,
    write: Callable[[list[int], str], list[int]],
    *,
    mode: str,
    check: Callable[[str], None],
    check_length: Callable[[list[int]], None],
) -> None:
    """A conversation: each line is a message, or a command (`HELP`).

    Args:
        lines: the user's lines.
        console: output.
        fmt: makes prompts of conversations. Thoughts are left out of later prompts.
        write: completes a prompt, (ids, mode) -> completion ids.
        mode: mode at the beginning.
        check: raises ValueError for a message that the model cannot read.
        check_length: raises ValueError for a prompt that is too long for the model.
    """
    messages: list[dict[str, str]] = []
    for line in map(str.strip, lines):
        command, _, value = line.partition(" ")
        if command == "/quit":
            return
        if command == "/new":
            messages = []
        elif command == "/mode" and value in MODES:
            mode = value
        elif command.startswith("/"):
            console.print(HELP, style="dim")
        elif line:
            try:
                check(line)
            except ValueError as error:
                console.print(f"error: {error}", style="red")
                continue
            said = [*messages, {"role": "user", "content": line}]
            prompt = fmt.conversation_ids(said)
            try:
                check_length(prompt)
            except ValueError as error:
                console.print(f"error: {error}, or type /new", style="red")
                continue
            ids = write(prompt, mode)
            answer = fmt.answer_text(ids)
            messages = [*said, {"role": "assistant", "content": answer or ""}]
