"""Sampling: examples and a policy in, rollouts with their text out."""

from dataclasses import dataclass, field

import torch

from .batch import pad
from .generation_mtp import Decoded, Phase, PhasePlan, Sampler, check_phases, decode
from .tasks.base import Example
from .text import TextFormat


@dataclass(kw_only=True)
class DecodingConfig:
    """How text is written, in rollouts and in evaluations."""

    phases: dict[str, Phase] = field(default_factory=dict)
    """Phases in order. A prompt ends with the delimiter of the first; see `Phase`."""
    max_new_tokens: int = 64
    temperature: float = 1.0
    """Of rollouts. Evaluations are greedy."""
    top_k: int = 0
    top_p: float = 1.0
    system_prompt: str | None = None

    def sampler(self) -> Sampler:
        """The distribution of rollouts. Raises ValueError for impossible settings."""
        if self.max_new_tokens < 1:
            raise ValueError(
                f"decoding.max_new_tokens must be at least 1, got {self.max_new_tokens}"
            )
        check_phases(self.phases, "decoding.phases")
        try:
            return Sampler(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        except ValueError as error:
            raise ValueError(f"decoding.{error}") from None


@dataclass
class Rollouts:
    """P prompts times G completions; rollout i belongs to example i // G."""

    examples: list[Example]
    """[P]"""
    group_size: int
    """G"""
    prompts: list[list[int]]
    """[P * G] prompt ids."""
    out: Decoded
    """On the CPU, [P * G] rows."""

    def completion(self, row: int) -> list[int]:
        """Ids of one completion."""
        return self.out.tokens[row, : int(self.out.lengths[row])].tolist()

    def example(self, row: int) -> Example:
        """The problem of one rollout."""
        return self.examples[row // self.group_size]


def sample(
    model: torch.nn.Module,
    text: TextFormat,
    examples: list[Example],
    plan: PhasePlan,
    sampler: Sampler,
    *,
    max_new_tokens: int,
    group_size: int = 1,
    generator: torch.Generator | None = None,
    prefixes: list[list[int]] | None = None,
) -> Rollouts:
    """Complete each example's prompt `group_size` times.

    `prefixes`, one per example, are put behind the prompts: what the model is made to have said.
    """
    prompts = [text.prompt_ids(example.prompt) for example in examples]
    if prefixes is not None:
        prompts = [p + prefix for p, prefix in zip(prompts, prefixes, strict=True)]
    device = next(model.parameters()).device
    tokens, lengths = pad(prompts, text.pad_id)
    training = model.training
    model.eval()
    out = decode(
        model,
        tokens.to(device),
        lengths.to(device),
        plan,
        sampler,
        max_new_tokens=max_new_tokens,
        pad_id=text.pad_id,
        generator=generator,
        num_return_sequences=group_size,
    )
    model.train(training)
    record = Decoded(**{name: value.cpu() for name, value in vars(out).items()})
    prompts = [prompt for prompt in prompts for _ in range(group_size)]
    return Rollouts(examples, group_size, prompts, record)
