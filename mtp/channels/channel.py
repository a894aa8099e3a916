"""The interface of a channel: what leaves a forward pass of main and enters the next one.

A channel knows how a thought is produced, in passes that follow each other; how it is trained on
solved examples, and how many passes in sequence that needs; and the log-probability of a sampled
thought, if it has one. The answer after a thought is ordinary text in all channels.

To add a channel, derive from `Channel` (or from `VectorChannel` in `vectors.py`, for one vector per
pass) in a file of your own, and add it with `CHANNELS.add`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..common.bounds import check_numbers
from ..common.registry import Registry
from ..modeling.sampler import Sampler
from ..rollouts.prompt_format import PromptFormat
from ..tasks.base import Example, Task
from .reading import Inputs, log_probs_of


@dataclass(kw_only=True)
class NoOptions:
    """Settings of a channel that has none."""


@dataclass(kw_only=True)
class WriteOptions:
    """Options of writing thoughts and answers."""

    sampler: Sampler = field(default_factory=lambda: Sampler(temperature=0))
    """The distribution of the thought; temperature 0: the likeliest thought."""
    sample_answer: bool = False
    """Sample the answer from `sampler` too. False: it is greedy, so that attempts differ by their
    thoughts only."""
    max_new_tokens: int = 64
    """Maximum length of an output: vectors or tokens of the thought, and tokens of the answer."""
    seed: int = 0
    """Seed of everything that is sampled."""


@dataclass(frozen=True)
class Written:
    """One output: a thought and an answer."""

    answer: str | None
    """The final answer; None if there is none."""
    passes: int
    """Number of forward passes in sequence, from that of the prompt to the last token's."""
    thought_passes: int
    """Number of those that produced the thought. A delimiter after it counts where the model
    writes it, and not where the channel ends every thought after a given number of passes."""
    trace: str
    """The thought as text; for a vector, the tokens that it was made of."""
    vectors: Tensor | None = field(default=None, compare=False, repr=False)
    """[n, E] the message, which the passes of the answer attend to: a thought's inputs, with E = D,
    or what else the channel passes on. None if it never ended."""
    text: list[int] = field(default_factory=list)
    """Ids after the message. After a thought: the delimiter, the answer and the end."""
    transcript: str | None = None
    """The thought as a reader of text gets it, in the form of a solved one; None if it never ended,
    or if it is not all that the answer follows from."""


class Channel(nn.Module, ABC):
    """One way to pass information from a forward pass to the next."""

    options_class: ClassVar[Any] = NoOptions
    """Dataclass of the settings in `channel.options`."""
    has_log_prob: ClassVar[bool]
    """True if a sampled thought has a log-probability, so that RL can train it."""
    is_random: ClassVar[bool] = False
    """True if the thought is sampled in evaluations too, since it has no likeliest value."""

    def __init__(self, options: Any, width: int):
        """width: main's, D."""
        super().__init__()
        self.options = options

    @classmethod
    def of(cls, options: Any, model: Any) -> "Channel":
        """The channel of a model. Raises ValueError for a model that it cannot use."""
        return cls(options, model.main_config.hidden_size)

    def check(self, fmt: PromptFormat, task: Task) -> None:
        """Raises ValueError naming the key of phases or tasks that the channel cannot use."""
        closer_id(fmt)

    @abstractmethod
    def supervised_loss(
        self, model: Any, fmt: PromptFormat, examples: list[Example], *, step: int, seed: int
    ) -> Tensor:
        """Mean loss per scored position [] over solved examples.

        step: optimizer steps done in the stage, for a curriculum. seed: seed of what is sampled.
        """

    @abstractmethod
    def write(
        self, model: Any, fmt: PromptFormat, examples: list[Example], options: WriteOptions
    ) -> list[Written]:
        """One output for each example, in their order."""

    @torch.no_grad()
    def answer_log_probs(
        self,
        model: Any,
        fmt: PromptFormat,
        examples: list[Example],
        outputs: list[Written],
        messages: list[Tensor],
    ) -> Tensor:
        """[B] log p of the answers of outputs, given other messages [n, E] in place of their own.

        After a thought the delimiter is not scored.
        """
        rows = [
            self.answer_inputs(model, fmt, *one)
            for one in zip(examples, outputs, messages, strict=True)
        ]
        return torch.stack([found.sum() for found in log_probs_of(model, rows)])

    def answer_inputs(
        self, model: Any, fmt: PromptFormat, example: Example, output: Written, message: Tensor
    ) -> Inputs:
        """Inputs of main, and the ids that are scored after them, for `answer_log_probs`."""
        return Inputs(fmt.question_ids(example), message, output.text[:1], output.text[1:])

    def begins_level(self, step: int) -> bool:
        """True if a curriculum begins a new level at this step, which resets the optimizer."""
        return 0 < step == self.last_level_begins()

    def last_level_begins(self) -> int:
        """Optimizer step at which the last level of a curriculum begins; 0 without one."""
        return 0


def closer_id(fmt: PromptFormat) -> int:
    """The delimiter that ends a thought. Raises ValueError for phases without one."""
    if fmt.closer is None or len(fmt.phases) != 2:
        raise ValueError(
            "decoding.phases must be a thought and an answer for a comparator, got "
            f"{', '.join(fmt.phases)}; use decoding=think"
        )
    return fmt.delimiter_id(fmt.closer)


def plain_text(fmt: PromptFormat, ids: list[int]) -> str:
    """Tokens as text, without special tokens."""
    return str(fmt.tokenizer.decode(ids, skip_special_tokens=True))


CHANNELS: Registry[type[Channel]] = Registry()
"""Channels by name."""


def short_curriculum(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options whose levels have one optimizer step each, so that a dry run sees all of them."""
    given = vars(CHANNELS.get(name, "channel.name").options_class()) | options
    long = [key for key in ("text_steps", "level_steps") if isinstance(given.get(key), int)]
    return options | {key: min(1, given[key]) for key in long}


def build_channel(name: str, options: dict[str, Any], model: Any) -> Channel:
    """The channel of a model. Raises ValueError naming the key of an impossible setting."""
    cls = CHANNELS.get(name, "channel.name")
    defaults = vars(cls.options_class())
    for key, value in options.items():
        if key not in defaults:
            raise ValueError(
                f"channel.options.{key} is not known; the options of channel {name} are "
                f"{', '.join(defaults) or 'none'}"
            )
        kind = type(defaults[key])
        if not isinstance(value, (int, float) if kind is float else kind) or (
            isinstance(value, bool) and kind is not bool
        ):
            raise ValueError(
                f"channel.options.{key} must be of type {kind.__name__}, got {value!r}"
            )
    settings = cls.options_class(**options)
    check_numbers(settings, "channel.options")
    if type(model.get_input_embeddings()) is not nn.Embedding:
        raise ValueError(
            f"channel.name={name} needs a main whose input is the embedding itself, but "
            f"{type(model).__name__} scales it; choose model.family=llama"
        )
    return cls.of(settings, model).to(next(model.parameters()).device)


def options_of(channel: Channel) -> dict[str, Any]:
    """The settings of a channel, as `build_channel` takes them."""
    return {f.name: getattr(channel.options, f.name) for f in fields(channel.options)}
