"""Result of a search on screen: the chosen text by its passes, then all scores and answers."""

from dataclasses import replace

import torch
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from ..modeling.branches import SearchConfig
from ..modeling.decode_options import DecodableModel, DecodeOptions
from ..modeling.phases import PhasePlan
from ..modeling.records import Block
from ..modeling.search import search
from ..rollouts.prompt_format import PromptFormat
from .streaming import STYLES, LiveText


def write_found(
    console: Console,
    model: DecodableModel,
    fmt: PromptFormat,
    prompt: list[int],
    plan: PhasePlan,
    options: DecodeOptions,
    config: SearchConfig,
    *,
    mode: str,
) -> list[int]:
    """Search for a completion of one prompt and print it, with the scores and answers of all texts.

    Returns the chosen ids.
    """
    device = next(model.parameters()).device
    found = search(
        model,
        torch.tensor([prompt], device=device),
        torch.tensor([len(prompt)], device=device),
        plan,
        replace(options, pad_id=fmt.pad_id),
        config,
        answer_of=fmt.answer_text,
    )
    (chosen,), (texts,) = found.chosen, found.texts
    live = LiveText(console, fmt.tokenizer)
    for branch in chosen.path()[1:]:
        block = Block(
            rows=torch.tensor([0]),
            tokens=torch.tensor([branch.tokens]),
            slots=torch.tensor([branch.slots]),
            accepted=torch.tensor([branch.accepted]),
            logprobs=torch.tensor([branch.logprobs]),
            lengths=torch.tensor([len(branch.tokens)]),
        )
        live(block)
    console.print(live.pieces.pending())
    if console.is_terminal:
        legend = [(f"{who} ", style) for who, style in STYLES.items() if who in live.emitters]
        console.print(Text.assemble(*legend))
    for branch in texts:
        answer = fmt.answer_text(branch.text())
        shown = "no answer" if answer is None else escape(answer)
        mark = "*" if branch is chosen else " "
        console.print(f"{mark} {branch.score:8.4f}  {shown}", style="dim", highlight=False)
    console.print(
        f"{mode}, {config.method}: {len(texts)} texts, {int(found.passes[0])} passes, "
        f"{int(found.tokens_read[0])} tokens read",
        style="dim",
    )
    return live.ids
