"""Text to tokens and back, in one place: prompts, chat templates, thoughts and final answers.

A completion is `thought </think> answer <eos>`: the prompt ends with the delimiter that opens the
first phase, as chat templates of thinking models do. Delimiters come from the decoding phases.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .generation_mtp import Phase, PhasePlan, make_plan
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
        self.opener = self.phases[names[0]].opened_by
        self.closer = self.phases[names[-1]].opened_by
        for phase in self.phases.values():
            if phase.opened_by is not None:
                self.delimiter_id(phase.opened_by)

    @property
    def pad_id(self) -> int:
        """Fills rows on the right; never scored."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)  # type: ignore[arg-type]

    @property
    def eos_id(self) -> int:
        """Ends a sequence."""
        return int(self.tokenizer.eos_token_id)  # type: ignore[arg-type]

    def delimiter_id(self, delimiter: str) -> int:
        """Id of a delimiter. Raises ValueError if the tokenizer has no single token for it."""
        ids = self.tokenizer.encode(delimiter, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise ValueError(
                f"delimiter {delimiter!r} must be one token of the tokenizer, got {len(ids)}; add "
                "it to model.add_tokens or choose another in decoding.phases"
            )
        return ids[0]

    def plan(self, mode: str = "fast") -> PhasePlan:
        """The phases as the pass loop takes them: `fast` runs each in its own mode, `slow` and
        `verified` run all in that mode.
        """
        return make_plan(
            list(self.phases.values()),
            [
                None if p.opened_by is None else self.delimiter_id(p.opened_by)
                for p in self.phases.values()
            ],
            num_slots=self.num_slots,
            eos_ids=[self.eos_id],
            mode=mode,
        )

    def prompt_ids(self, prompt: str) -> list[int]:
        """The prompt through the chat template, ended by the first phase's delimiter."""
        return self.conversation_ids([{"role": "user", "content": prompt}])

    def conversation_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation that the user spoke last in, as a prompt for the next answer.

        Without a chat template there is no way to tell who speaks: the last message alone.
        """
        tokenizer: Any = self.tokenizer
        if tokenizer.chat_template is None:
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

    def thought_text(self, ids: list[int]) -> str:
        """Text of a thought without its closing delimiter."""
        thought, _ = self.split(ids)
        if self.closer is not None and thought and thought[-1] == self.delimiter_id(self.closer):
            thought = thought[:-1]
        return self.tokenizer.decode(thought)  # type: ignore[return-value]

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
        """(prompt ids, completion ids) of a solved example."""
        return self.prompt_ids(example.prompt), self.completion_ids(example.thought, example.answer)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
