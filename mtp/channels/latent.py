"""Latent: the next pass reads main's last hidden vector (Coconut, Hao et al., arXiv 2412.06769).

Thoughts are a fixed number of vectors, without any text. Training replaces the solved thought step
by step: at level s of the curriculum the first s steps of the text are left out and `per_step`
vectors for each of them take their place; at the last level all of the text is left out. The loss
is that of the remaining text and the answer, and its gradient passes through every vector. So a
training example needs one pass for each vector, in sequence.

Thoughts are deterministic: no log-probability, no RL, and attempts do not differ. `levels=0` leaves
the thought out: the answer follows the question at once.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..common.bounds import bounded
from ..modeling.sampler import Sampler
from ..rollouts.prompt_format import PromptFormat
from ..tasks.base import Example
from .channel import Channel, WriteOptions, Written, closer_id
from .reading import Reader, ids_tensor, logits_of
from .vectors import Row, continue_rows, likely_tokens, split_off, written


@dataclass(kw_only=True)
class LatentOptions:
    """Settings of `channel.name=latent`."""

    levels: int = bounded(4, at_least=0, at_most=100)
    """Number of steps of the text that vectors replace at the end of the curriculum."""
    per_step: int = bounded(1, at_least=1, at_most=100)
    """Number of vectors for each of these steps."""
    text_steps: int = bounded(300, at_least=0)
    """Optimizer steps on the whole text, before the first level that has vectors."""
    level_steps: int = bounded(300, at_least=1)
    """Optimizer steps of each level with vectors; the last level has all that are left."""


class Latent(Channel):
    """Main's last hidden vector."""

    options_class = LatentOptions
    has_log_prob = False

    def level(self, step: int) -> int:
        """Level of the curriculum at an optimizer step."""
        if step < self.options.text_steps:
            return 0
        level = 1 + (step - self.options.text_steps) // self.options.level_steps
        return min(level, self.options.levels)

    def begins_level(self, step: int) -> bool:
        return step > 0 and self.level(step) != self.level(step - 1)

    def last_level_begins(self) -> int:
        levels = self.options.levels
        return self.options.text_steps + (levels - 1) * self.options.level_steps if levels else 0

    def remaining_text(self, thought: str | None, level: int) -> str:
        """The text of a solved thought that a level keeps; steps end at `;` or a line's end."""
        if level == self.options.levels:
            return ""
        steps = re.findall(r"[^;\n]*[;\n]|[^;\n]+$", thought or "")
        return "".join(steps[level:])

    def supervised_loss(
        self, model: Any, fmt: PromptFormat, examples: list[Example], *, step: int, seed: int
    ) -> Tensor:
        level = self.level(step)
        rests = [
            fmt.completion_ids(self.remaining_text(example.thought, level), example.answer)
            for example in examples
        ]
        reader = Reader(model, [fmt.question_ids(example) for example in examples], fmt.pad_id)
        ids, scored = ids_tensor(rests, fmt.pad_id, reader.prompts.device)
        number = level * self.options.per_step
        if number == 0:
            hidden = reader.read_prompts(ids[:, :-1])
        else:
            hidden = reader.read_prompts()[:, -1:]
            for _ in range(number - 1):
                hidden = reader.read(hidden)
            hidden = reader.read(torch.cat([hidden, reader.embedding(ids[:, :-1])], 1))
        logits = logits_of(model, hidden[:, -ids.shape[1] :][scored])
        return F.cross_entropy(logits, ids[scored])

    @torch.no_grad()
    def write(
        self, model: Any, fmt: PromptFormat, examples: list[Example], options: WriteOptions
    ) -> list[Written]:
        prompts = [fmt.question_ids(example) for example in examples]
        reader = Reader(model, prompts, fmt.pad_id)
        closer = torch.full((len(prompts), 1), closer_id(fmt), device=reader.prompts.device)
        number = self.options.levels * self.options.per_step
        hidden = reader.read_prompts(None if number else closer)[:, -1:]
        rows = [Row(prompt, text=[closer_id(fmt)]) for prompt in prompts]
        thoughts = [hidden[:, :0]]
        for left in reversed(range(number)):
            _, _, log_q = split_off(logits_of(model, hidden[:, 0]), closer_id(fmt), Sampler())
            for row, tokens in zip(rows, likely_tokens(log_q).tolist(), strict=True):
                row.thought.append(tokens)
            thoughts.append(hidden)
            # The delimiter is not sampled, so the pass that reads the last vector reads it too.
            read = hidden if left else torch.cat([hidden, reader.embedding(closer)], 1)
            hidden = reader.read(read)[:, -1:]
        rows = continue_rows(None, reader, hidden[:, 0], fmt, rows, options)
        return [
            written(fmt, row, vectors, number, number + len(row.log_probs), step_end(example))
            for row, vectors, example in zip(rows, torch.cat(thoughts, 1), examples, strict=True)
        ]


def step_end(example: Example) -> str:
    """The end of a step of the solved thought, `;` or a newline; empty if it has one step."""
    found = re.search(r"[;\n]", example.thought or "")
    return found[0] if found else ""
