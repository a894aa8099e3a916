"""Text to tokens and back, in one place: prompts, chat templates, thoughts and final answers.

A completion is `thought </think> answer <eos>`: the prompt ends with the delimiter that opens the
first phase, as chat templates of thinking models do. Delimiters come from the decoding phases.
"""

import re
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .generation_mtp import Phase, PhasePlan, SegmentSettings, check_segments, make_plan
from .memory_mtp import ALPHABET, DONE
from .segments_mtp import Trajectory, summary_marks
from .tasks.base import Example

PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def character_tokenizer(alphabet: str, delimiters: list[str]) -> PreTrainedTokenizerFast:
    """One token a character, for models trained from scratch on a closed alphabet."""
    special = ["<pad>", "<eos>", *delimiters]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(set(alphabet))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": delimiters})
    tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


@dataclass
class TextFormat:
    """How examples become token ids under one tokenizer and one set of phases."""

    tokenizer: PreTrainedTokenizerBase
    phases: dict[str, Phase]
    num_slots: int
    """K + 1."""
    system_prompt: str | None = None
    segments: SegmentSettings = field(default_factory=SegmentSettings)
    chat_template: bool = True
    """False gives prompts as they are, though the tokenizer has a chat template."""

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("decoding.phases must name at least one phase, got none")
        names = list(self.phases)
        for name in names[1:]:
            if self.phases[name].opened_by is None:
                raise ValueError(
                    f"decoding.phases.{name}.opened_by is missing: every phase but the first needs "
                    "the delimiter token that opens it"
                )
        self._delimiter_ids: dict[str, int] = {}
        self.opener = self.phases[names[0]].opened_by
        self.closer = self.phases[names[-1]].opened_by
        self.summary_ids = [
            self.delimiter_id(phase.opened_by)
            for phase in self.phases.values()
            if phase.closed_by is not None and phase.opened_by is not None
        ]
        for phase in self.phases.values():
            for delimiter in (phase.opened_by, phase.closed_by):
                if delimiter is not None:
                    self.delimiter_id(delimiter)
        check_segments(self.segments, self.phases, "decoding")
        if self.segments.max_segments > 1:
            self._check_alphabet()

    @property
    def pad_id(self) -> int:
        """Fills rows on the right; never scored."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)  # type: ignore[arg-type]

    @property
    def uses_template(self) -> bool:
        """True if prompts go through the tokenizer's chat template."""
        tokenizer: Any = self.tokenizer
        return self.chat_template and tokenizer.chat_template is not None

    @property
    def eos_id(self) -> int:
        """Ends a sequence."""
        return int(self.tokenizer.eos_token_id)  # type: ignore[arg-type]

    def delimiter_id(self, delimiter: str) -> int:
        """Id of a delimiter. Raises ValueError if the tokenizer has no single token for it."""
        if delimiter in self._delimiter_ids:
            return self._delimiter_ids[delimiter]
        ids = self.tokenizer.encode(delimiter, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise ValueError(
                f"delimiter {delimiter!r} must be one token of the tokenizer, got {len(ids)}; add "
                "it to model.add_tokens or choose another in decoding.phases"
            )
        self._delimiter_ids[delimiter] = ids[0]
        return ids[0]

    def _check_alphabet(self) -> None:
        """Raises ValueError if the tokenizer cannot write commands or the memory file."""
        tokenizer: Any = self.tokenizer
        unknown = {tokenizer.unk_token_id, tokenizer.pad_token_id} - {None}
        lacking = [c for c in dict.fromkeys(ALPHABET) if unknown & set(self._encode(c))]
        if lacking:
            raise ValueError(
                f"decoding.segments.max_segments={self.segments.max_segments} needs a tokenizer "
                f"that knows the characters of memory commands, but not {lacking}; train a "
                "tokenizer with them or set it to 1"
            )

    def plan(self, mode: str = "fast") -> PhasePlan:
        """The phases as the pass loop takes them: `fast` runs each in its own mode, `slow` and
        `verified` run all in that mode.
        """

        def ids(delimiters: list[str | None]) -> list[int | None]:
            return [None if d is None else self.delimiter_id(d) for d in delimiters]

        return make_plan(
            list(self.phases.values()),
            ids([phase.opened_by for phase in self.phases.values()]),
            num_slots=self.num_slots,
            eos_ids=[self.eos_id],
            mode=mode,
            closed_by=ids([phase.closed_by for phase in self.phases.values()]),
        )

    def prompt_ids(self, prompt: str) -> list[int]:
        """The prompt, through the chat template if it is used, ended by the first delimiter."""
        return self.conversation_ids([{"role": "user", "content": prompt}])

    def conversation_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation that the user spoke last in, as a prompt for the next answer.

        Without a chat template there is no way to tell who speaks: the last message alone.
        """
        tokenizer: Any = self.tokenizer
        if not self.uses_template:
            text = messages[-1]["content"]
        else:
            if self.system_prompt is not None:
                messages = [{"role": "system", "content": self.system_prompt}, *messages]
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        if self.opener is not None and not text.rstrip().endswith(self.opener):
            text += self.opener
        return tokenizer.encode(text, add_special_tokens=False)

    def completion_ids(self, thought: str | None, answer: str) -> list[int]:
        """`thought </think> answer <eos>`; without a thought phase `answer <eos>`."""
        return [*self.thought_ids(thought), *self._encode(answer), self.eos_id]

    def thought_ids(self, thought: str | None) -> list[int]:
        """`thought </think>`, what stands between the prompt and the answer."""
        if self.closer is None:
            return []
        return [*self._encode(thought or ""), self.delimiter_id(self.closer)]

    def split(self, ids: list[int]) -> tuple[list[int], list[int] | None]:
        """Completion ids -> ids of the thought (its closing delimiter included) and of the answer.

        The answer is None if the thought was never closed, or the sequence never ended.
        """
        ended = bool(ids) and ids[-1] == self.eos_id
        body = ids[:-1] if ended else ids
        if self.closer is None:
            return [], body if ended else None
        closer = self.delimiter_id(self.closer)
        if closer not in body:
            return body, None
        cut = len(body) - body[::-1].index(closer)
        return body[:cut], body[cut:] if ended else None

    def thought_of(self, ids: list[int]) -> list[int]:
        """Completion ids -> ids of the thought up to its summary, with its closing delimiter."""
        thought, _ = self.split(ids)
        summary = next((i for i, token in enumerate(thought) if token in self.summary_ids), None)
        return thought if summary is None else thought[: summary + 1]

    def thought_text(self, *segments: list[int]) -> str:
        """Text of a thought, given what each segment wrote, without closing delimiters."""
        ends = [*self.summary_ids, *self.thought_ids("")]
        thought: list[int] = []
        for ids in segments:
            part = self.thought_of(ids)
            thought += part[:-1] if part and part[-1] in ends else part
        return str(self.tokenizer.decode(thought))

    def answer_text(self, ids: list[int]) -> str | None:
        """The final answer, stripped; None if there is none."""
        _, answer = self.split(ids)
        return None if answer is None else str(self.tokenizer.decode(answer)).strip()

    def bare_answer_text(self, ids: list[int]) -> str | None:
        """The same for a completion that is the answer alone, its thought having been given."""
        if not ids or ids[-1] != self.eos_id:
            return None
        return str(self.tokenizer.decode(ids[:-1])).strip()

    def example_ids(self, example: Example) -> tuple[list[int], list[int]]:
        """(prompt ids, completion ids) of a solved example in one segment."""
        return self.prompt_ids(example.prompt), self.completion_ids(example.thought, example.answer)

    def example_segments(self, example: Example) -> list[tuple[list[int], list[int]]]:
        """(context ids, completion ids) of each segment of a solved example.

        A thought within its budget is one segment. A longer one is told in segments of as many
        whole steps as fit; steps end at `;` or a line's end, and each summary notes the last as
        `write done STEP`. The last segment that is allowed holds the rest.

        Raises ValueError naming the key if a summary is longer than its budget.
        """
        prompt, completion = self.example_ids(example)
        names, limit = list(self.phases), self.segments.max_segments
        budget = self.phases[names[0]].max_tokens
        if limit == 1 or budget is None or example.thought is None:
            return [(prompt, completion)]
        plan = self.plan()
        opener, closer = summary_marks(plan)
        told = Trajectory(prompt, plan, self.segments, self.tokenizer)
        samples: list[tuple[list[int], list[int]]] = []
        steps = re.findall(r"[^;\n]*[;\n]?", example.thought)
        rest = [self._encode(step) for step in steps if step]
        while len(samples) + 1 < limit and sum(map(len, rest)) > budget:
            number = max(1, sum(total <= budget for total in accumulate(map(len, rest))))
            said, rest = rest[:number], rest[number:]
            note = f"write {DONE} " + str(self.tokenizer.decode(said[-1])).rstrip(";\n")
            summary = self._encode(note)
            self._check_summary(summary, plan)
            thought = [token for step in said for token in step]
            samples.append((told.context, [*thought, opener, *summary, closer]))
            told.add(samples[-1][1], closed=True)
        thought = [token for step in rest for token in step]
        answer = completion[len(self.thought_ids(example.thought)) :]
        last = [*thought, *self.thought_ids(""), *answer]
        return [*samples, (told.context, last)]

    def _check_summary(self, summary: list[int], plan: PhasePlan) -> None:
        """Raises ValueError if a solved example's summary would be cut when it is decoded."""
        phase = next(p for p, closer in enumerate(plan.closed_by) if closer is not None)
        limit = plan.max_tokens[phase]
        if limit is not None and len(summary) > limit:
            raise ValueError(
                f"decoding.phases.{list(self.phases)[phase]}.max_tokens must be at least "
                f"{len(summary)} for solved examples, got {limit}: they note a step as "
                f"{self.tokenizer.decode(summary)!r}"
            )

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
