"""Two models, each with half of a problem: a sharer, whose message a receiver reads.

The sharer reads one half (the example's column `shared`), the receiver the prompt. The receiver is
the run's main, and the sharer has its architecture and weights of its own. Here messages are text:
the sharer writes its half, by token or by block with its own head, up to `</think>`, and the
receiver reads

    message </think> prompt <think>

and continues by token in all channels. Both models learn from solved text, in one pass each.
`kv.py` passes on the sharer's cache in place of text.

The passes of an output are those of the message, then the receiver's. Passes of the message and of
the receiver's thought are `thought_passes`, so channels are compared at equal latency.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..modeling.decode_options import DecodeOptions
from ..rollouts.legibility import thought_passes
from ..rollouts.prompt_format import PromptFormat
from ..rollouts.rollout import sample
from ..tasks.base import Example, Task
from ..tasks.pointer_chasing import SHARED
from ..training.stage import AnchorsConfig
from .block import Block, Token
from .channel import Channel, WriteOptions, Written, closer_id
from .reading import Inputs, Reader, embedded, log_probs_of
from .writing import continue_text


class TextMessage(Channel):
    """Text from sharer to receiver, a block per pass."""

    has_log_prob = True
    writer: ClassVar[type[Block]] = Block
    """Loss and decoding of the sharer's text."""

    def __init__(self, options: Any, sharer: Any):
        super().__init__(options, sharer.main_config.hidden_size)
        self.sharer = sharer

    @classmethod
    def of(cls, options: Any, model: Any) -> "TextMessage":
        return cls(options, type(model)(model.config))

    def check(self, fmt: PromptFormat, task: Task) -> None:
        closer_id(fmt)
        shared_half(task.example("train", 0))

    def supervised_loss(
        self, model: Any, fmt: PromptFormat, examples: list[Example], *, step: int, seed: int
    ) -> Tensor:
        halves = [sharers_example(example) for example in examples]
        writer = self.writer(AnchorsConfig(), 0)  # all anchors
        sent = writer.supervised_loss(self.sharer, fmt, halves, step=step, seed=seed)
        rows = [
            Inputs(
                fmt.thought_ids(half.thought) + fmt.question_ids(example),
                embedded(model, []),
                [],
                fmt.completion_ids(example.thought, example.answer),
            )
            for example, half in zip(examples, halves, strict=True)
        ]
        return sent - torch.cat(log_probs_of(model, rows)).mean()

    @torch.no_grad()
    def write(
        self, model: Any, fmt: PromptFormat, examples: list[Example], options: WriteOptions
    ) -> list[Written]:
        # Message and text are one context: together they have the budget of a text.
        half = options.max_new_tokens // 2
        messages = self.messages(fmt, examples, replace(options, max_new_tokens=half))
        closer = closer_id(fmt)
        closed = [i for i, (ids, _) in enumerate(messages) if ids[-1:] == [closer]]
        texts: dict[int, list[int]] = {}
        if closed:
            prompts = [messages[i][0] + fmt.question_ids(examples[i]) for i in closed]
            reader = Reader(model, prompts, fmt.pad_id)
            hidden = reader.read_prompts()[:, -1]
            rest = replace(options, max_new_tokens=options.max_new_tokens - half)
            found = continue_text(reader, hidden, rest, closer=closer, ends=fmt.eos_ids)
            texts = dict(zip(closed, found, strict=True))
        out = []
        for i, (ids, passes) in enumerate(messages):
            vectors = embedded(model, ids) if i in texts else None
            trace = str(fmt.tokenizer.decode([token for token in ids if token != closer]))
            out.append(received(fmt, texts.get(i, []), passes, vectors, trace))
        return out

    def messages(
        self, fmt: PromptFormat, examples: list[Example], options: WriteOptions
    ) -> list[tuple[list[int], int]]:
        """Ids of the sharer's messages, with the delimiter if it was written, and their passes."""
        device = next(self.sharer.parameters()).device
        decoding = DecodeOptions(
            sampler=options.sampler,
            max_new_tokens=options.max_new_tokens,
            generator=torch.Generator(device=device).manual_seed(options.seed),
        )
        halves = [sharers_example(example) for example in examples]
        batch = sample(self.sharer, fmt, halves, fmt.plan(self.writer.mode), decoding)
        passes = thought_passes(batch, fmt).tolist()
        ids = [fmt.split(batch.completion(row))[0] for row in range(len(batch))]
        return [(one, int(number)) for one, number in zip(ids, passes, strict=True)]

    def answer_inputs(
        self, model: Any, fmt: PromptFormat, example: Example, output: Written, message: Tensor
    ) -> Inputs:
        """The message, and the receiver's own text after its prompt."""
        return Inputs([], message, fmt.question_ids(example), output.text)


class TokenMessage(TextMessage):
    """Text from sharer to receiver, a token per pass."""

    writer = Token


def shared_half(example: Example) -> str:
    """The sharer's half of a problem. Raises ValueError if it has none."""
    half = example.columns.get(SHARED)
    if not isinstance(half, str):
        raise ValueError(
            f"task must have examples with a column {SHARED!r}, which the sharer reads, for a "
            f"channel of two models, got the columns {', '.join(example.columns) or 'none'}; use "
            "task=pointer_chasing task.split=true"
        )
    return half


def sharers_example(example: Example) -> Example:
    """The example that the sharer learns: it writes its half. Its answer is empty."""
    half = shared_half(example)
    return Example(half, "", half)


def received(
    fmt: PromptFormat, ids: list[int], passes: int, vectors: Tensor | None, trace: str
) -> Written:
    """An output of the receiver, whose ids follow a message that took `passes`.

    vectors: the message; None if it never ended, and there are no ids.
    """
    thought, _ = fmt.split(ids)
    trace = f"{trace}|{fmt.thought_text(ids)}"
    answer = fmt.answer_text(ids)
    return Written(answer, passes + len(ids), passes + len(thought), trace, vectors, ids)
