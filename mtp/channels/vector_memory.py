"""Vector memory: between segments, m vectors in place of the text memory file.

Segments, contexts and budgets are those of text (`mtp/modeling/segments.py`). The context of a
later segment is

    prompt <summary> v_1 ... v_m </summary> <think>

with vectors in place of the file's text. They are main's last hidden vectors at m positions after
the `<summary>` of the segment before, whose inputs are learned, through a learned projection: the
memory tokens of the Recurrent Memory Transformer (Bulatov et al., arXiv 2207.06881). One pass reads
`<summary>` and writes all of them, where a text summary needs a pass for each token.

Training is on solved text, divided into segments as that of the text memory. The loss is that of
all segments. For `text_steps` a segment reads the embeddings of the last m tokens of the text that
the memory file would have, and main's own vectors learn to equal them. So it can read and write a
memory before the two have to agree. Afterwards a segment reads main's own vectors, and the gradient
passes through them to the segments before. So an example needs one pass for each segment, in
sequence. `num_vectors=0`: later segments read the prompt alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..common.bounds import bounded
from ..modeling.segments import split_summary, summary_marks
from ..rollouts.prompt_format import PromptFormat
from ..tasks.base import Example, Task
from .channel import Channel, WriteOptions, Written
from .reading import Inputs, Reader, embedded, logits_of
from .segments import context, memory_ids
from .writing import continue_text


@dataclass(kw_only=True)
class VectorMemoryOptions:
    """Settings of `channel.name=vector_memory`."""

    num_vectors: int = bounded(2, at_least=0, at_most=1000)
    """Number of vectors that a segment passes on."""
    text_steps: int = bounded(150, at_least=0)
    """Optimizer steps in which the vectors are embeddings of the text memory file's last tokens."""


class VectorMemory(Channel):
    """Vectors between segments."""

    options_class = VectorMemoryOptions
    has_log_prob = True

    def __init__(self, options: VectorMemoryOptions, width: int, scale: float = 1.0):
        """scale: root mean square of the inputs of main, which vectors begin with too. Larger ones
        would hide their positions where main adds position embeddings.
        """
        super().__init__(options, width)
        self.queries = nn.Parameter(scale * torch.randn(options.num_vectors, width))
        """[m, D] inputs of the positions that write the memory."""
        self.projection = nn.Linear(width, width)
        nn.init.normal_(self.projection.weight, std=scale / width**0.5)
        nn.init.zeros_(self.projection.bias)

    @classmethod
    def of(cls, options: VectorMemoryOptions, model: Any) -> "VectorMemory":
        weight = model.get_input_embeddings().weight
        return cls(options, weight.shape[1], float(weight.detach().square().mean().sqrt()))

    def check(self, fmt: PromptFormat, task: Task) -> None:
        key = "decoding.segments"
        if fmt.segments.max_segments == 1:
            raise ValueError(
                f"{key}.max_segments must be above 1 for channel.name=vector_memory, got 1; use "
                "decoding=segments"
            )
        if fmt.segments.recent_tokens:
            raise ValueError(
                f"{key}.recent_tokens must be 0 for channel.name=vector_memory, got "
                f"{fmt.segments.recent_tokens}: a segment passes on vectors only"
            )
        if thought_budget(fmt) is None:
            raise ValueError(
                f"decoding.phases.{next(iter(fmt.phases))}.max_tokens must be a number for "
                "channel.name=vector_memory, got null: it divides solved thoughts into segments"
            )

    def begins_level(self, step: int) -> bool:
        return 0 < step == self.options.text_steps

    def supervised_loss(
        self, model: Any, fmt: PromptFormat, examples: list[Example], *, step: int, seed: int
    ) -> Tensor:
        if step < self.options.text_steps:
            return self.text_loss(model, fmt, examples)
        segments = [solved_segments(fmt, example) for example in examples]
        prompts = [fmt.prompt_ids(example.prompt) for example in examples]
        memories: dict[int, Tensor] = {}
        scores = []
        for number in range(max(map(len, segments))):
            chosen = [i for i, one in enumerate(segments) if number < len(one)]
            rows = [
                context(fmt, model, prompts[i], memories.get(i), segments[i][number])
                for i in chosen
            ]
            closed = [number + 1 < len(segments[i]) for i in chosen]
            log_probs, written = self.read_segment(model, rows, closed)
            scores += log_probs
            memories = dict(zip(chosen, written, strict=True))
        return -torch.cat(scores).mean()

    def text_loss(self, model: Any, fmt: PromptFormat, examples: list[Example]) -> Tensor:
        """The loss where each memory is the last tokens of the file, and that of writing them.

        The second is the squared error of a segment's own vectors, relative to the embeddings that
        the next segment reads.
        """
        rows: list[Inputs] = []
        closed: list[bool] = []
        for example in examples:
            prompt, texts = fmt.prompt_ids(example.prompt), solved_segments(fmt, example)
            closed += [*[True] * (len(texts) - 1), False]
            for (before, _), text in zip(fmt.example_segments(example), texts, strict=True):
                file = memory_ids(fmt, example, before)
                memory = None
                if file is not None:
                    memory = embedded(model, file[max(0, len(file) - self.options.num_vectors) :])
                rows.append(context(fmt, model, prompt, memory, text))
        log_probs, written = self.read_segment(model, rows, closed)
        loss = -torch.cat(log_probs).mean()
        pairs = [(written[i], rows[i + 1].message.detach()) for i, one in enumerate(closed) if one]
        own = torch.cat([vectors[: len(target)] for vectors, target in pairs] or [loss[None, None]])
        if not pairs or not own.numel():
            return loss
        targets = torch.cat([target for _, target in pairs])
        return loss + (own - targets).square().mean() / targets.square().mean()

    def read_segment(
        self, model: Any, rows: list[Inputs], closed: list[bool]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """One pass over a segment of each row.

        closed: True for rows whose last scored id, `<summary>`, is read too, and the queries after
        it. Returns log p of each scored id, and the memory [m, D] of closed rows, else [0, D].
        """
        inputs = []
        for row, writes in zip(rows, closed, strict=True):
            ids = row.after + (row.scored if writes else row.scored[:-1])
            parts = [embedded(model, row.before), row.message, embedded(model, ids)]
            inputs.append(torch.cat([*parts, self.queries] if writes else parts))
        padded = pad_sequence(inputs, batch_first=True)
        hidden = model.mtp_decoder(inputs_embeds=padded, use_cache=False).last_hidden_state
        log_p = logits_of(model, hidden).log_softmax(-1)
        log_probs, memories = [], []
        for b, row in enumerate(rows):
            first = len(row.before) + len(row.message) + len(row.after) - 1
            at = log_p[b, first : first + len(row.scored)]
            targets = torch.tensor(row.scored, device=at.device)
            log_probs.append(at.gather(-1, targets[:, None])[:, 0])
            end = len(inputs[b])
            number = len(self.queries) if closed[b] else 0
            memories.append(self.projection(hidden[b, end - number : end]))
        return log_probs, memories

    @torch.no_grad()
    def write(
        self, model: Any, fmt: PromptFormat, examples: list[Example], options: WriteOptions
    ) -> list[Written]:
        prompts = [fmt.prompt_ids(example.prompt) for example in examples]
        assert fmt.closer is not None
        closer, (opener, _) = fmt.delimiter_id(fmt.closer), summary_marks(fmt.plan())
        limit = thought_budget(fmt)
        assert limit is not None
        texts: list[list[list[int]]] = [[] for _ in examples]
        memories: dict[int, Tensor] = {}
        running = list(range(len(examples)))
        for number in range(fmt.segments.max_segments):
            is_last = number + 1 == fmt.segments.max_segments
            reader, hidden = self.begin_segment(
                model, fmt, [prompts[i] for i in running], [memories.get(i) for i in running]
            )
            found = continue_text(
                reader,
                hidden,
                options,
                closer=closer,
                ends=fmt.eos_ids if is_last else [opener, *fmt.eos_ids],
                budget=(limit, closer if is_last else opener),
            )
            for i, ids in zip(running, found, strict=True):
                texts[i].append(ids)
            closed = [not is_last and ids[-1] == opener for ids in found]
            if not any(closed):
                break
            queries = torch.cat([embedded(model, [opener]), self.queries])
            read = queries[None].expand(len(found), -1, -1)
            written = self.projection(reader.read(read)[:, 1:])
            memories |= {
                i: memory for i, memory, one in zip(running, written, closed, strict=True) if one
            }
            running = [i for i, one in zip(running, closed, strict=True) if one]
        # A delimiter that a budget forces needs no pass, as in text.
        forced = [
            sum(len(ids) > limit and closer not in ids[:limit] for ids in mine) for mine in texts
        ]
        return [
            Written(
                answer=fmt.answer_text(ids[-1]),
                # A pass for each id, and one that reads `<summary>` and writes the vectors.
                passes=sum(map(len, ids)) + len(ids) - 1 - forced[i],
                thought_passes=sum(len(fmt.thought_of(one)) for one in ids) - forced[i],
                trace=fmt.thought_text(*ids),
                vectors=memories.get(i),
                text=ids[-1],
            )
            for i, ids in enumerate(texts)
        ]

    def begin_segment(
        self,
        model: Any,
        fmt: PromptFormat,
        prompts: list[list[int]],
        memories: list[Tensor | None],
    ) -> tuple[Reader, Tensor]:
        """The reader after the contexts of a segment, and its last hidden rows [B, D].

        Memories are all None, or all [m, D].
        """
        no_text = [context(fmt, model, p, m, []) for p, m in zip(prompts, memories, strict=True)]
        reader = Reader(model, [row.before for row in no_text], fmt.pad_id)
        hidden = reader.read_prompts()
        if no_text[0].after:
            after = embedded(model, no_text[0].after)
            hidden = reader.read(torch.stack([torch.cat([r.message, after]) for r in no_text]))
        return reader, hidden[:, -1]

    def answer_inputs(
        self, model: Any, fmt: PromptFormat, example: Example, output: Written, message: Tensor
    ) -> Inputs:
        """The last segment, which reads the message as its memory."""
        return context(fmt, model, fmt.prompt_ids(example.prompt), message, output.text)


def solved_segments(fmt: PromptFormat, example: Example) -> list[list[int]]:
    """Ids of each segment of a solved example: its thought and `<summary>`, at last the answer."""
    plan = fmt.plan()
    opener, _ = summary_marks(plan)
    *before, last = [ids for _, ids in fmt.example_segments(example)]
    return [*([*split_summary(ids, plan)[0], opener] for ids in before), last]


def thought_budget(fmt: PromptFormat) -> int | None:
    """Maximum number of tokens of a segment's thought."""
    return next(iter(fmt.phases.values())).max_tokens
