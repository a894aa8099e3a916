"""A task's examples as a run can use them: short enough, and free of delimiters.

A run's data is checked here before anything trains: all rows of a task with a list, the test
problems of others, and each further problem as it is used. Data that would be misread is refused,
with an error that names the row. Problems that are too long for the model are dropped and counted.

An index gives the same example at every call, so a position is the whole state of the data.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ..rollouts.prompt_format import PromptFormat
from ..rollouts.rollout import DecodingConfig
from ..rollouts.tokenization import unknown_characters
from ..tasks.base import (
    Attempt,
    Example,
    RunState,
    Scored,
    Split,
    Step,
    Task,
    held_out_sets,
)
from .collate import collate_text
from .stage import StageConfig

_log = logging.getLogger(__name__)
_NUM_CHECKED = 256
"""Number of training problems of a task without a list that are checked before a run begins."""
_NUM_PROBES = 64


class FittedTask(Task):
    """A task without the problems that are too long for the model, its examples checked."""

    def __init__(
        self,
        task: Task,
        fmt: PromptFormat,
        *,
        prompt_limit: int | None = None,
        text_limit: int | None = None,
    ):
        """Nothing is checked until it is used.

        Args:
            task: the problems.
            fmt: tokens and phases.
            prompt_limit: maximum number of tokens of a prompt; None: no limit.
            text_limit: maximum number of tokens of a solved training example; None: no limit.
        """
        self.task, self.fmt = task, fmt
        self.name, self.right_at, self.has_verifier = task.name, task.right_at, task.has_verifier
        self.is_listed, self.project_size = task.is_listed, task.project_size
        self.test_sets, self.interim_set = task.test_sets, task.interim_set
        self.prompt_limit, self.text_limit = prompt_limit, text_limit
        self._kept: dict[Split, list[Example]] = {}
        self._has_warned: set[Split] = set()
        answer = "".join(map(chr, range(33, 127)))
        lacking = unknown_characters(fmt.tokenizer, answer)
        answer = "".join(character for character in answer if character not in lacking)
        self._keeps_ascii = fmt.read_back(answer) == answer

    def size(self, split: Split) -> int | None:
        return len(self._list(split)) if self._lists(split) else self.task.size(split)

    def example(self, split: Split, index: int) -> Example:
        """Raises ValueError if it cannot be read, or if nearly all problems are too long.

        A task without a list replaces a problem that is too long by the next one that fits.
        """
        if self._lists(split):
            return self._list(split)[index]
        size = self.task.size(split)
        for probe in range(_NUM_PROBES):
            at = index + probe * self.task.stride
            example = self._fitting(split, at if size is None else at % size)
            if example is not None:
                return example
            if split not in self._has_warned:
                self._has_warned.add(split)
                _log.warning(
                    "%s: %s problem %d is too long (%s); such problems are replaced by others, and "
                    "further ones are not reported",
                    self.name, split, at, self._limits(split),
                )  # fmt: skip
        raise ValueError(
            f"task {self.name}: {_NUM_PROBES} {split} problems in a row are too long "
            f"({self._limits(split)}); {_REMEDY}"
        )

    def score(self, example: Example, answer: str) -> float:
        return self.task.score(example, answer)

    def scored(self, attempts: Sequence[Attempt]) -> list[Scored]:
        return self.task.scored(attempts)

    def outcome(
        self, example: Example, answer: str, completion_ids: list[int] | None = None
    ) -> float:
        return self.task.outcome(example, answer, completion_ids)

    def bookmark(self, position: int) -> dict[str, Any]:
        return self.task.bookmark(position)

    def restore(self, bookmark: dict[str, Any]) -> None:
        self.task.restore(bookmark)

    def follow(self, state: Callable[[], RunState]) -> None:
        self.task.follow(state)

    def true_steps(self, thought: str) -> tuple[int, int] | None:
        return self.task.true_steps(thought)

    def steps(self, example: Example, thought: str) -> list[Step] | None:
        return self.task.steps(example, thought)

    def paraphrase(self, example: Example, thought: str) -> str | None:
        return self.task.paraphrase(example, thought)

    def continued_answer(self, example: Example, thought: str) -> str | None:
        return self.task.continued_answer(example, thought)

    def _lists(self, split: Split) -> bool:
        return self.is_listed or (split != "train" and self.task.size(split) is not None)

    def _list(self, split: Split) -> list[Example]:
        """All examples of a split that fit."""
        if split not in self._kept:
            size = self.task.size(split) or 0
            found = (self._fitting(split, index) for index in range(size))
            kept = [example for example in found if example is not None]
            if not kept:
                raise ValueError(
                    f"task {self.name}: all {size} {split} problems are too long "
                    f"({self._limits(split)}); {_REMEDY}"
                )
            if len(kept) < size:
                _log.warning(
                    "%s: dropped %d of %d %s problems, which are too long (%s)",
                    self.name, size - len(kept), size, split, self._limits(split),
                )  # fmt: skip
            self._kept[split] = kept
        return self._kept[split]

    def _fitting(self, split: Split, index: int) -> Example | None:
        """One of the task's own examples, checked; None if it is too long."""
        example = self.task.example(split, index)
        where = example.where or f"{split} problem {index} of task {self.name}"
        if self._prompt_is_too_long(example):
            self._check_whole(where, split)
            return None
        example = self.fmt.checked(example, where)
        self._check_answer(example, where)
        if split == "train" and self.text_limit is not None and self._text_is_too_long(example):
            self._check_whole(where, split)
            return None
        return example

    def _check_whole(self, where: str, split: Split) -> None:
        """Raises ValueError if a problem that is too long is of a project, which needs it."""
        if self.project_size > 1:
            raise ValueError(
                f"{where} is too long ({self._limits(split)}), and its project needs it; {_REMEDY}"
            )

    def _prompt_is_too_long(self, example: Example) -> bool:
        limit = self.prompt_limit
        if limit is None:
            return False
        longer = self.fmt.is_longer(example, limit)
        return len(self.fmt.question_ids(example)) > limit if longer is None else longer

    def _text_is_too_long(self, example: Example) -> bool:
        assert self.text_limit is not None
        solution = (example.thought or "") + example.answer
        longer = self.fmt.is_longer(example, self.text_limit, solution)
        # The context of a shared memory is not part of the prompt.
        if longer is False and not self.fmt.segments.is_shared:
            return False
        if longer and self.fmt.segments.max_segments == 1:
            return True
        segments = self.fmt.example_segments(example)
        return max(len(p) + len(c) for p, c in segments) > self.text_limit

    def _check_answer(self, example: Example, where: str) -> None:
        """Raises ValueError if the gold answer is wrong once it is read from a completion."""
        if not self.has_verifier or (self._keeps_ascii and example.answer.isascii()):
            return
        back = self.fmt.read_back(example.answer)
        ids = self.fmt.completion_ids(example.thought, example.answer)
        if back == example.answer or not self.outcome(example, example.answer, ids):
            return
        if not self.outcome(example, back, ids):
            raise ValueError(
                f"the answer of {where} can never be given: the tokenizer reads "
                f"{example.answer[:80]!r} as {back[:80]!r}, which is wrong; write it as the "
                "tokenizer reads it, or choose another task.reward or model"
            )

    def _limits(self, split: Split) -> str:
        parts = [] if self.prompt_limit is None else [f"{self.prompt_limit} tokens of a prompt"]
        if split == "train" and self.text_limit is not None:
            parts.append(f"{self.text_limit} tokens of a solved example")
        return "limits: " + ", ".join(parts)


_REMEDY = (
    "raise decoding.max_prompt_tokens, lower decoding.max_new_tokens, choose a model with larger "
    "max_position_embeddings or give shorter problems"
)


def fit_task(
    task: Task,
    decoding: DecodingConfig,
    stages: dict[str, StageConfig],
    model: Any,
    fmt: PromptFormat,
) -> FittedTask:
    """The task as a run's model can read it; stages: those of the run that have steps.

    Raises ValueError naming the key if there is no room for prompts.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    solved = any(stage.reads_solved for stage in stages.values())
    return FittedTask(
        task,
        fmt,
        prompt_limit=decoding.prompt_limit(positions),
        text_limit=positions if solved else None,
    )


def checked_task(
    task: Task,
    decoding: DecodingConfig,
    stages: dict[str, StageConfig],
    model: Any,
    fmt: PromptFormat,
    num_test: int,
) -> FittedTask:
    """The task as a run's model can read it, checked before anything trains.

    num_test: number of test problems to check, of a task with unlimited problems.

    Raises ValueError naming the row that cannot be read, or the supervised stage whose head would
    have nothing to learn: no example has a token that the head writes.
    """
    fitted = fit_task(task, decoding, stages, model, fmt)
    for split in held_out_sets(fitted):
        for index in range(fitted.size(split) or num_test):
            fitted.example(split, index)
    number = fitted.size("train") or _NUM_CHECKED
    number = number if fitted.is_listed else min(number, _NUM_CHECKED)
    examples = [fitted.example("train", index) for index in range(number)]
    # An example without a thought may have none of the head's tokens, so those with one come first.
    examples = sorted(examples, key=lambda example: not example.thought)[:8]
    if not any(_has_head_rows(example, fmt) for example in examples):
        _check_heads(fitted, stages)
    return fitted


def _has_head_rows(example: Example, fmt: PromptFormat) -> bool:
    samples = fmt.example_segments(example)
    return len(collate_text(samples, fmt.plan("fast"), fmt.block_size, fmt.pad_id).head) > 0


def _check_heads(task: FittedTask, stages: dict[str, StageConfig]) -> None:
    """Raises ValueError for a supervised stage of the head without a token of the head."""
    phases = [name for name, phase in task.fmt.phases.items() if phase.mode != "slow"]
    for name, stage in stages.items():
        streams = [n for n, stream in stage.objective.active().items() if stream.scores_head]
        if stage.kind == "supervised" and stage.train_head and streams:
            raise ValueError(
                f"stages.{name}.objective.{streams[0]} has nothing to learn from: no solved "
                f"example of task {task.name} has text in a phase that the head writes "
                f"({', '.join(phases) or 'decoding.phases has none'}); give the problems a thought "
                f"(task.thought_column), or set stages.{name}.steps=0"
            )
