"""Conversion of text to tokens and back: prompts, chat templates, thoughts and final answers.

A completion is `thought </think> answer <eos>`: the prompt ends with the delimiter that opens the
first phase, as chat templates of thinking models do. Delimiters come from the decoding phases.

A text ends at the tokenizer's EOS or at another end token of the source's generation config.
Special tokens around a prompt are those of the chat template, or without one those that the
tokenizer puts before a text (BOS).
"""

import math
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..modeling.memory import ALPHABET, DONE, Memory
from ..modeling.phases import Phase, PhasePlan, make_plan
from ..modeling.segments import SegmentSettings, Trajectory, check_segments, summary_marks
from ..tasks.base import Example, Message
from .tokenization import (
    find_token,
    leading_ids,
    name_of,
    special_ids,
    unknown_characters,
)

SYSTEM_ROLES = ("system", "developer")


@dataclass
class PromptFormat:
    """Conversion of examples to token ids under one tokenizer and one set of phases."""

    tokenizer: PreTrainedTokenizerBase
    phases: dict[str, Phase]
    block_size: int
    """Maximum number of tokens per pass, K + 1."""
    system_prompt: str | None = None
    segments: SegmentSettings = field(default_factory=SegmentSettings)
    chat_template: bool = True
    """False: prompts are passed as they are, even if the tokenizer has a chat template."""
    end_ids: list[int] = field(default_factory=list)
    """Tokens that end a text besides the tokenizer's EOS, from the source's generation config."""

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"model.source must have a tokenizer with an EOS token, which ends an answer; "
                f"{name_of(self.tokenizer)} has none: set eos_token in its tokenizer_config.json"
            )
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
        for name, phase in self.phases.items():
            for key, delimiter in (("opened_by", phase.opened_by), ("closed_by", phase.closed_by)):
                if delimiter is not None and self.delimiter_id(delimiter) in self.eos_ids:
                    raise ValueError(
                        f"decoding.phases.{name}.{key} must not be a token that ends a text, got "
                        f"{delimiter!r}; choose another token"
                    )
        self.marks = self.plan().marks
        """Ids of delimiters and end tokens, which no thought or answer may contain as text."""
        check_segments(self.segments, self.phases, "decoding")
        if self.segments.max_segments > 1:
            self._check_alphabet()
        if self.uses_template:
            self._check_template()
        elif self.system_prompt:
            raise ValueError(
                "decoding.system_prompt needs a tokenizer with a chat template, which marks it; "
                f"{name_of(self.tokenizer)} has none: set it to null, or take a model with a "
                "template"
            )

    @property
    def pad_id(self) -> int:
        """Token id that fills rows on the right; never scored."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)  # type: ignore[arg-type]

    @property
    def uses_template(self) -> bool:
        """True if prompts go through the tokenizer's chat template."""
        tokenizer: Any = self.tokenizer
        return self.chat_template and tokenizer.chat_template is not None

    @property
    def eos_id(self) -> int:
        """The tokenizer's EOS."""
        return int(self.tokenizer.eos_token_id)  # type: ignore[arg-type]

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end a text: the tokenizer's EOS first, then `end_ids`."""
        return list(dict.fromkeys([self.eos_id, *self.end_ids]))

    @cached_property
    def turn_end_id(self) -> int:
        """The end token of solved examples: the one after an answer in the chat template.

        The tokenizer's EOS where there is no template, or none of `eos_ids` after an answer.
        """
        if not self.uses_template or len(self.eos_ids) == 1:
            return self.eos_id
        answer = "An answer"
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        _, found, after = self._render(messages, add_generation_prompt=False).rpartition(answer)
        ids = self._encode(after) if found else []
        return next((token for token in ids if token in self.eos_ids), self.eos_id)

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
        if ids[0] in (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id):
            raise ValueError(
                f"delimiter {delimiter!r} must not be the token that ends or fills a text; choose "
                "another in decoding.phases"
            )
        self._delimiter_ids[delimiter] = ids[0]
        return ids[0]

    def _render(self, messages: list[Message], *, add_generation_prompt: bool = True) -> str:
        """Messages through the chat template. Raises ValueError if it refuses them."""
        tokenizer: Any = self.tokenizer
        try:
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, ValueError) as error:
            remedy = "set decoding.chat_template=false to give prompts as they are"
            if len(messages) > 1:
                roles = ", ".join(message["role"] for message in messages)
                remedy = f"the roles are {roles}: take out those that it refuses"
            raise ValueError(
                f"the chat template of {name_of(tokenizer)} refused the messages "
                f"({str(error) or type(error).__name__}); {remedy}"
            ) from None

    def _check_template(self) -> None:
        """Raises ValueError if the chat template loses the user's message or the system prompt."""
        user = {"role": "user", "content": "A question"}
        if user["content"] not in self._render([user]):
            raise ValueError(
                f"the chat template of {name_of(self.tokenizer)} leaves out the user's message; "
                "set decoding.chat_template=false to give prompts as they are"
            )
        if self.system_prompt is None:
            return
        try:
            shown = self._render([{"role": "system", "content": self.system_prompt}, user])
        except ValueError as error:
            raise ValueError(
                f"decoding.system_prompt={self.system_prompt!r} cannot be used: {error}; or set "
                "decoding.system_prompt=null"
            ) from None
        if self.system_prompt.strip() not in shown:
            raise ValueError(
                f"decoding.system_prompt={self.system_prompt!r} does not appear in the prompt: the "
                f"chat template of {name_of(self.tokenizer)} has no place for it; set it to null"
            )

    def _check_alphabet(self) -> None:
        """Raises ValueError if the tokenizer cannot write commands or the memory file."""
        lacking = unknown_characters(self.tokenizer, ALPHABET)
        if lacking:
            raise ValueError(
                f"decoding.segments.max_segments={self.segments.max_segments} needs a tokenizer "
                f"that knows the characters of memory commands, but not {lacking}; train a "
                "tokenizer with them or set it to 1"
            )

    def plan(self, mode: str = "fast") -> PhasePlan:
        """The phases as the pass loop takes them.

        `fast` runs each phase in its own mode, `slow` and `verified` run all in that mode.
        """

        def ids(delimiters: list[str | None]) -> list[int | None]:
            return [None if d is None else self.delimiter_id(d) for d in delimiters]

        return make_plan(
            list(self.phases.values()),
            ids([phase.opened_by for phase in self.phases.values()]),
            block_size=self.block_size,
            eos_ids=self.eos_ids,
            mode=mode,
            closed_by=ids([phase.closed_by for phase in self.phases.values()]),
        )

    def prompt_ids(self, prompt: str) -> list[int]:
        """The prompt, through the chat template if it is used, followed by the first delimiter."""
        return self.conversation_ids([{"role": "user", "content": prompt}])

    def question_ids(self, example: Example) -> list[int]:
        """The prompt of an example with its system message and earlier turns."""
        return self.conversation_ids(example.conversation)

    def conversation_ids(self, messages: list[Message]) -> list[int]:
        """A conversation whose last message is the user's, as a prompt for the next answer.

        A system message of its own replaces `system_prompt`. Without a chat template the speakers
        cannot be marked, so only the last message is used.
        """
        leading: list[int] = []
        if not self.uses_template:
            text, leading = messages[-1]["content"], self.leading_ids
        else:
            text = self._render(self._with_system(messages))
        if self.opener is not None and not text.rstrip().endswith(self.opener):
            text += self.opener
        return [*leading, *self._encode(text)]

    def _with_system(self, messages: list[Message]) -> list[Message]:
        """The messages after `system_prompt`, unless they begin with a system message."""
        if self.system_prompt is None or messages[0]["role"] in SYSTEM_ROLES:
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    @cached_property
    def leading_ids(self) -> list[int]:
        """Ids that the tokenizer puts before a text, such as BOS; a chat template writes its own.

        A token that it puts after a text is left out, since the completion follows there.
        """
        return leading_ids(self.tokenizer)

    def is_longer(self, example: Example, limit: int, completion: str = "") -> bool | None:
        """True if a prompt and a completion have more tokens than `limit`, by their characters.

        None if the number of characters does not decide. No token has more characters than the
        longest in the vocabulary, and ASCII text has no more tokens than characters.
        """
        # A template may take white space off.
        fewest = sum(len(message["content"].strip()) for message in example.conversation)
        if fewest + len(completion) > limit * self._longest_token:
            return True
        if example.has_context or not (example.prompt.isascii() and completion.isascii()):
            return None
        most = len(example.prompt) + len(completion) + self._frame
        return False if most <= limit else None

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def _frame(self) -> int:
        """Upper bound on the tokens around a prompt, a thought and an answer."""
        return len(self.prompt_ids("a")) + 32

    def check_prompt(self, prompt: str, where: str = "the prompt") -> None:
        """Raises ValueError for a prompt that the model would misread.

        The text of a special token would break the roles of a chat template. Without a template the
        tokenizer reads it as that token, which is accepted.
        """
        if any(0xD800 <= ord(character) < 0xE000 for character in prompt):
            raise ValueError(f"{where} must be UTF-8 text, got {prompt!a:.80}")
        self._check_known(prompt, where)
        if not self.uses_template:
            return
        found = find_token(self.tokenizer, prompt, self._special_ids)
        if found is not None:
            raise ValueError(
                f"{where} must not hold the special token {found!r}, which would break the roles "
                "of the chat template; take it out, or set decoding.chat_template=false to give "
                "prompts as they are"
            )

    @cached_property
    def _special_ids(self) -> set[int]:
        return special_ids(self.tokenizer) | self.marks

    def _check_known(self, text: str, where: str) -> None:
        unknown = unknown_characters(self.tokenizer, text)
        if unknown:
            raise ValueError(
                f"the model's tokenizer does not know {' '.join(map(repr, unknown[:5]))} in "
                f"{where}; take them out or choose another model"
            )

    def checked(self, example: Example, where: str) -> Example:
        """The example without the delimiters that data may have around its thought.

        Raises ValueError naming `where` the example is from if a delimiter or an end token is
        within its thought or answer, or if the tokenizer does not know a character.
        """
        for message in example.conversation:
            self.check_prompt(message["content"], f"the prompt of {where}")
        if example.has_context:
            self._check_conversation(example, where)
        texts = {"answer": example.answer, "memory": example.memory, "note": example.note}
        if example.thought is not None and self.closer is not None:
            texts["thought"] = self.bare_thought(example.thought)
        for name, text in texts.items():
            found = find_token(self.tokenizer, text, self.marks)
            if found is not None:
                raise ValueError(
                    f"the {name} of {where} must not hold {found!r}, which ends a phase or a text; "
                    "take it out, and give a thought in a column of its own"
                )
            self._check_known(text, f"the {name} of {where}")
        thought = texts.get("thought", example.thought)
        return example if thought == example.thought else replace(example, thought=thought)

    def _check_conversation(self, example: Example, where: str) -> None:
        """Raises ValueError if the chat template cannot show every message of the example."""
        roles = ", ".join(message["role"] for message in example.messages)
        if not self.uses_template:
            has_none = getattr(self.tokenizer, "chat_template", None) is None
            raise ValueError(
                f"the prompt of {where} has several messages ({roles}), which only a chat template "
                + (
                    f"can mark, and {name_of(self.tokenizer)} has none: choose a model with a chat "
                    "template, or set chat_template in its tokenizer_config.json"
                    if has_none
                    else "can mark: set decoding.chat_template=true"
                )
            )
        try:
            shown = self._render(self._with_system(example.conversation))
        except ValueError as error:
            raise ValueError(f"the prompt of {where} cannot be used: {error}") from None
        for message in example.messages:
            if message["content"].strip() not in shown:
                raise ValueError(
                    f"the chat template of {name_of(self.tokenizer)} leaves out the "
                    f"{message['role']} message {message['content'][:80]!r} of {where}; take the "
                    "message out, or choose a model whose template has a place for it"
                )

    def bare_thought(self, thought: str) -> str:
        """A thought without its own delimiters: `<think>2+2</think>` -> `2+2`."""
        bare = thought.strip().removeprefix(self.opener or "").removesuffix(self.closer or "")
        return thought if bare == thought.strip() else bare.strip()

    def read_back(self, answer: str) -> str:
        """An answer as it would be read from a completion."""
        return str(self.tokenizer.decode(self._encode(answer))).strip()

    def completion_ids(self, thought: str | None, answer: str) -> list[int]:
        """`thought </think> answer <eos>`; without a thought phase `answer <eos>`."""
        return [*self.thought_ids(thought), *self.bare_answer_ids(answer)]

    def bare_answer_ids(self, answer: str) -> list[int]:
        """`answer <eos>`, the part after the thought."""
        return [*self._encode(answer), self.turn_end_id]

    def thought_ids(self, thought: str | None) -> list[int]:
        """`thought </think>`, the part between the prompt and the answer."""
        if self.closer is None:
            return []
        return [*self._encode(thought or ""), self.delimiter_id(self.closer)]

    def split(self, ids: list[int]) -> tuple[list[int], list[int] | None]:
        """Completion ids -> ids of the thought (its closing delimiter included) and of the answer.

        The thought ends at the delimiter that closes it; where the text opens it again, at the last
        one that does. A closing delimiter within the answer is part of the answer: otherwise text
        after the thought could be a second thought that nobody sees as one.

        The answer is None if the thought is not closed, or the sequence never ended.
        """
        ended = bool(ids) and ids[-1] in self.eos_ids
        body = ids[:-1] if ended else ids
        if self.closer is None:
            return [], body if ended else None
        opener = None if self.opener is None else self.delimiter_id(self.opener)
        closer = self.delimiter_id(self.closer)
        cut, is_open = 0, True
        for i, token in enumerate(body, 1):
            if token == opener:
                is_open = True
            elif token == closer and is_open:
                cut, is_open = i, False
        if is_open:
            return body, None
        return body[:cut], body[cut:] if ended else None

    def thought_of(self, ids: list[int]) -> list[int]:
        """Completion ids -> ids of the thought up to its summary, with its closing delimiter."""
        thought, _ = self.split(ids)
        summary = next((i for i, token in enumerate(thought) if token in self.summary_ids), None)
        return thought if summary is None else thought[: summary + 1]

    def thought_text(self, *segments: list[int]) -> str:
        """Text of a thought, given the ids of each segment, without closing delimiters."""
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
        """The answer of a completion whose thought is part of its prompt."""
        if not ids or ids[-1] not in self.eos_ids:
            return None
        return str(self.tokenizer.decode(ids[:-1])).strip()

    def example_ids(self, example: Example) -> tuple[list[int], list[int]]:
        """(prompt ids, completion ids) of a solved example in one segment."""
        return self.question_ids(example), self.completion_ids(example.thought, example.answer)

    def example_segments(self, example: Example) -> list[tuple[list[int], list[int]]]:
        """(context ids, completion ids) of each segment of a solved example.

        A thought within its budget is one segment. A longer one is split into segments of as many
        whole steps as fit. Steps end at `;` or a line's end, and each summary records the last step
        as `write done STEP`. The last allowed segment holds the rest.

        With a shared memory the first context has that of `Example.memory`, and the first summary
        writes `Example.note` too. An example with a note has at least one summary.

        Raises ValueError naming the key if a summary is longer than its budget, or the memory.
        """
        prompt, completion = self.example_ids(example)
        names, limit = list(self.phases), self.segments.max_segments
        is_shared = self.segments.is_shared
        note = example.note if is_shared else ""
        budget = self.phases[names[0]].max_tokens
        if limit == 1:
            return [(prompt, completion)]
        plan = self.plan()
        opener, closer = summary_marks(plan)
        memory = Memory.read(example.memory) if is_shared else Memory()
        told = Trajectory(prompt, plan, self.segments, self.tokenizer, memory)
        if (budget is None or example.thought is None) and not note:
            return [(told.context, completion)]
        room = math.inf if budget is None else budget
        samples: list[tuple[list[int], list[int]]] = []
        steps = re.findall(r"[^;\n]*[;\n]?", example.thought or "")
        rest = [self._encode(step) for step in steps if step]
        while len(samples) + 1 < limit and (note or sum(map(len, rest)) > room):
            number = max(1, sum(total <= room for total in accumulate(map(len, rest))))
            said, rest = rest[:number], rest[number:]
            lines = [note] if note else []
            if said:
                done = str(self.tokenizer.decode(said[-1])).rstrip(";\n")
                lines.append(f"write {DONE} {done}")
            summary, note = self._encode("\n".join(lines)), ""
            self._check_summary(summary, plan)
            thought = [token for step in said for token in step]
            samples.append((told.context, [*thought, opener, *summary, closer]))
            told.add(samples[-1][1], closed=True)
            if is_shared and told.memory.num_ignored:
                raise ValueError(
                    "decoding.segments.memory_tokens must be large enough for what solved examples "
                    f"write, {self.tokenizer.decode(summary)!r} after {example.memory!r}, got "
                    f"{self.segments.memory_tokens}; raise it"
                )
        thought = [token for step in rest for token in step]
        answer = completion[len(self.thought_ids(example.thought)) :]
        last = [*thought, *self.thought_ids(""), *answer]
        return [*samples, (told.context, last)]

    def _check_summary(self, summary: list[int], plan: PhasePlan) -> None:
        """Raises ValueError if decoding would cut the summary of a solved example."""
        phase = next(p for p, closer in enumerate(plan.closed_by) if closer is not None)
        limit = plan.max_tokens[phase]
        if limit is not None and len(summary) > limit:
            raise ValueError(
                f"decoding.phases.{list(self.phases)[phase]}.max_tokens must be at least "
                f"{len(summary)} for solved examples, got {limit}: they write "
                f"{self.tokenizer.decode(summary)!r}"
            )

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
