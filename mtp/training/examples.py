"""A task's examples as a run can use them: short enough, and free of delimiters.

A run's data is checked here, before anything trains: all rows that a task lists, the test problems
of others, and each further problem as it is drawn. What would be read wrongly is refused, naming
the row. What is too long for the model is dropped and counted.

An index gives the same example at every call, so a position stays all the state that the data has.
"""

import logging
from typing import Any

from ..rollouts.prompt_format import PromptFormat
from ..rollouts.rollout import DecodingConfig
from ..rollouts.tokenization import unknown_characters
from ..tasks.base import Example, Split, Task, held_out_sets
from .collate import collate_text
from .stage import StageConfig

_log = logging.getLogger(__name__)
_NUM_CHECKED = 256
"""Training problems of a task without a list that are looked at before a run begins."""
_NUM_PROBES = 64
_STRIDE = 7919
"""From a problem that is too long to the next candidate; a prime."""


class FittedTask(Task):
    """A task without the problems that are too long for the model, its examples checked."""

    def __init__(
        self,
        task: Task,
        text: PromptFormat,
        *,
        prompt_limit: int | None = None,
        text_limit: int | None = None,
    ):
        """Nothing is looked at before it is asked for.

        Args:
            task: the problems.
            text: how they are read.
            prompt_limit: most tokens of a prompt; None: no limit.
            text_limit: most tokens of a solved training example; None: no limit.
        """
        self.task, self.text = task, text
        self.name, self.right_at, self.judges = task.name, task.right_at, task.judges
        self.is_listed = task.is_listed
        self.test_sets, self.interim_set = task.test_sets, task.interim_set
        self.prompt_limit, self.text_limit = prompt_limit, text_limit
        self._kept: dict[Split, list[Example]] = {}
        self._has_warned: set[Split] = set()
        answer = "".join(map(chr, range(33, 127)))
        lacking = unknown_characters(text.tokenizer, answer)
        answer = "".join(character for character in answer if character not in lacking)
        self._keeps_ascii = text.read_back(answer) == answer

    def size(self, split: Split) -> int | None:
        return len(self._list(split)) if self._lists(split) else self.task.size(split)

    def example(self, split: Split, index: int) -> Example:
        """Raises ValueError if it cannot be read, or if nearly all problems are too long.

        A task without a list gives the next problem that fits in place of one that is too long.
        """
        if self._lists(split):
            return self._list(split)[index]
        size = self.task.size(split)
        for probe in range(_NUM_PROBES):
            at = index + probe * _STRIDE
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

    def outcome(self, example: Example, answer: str) -> float:
        return self.task.outcome(example, answer)

    def true_steps(self, thought: str) -> tuple[int, int] | None:
        return self.task.true_steps(thought)

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
        if self._prompt_is_too_long(example.prompt):
            return None
        where = example.where or f"{split} problem {index} of task {self.name}"
        example = self.text.checked(example, where)
        self._check_answer(example, where)
        is_solved = split == "train" and self.text_limit is not None
        return None if is_solved and self._text_is_too_long(example) else example

    def _prompt_is_too_long(self, prompt: str) -> bool:
        limit = self.prompt_limit
        if limit is None:
            return False
        told = self.text.is_longer(prompt, limit)
        return len(self.text.prompt_ids(prompt)) > limit if told is None else told

    def _text_is_too_long(self, example: Example) -> bool:
        assert self.text_limit is not None
        solution = (example.thought or "") + example.answer
        told = self.text.is_longer(example.prompt, self.text_limit, solution)
        if told is False or (told and self.text.segments.max_segments == 1):
            return told
        segments = self.text.example_segments(example)
        return max(len(p) + len(c) for p, c in segments) > self.text_limit

    def _check_answer(self, example: Example, where: str) -> None:
        """Raises ValueError if the gold answer, as a completion would hold it, is not right."""
        if not self.judges or (self._keeps_ascii and example.answer.isascii()):
            return
        back = self.text.read_back(example.answer)
        if back == example.answer or not self.outcome(example, example.answer):
            return
        if not self.outcome(example, back):
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
    text: PromptFormat,
) -> FittedTask:
    """The task as a run's model can read it; stages: those of the run that have steps.

    Raises ValueError naming the key if there is no room for prompts.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    solved = any(stage.reads_solved for stage in stages.values())
    return FittedTask(
        task,
        text,
        prompt_limit=decoding.prompt_limit(positions),
        text_limit=positions if solved else None,
    )


def checked_task(
    task: Task,
    decoding: DecodingConfig,
    stages: dict[str, StageConfig],
    model: Any,
    text: PromptFormat,
    num_test: int,
) -> FittedTask:
    """The task as a run's model can read it, looked at before anything trains.

    num_test: test problems that a run looks at, of a task without an end of them.

    Raises ValueError naming the row that cannot be read, or the supervised stage whose head would
    have nothing to learn: no example has a token that the head writes.
    """
    fitted = fit_task(task, decoding, stages, model, text)
    for split in held_out_sets(fitted):
        for index in range(fitted.size(split) or num_test):
            fitted.example(split, index)
    number = fitted.size("train") or _NUM_CHECKED
    number = number if fitted.is_listed else min(number, _NUM_CHECKED)
    examples = [fitted.example("train", index) for index in range(number)]
    # An example without a thought may have none of the head's tokens, so those with one come first.
    examples = sorted(examples, key=lambda example: not example.thought)[:8]
    if not any(_has_head_rows(example, text) for example in examples):
        _check_heads(fitted, stages)
    return fitted


def _has_head_rows(example: Example, text: PromptFormat) -> bool:
    samples = text.example_segments(example)
    return len(collate_text(samples, text.plan("fast"), text.block_size, text.pad_id).head) > 0


def _check_heads(task: FittedTask, stages: dict[str, StageConfig]) -> None:
    """Raises ValueError for a supervised stage of the head: no example has a token of the head."""
    phases = [name for name, phase in task.text.phases.items() if phase.mode != "slow"]
    for name, stage in stages.items():
        streams = [n for n, stream in stage.objective.active().items() if stream.scores_head]
        if stage.kind == "supervised" and stage.train_head and streams:
            raise ValueError(
                f"stages.{name}.objective.{streams[0]} has nothing to learn from: no solved "
                f"example of task {task.name} has text in a phase that the head writes "
                f"({', '.join(phases) or 'decoding.phases has none'}); give the problems a thought "
                f"(task.thought_column), or set stages.{name}.steps=0"
            )
