"""Text on the screen as it is sampled: by block, coloured by emitter."""

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from ..modeling.decode_options import DecodableModel, DecodeOptions
from ..modeling.memory import Memory
from ..modeling.phases import PhasePlan
from ..modeling.records import FORCED, Block
from ..modeling.segments import decode_segments
from ..rollouts.prompt_format import PromptFormat
from ..rollouts.tokenization import TextPieces

STYLES = {
    "main": "not dim bold yellow",
    "head": "not dim cyan",
    "accepted": "not dim italic green",
    "forced": "not dim underline magenta",
}
"""Style of each emitter; `accepted` is a token that the head proposed and main accepted. Without
colours (NO_COLOR) they still differ."""
SEPARATOR = "|"
"""Text between two passes."""


def emitter(slot: int, accepted: int) -> str:
    """Emitter of a token, as `STYLES` names it."""
    if slot == FORCED:
        return "forced"
    return "head" if slot else "accepted" if accepted else "main"


@dataclass
class LiveText:
    """Prints the blocks of a batch of one, with `|` between passes; styled on a terminal."""

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
        if self.ids:
            shown.append(SEPARATOR, style="dim" if self.console.is_terminal else "")
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
