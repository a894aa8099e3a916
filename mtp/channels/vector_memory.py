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

With `decoding.segments.memory_scope=shared` the vectors pass on to the next problem of a project
too: its first segment reads those that the last closed segment wrote. They are passed on as they
are, so the progress line `done`, which a text memory drops there, stays in what they encode. An
example then needs a pass for each segment of its project.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..common.bounds import bounded
from ..modeling.segments import split_summary, summary_marks
from ..rollouts.prompt_format import PromptFormat
from ..tasks.base import Example, Task
from ..tasks.projects import projects_of
from .channel import Channel, WriteOptions, Written
from .reading import Inputs, Reader, embedded, log_probs_at, read_in_parallel
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

    def last_level_begins(self) -> int:
        return int(self.options.text_steps)

    def supervised_loss(
        self, model: Any, fmt: PromptFormat, examples: list[Example], *, step: int, seed: int
    ) -> Tensor:
        if step < self.options.text_steps:
            return self.text_loss(model, fmt, examples)
        texts = [solved_segments(fmt, example) for example in examples]
        prompts = [fmt.question_ids(example) for example in examples]
        # (example, its segment) in the order in which vectors pass through them
        chains = [
            [(i, number) for i in chain for number in range(len(texts[i]))]
            for chain in chains_of(fmt, examples)
        ]
        memories: dict[int, Tensor] = {}
        scores = []
        for at in range(max(map(len, chains))):
            chosen = [c for c, chain in enumerate(chains) if at < len(chain)]
            segments = [chains[c][at] for c in chosen]
            rows = [
                context(fmt, model, prompts[i], memories.get(c), texts[i][number])
                for c, (i, number) in zip(chosen, segments, strict=True)
            ]
            closed = [number + 1 < len(texts[i]) for i, number in segments]
            log_probs, written = self.read_segment(model, rows, closed)
            scores += log_probs
            found = zip(chosen, written, closed, strict=True)
            memories |= {c: memory for c, memory, is_closed in found if is_closed}
        return -torch.cat(scores).mean()

    def text_loss(self, model: Any, fmt: PromptFormat, examples: list[Example]) -> Tensor:
        """The loss where each memory is the last tokens of the file, and that of writing them.

        The second is the squared error of a segment's own vectors, relative to the embeddings that
        the next segment reads.
        """
        rows: list[Inputs] = []
        closed: list[bool] = []
        for chain in chains_of(fmt, examples):
            memory: Tensor | None = None
            for example in (examples[i] for i in chain):
                prompt, texts = fmt.question_ids(example), solved_segments(fmt, example)
                contexts = [before for before, _ in fmt.example_segments(example)]
                closed += [*[True] * (len(texts) - 1), False]
                for number, (before, text) in enumerate(zip(contexts, texts, strict=True)):
                    file = memory_ids(fmt, example, before)
                    if number and file is not None:
                        first = max(0, len(file) - self.options.num_vectors)
                        memory = embedded(model, file[first:])
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
        hidden = read_in_parallel(model, pad_sequence(inputs, batch_first=True))
        at, memories = [], []
        for b, row in enumerate(rows):
            first = len(row.before) + len(row.message) + len(row.after) - 1
            at.append(hidden[b, first : first + len(row.scored)])
            end = len(inputs[b])
            number = len(self.queries) if closed[b] else 0
            memories.append(self.projection(hidden[b, end - number : end]))
        return log_probs_at(model, at, [row.scored for row in rows]), memories

    @torch.no_grad()
    def write(
        self, model: Any, fmt: PromptFormat, examples: list[Example], options: WriteOptions
    ) -> list[Written]:
        out: dict[int, Written] = {}
        chains = chains_of(fmt, examples)
        memories: list[Tensor | None] = [None] * len(chains)
        calls = 0
        for place in range(len(chains[0])):
            # The rows of a pass have equally many vectors: all of them have a memory, or none.
            without = [c for c, memory in enumerate(memories) if memory is None]
            others = [c for c, memory in enumerate(memories) if memory is not None]
            for chosen in filter(None, (without, others)):
                numbers = [chains[c][place] for c in chosen]
                written, after = self.write_problems(
                    model,
                    fmt,
                    [examples[i] for i in numbers],
                    replace(options, seed=options.seed + calls),
                    [memories[c] for c in chosen],
                )
                calls += 1
                out |= dict(zip(numbers, written, strict=True))
                for c, memory in zip(chosen, after, strict=True):
                    memories[c] = memory
        return [out[i] for i in range(len(examples))]

    def write_problems(
        self,
        model: Any,
        fmt: PromptFormat,
        examples: list[Example],
        options: WriteOptions,
        begin: list[Tensor | None],
    ) -> tuple[list[Written], list[Tensor | None]]:
        """Outputs of problems that do not depend on each other, and the memories after them.

        begin: memory in which each begins; all None, or all [m, D].
        """
        prompts = [fmt.question_ids(example) for example in examples]
        assert fmt.closer is not None
        closer, (opener, _) = fmt.delimiter_id(fmt.closer), summary_marks(fmt.plan())
        limit = thought_budget(fmt)
        assert limit is not None
        texts: list[list[list[int]]] = [[] for _ in examples]
        memories = list(begin)
        running = list(range(len(examples)))
        for number in range(fmt.segments.max_segments):
            is_last = number + 1 == fmt.segments.max_segments
            reader, hidden = self.begin_segment(
                model, fmt, [prompts[i] for i in running], [memories[i] for i in running]
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
            for i, memory, one in zip(running, written, closed, strict=True):
                if one:
                    memories[i] = memory
            running = [i for i, one in zip(running, closed, strict=True) if one]
        # A delimiter that a budget forces needs no pass, as in text.
        forced = [
            sum(len(ids) > limit and closer not in ids[:limit] for ids in mine) for mine in texts
        ]
        outputs = [
            Written(
                answer=fmt.answer_text(ids[-1]),
                # A pass for each id, and one that reads `<summary>` and writes the vectors.
                passes=sum(map(len, ids)) + len(ids) - 1 - forced[i],
                thought_passes=sum(len(fmt.thought_of(one)) for one in ids) - forced[i],
                trace=fmt.thought_text(*ids),
                vectors=memories[i],
                text=ids[-1],
            )
            for i, ids in enumerate(texts)
        ]
        return outputs, memories

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
        return context(fmt, model, fmt.question_ids(example), message, output.text)


def chains_of(fmt: PromptFormat, examples: list[Example]) -> list[list[int]]:
    """Numbers of the examples that vectors pass through in turn: single ones, or projects."""
    size = projects_of(examples) if fmt.segments.is_shared else 1
    return [list(range(at, at + size)) for at in range(0, len(examples), size)]


def solved_segments(fmt: PromptFormat, example: Example) -> list[list[int]]:
    """Ids of each segment of a solved example: its thought and `<summary>`, at last the answer."""
    plan = fmt.plan()
    opener, _ = summary_marks(plan)
    *before, last = [ids for _, ids in fmt.example_segments(example)]
    return [*([*split_summary(ids, plan)[0], opener] for ids in before), last]


def thought_budget(fmt: PromptFormat) -> int | None:
    """Maximum number of tokens of a segment's thought."""
    return next(iter(fmt.phases.values())).max_tokens
