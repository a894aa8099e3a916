"""Block and token: the channels of ordinary runs, behind the interface of the comparators.

Loss and decoding are those of `mtp/training` and `mtp/modeling`: this file only calls them, so that
one measurement and one table hold all channels. Training is `train.py` with `channel.name=text`.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..modeling.decode import decode
from ..modeling.decode_options import DecodeOptions
from ..modeling.phases import PhasePlan
from ..modeling.records import pad
from ..modeling.sampler import Sampler
from ..rollouts.legibility import thought_passes
from ..rollouts.prompt_format import PromptFormat
from ..rollouts.rollout import sample
from ..tasks.base import Example
from ..training.collate import collate_text
from ..training.objectives import replay_batch
from .channel import Channel, WriteOptions, Written
from .reading import Inputs, embedded
from .segments import context, memory_ids


class Block(Channel):
    """The tokens of main and its head: all of a pass in a thought, main's in the answer."""

    has_log_prob = True
    mode: ClassVar[str] = "fast"

    def supervised_loss(
        self, model: Any, fmt: PromptFormat, examples: list[Example], *, step: int, seed: int
    ) -> Tensor:
        samples = [sample for example in examples for sample in fmt.example_segments(example)]
        plan = fmt.plan("fast")
        batch = collate_text(samples, plan, fmt.block_size, fmt.pad_id).to(model.device)
        uses_head = self.mode == "fast"
        scored = replay_batch(model, batch, channel_gradient=1.0, use_head=uses_head)
        loss = scored.main.cross_entropy().loss / len(batch.main)
        if uses_head and len(batch.head):
            loss = loss + scored.head.cross_entropy().loss / len(batch.head)
        return loss

    def write(
        self, model: Any, fmt: PromptFormat, examples: list[Example], options: WriteOptions
    ) -> list[Written]:
        generator = torch.Generator(device=model.device).manual_seed(options.seed)
        decoding = DecodeOptions(
            sampler=options.sampler, max_new_tokens=options.max_new_tokens, generator=generator
        )
        plan = fmt.plan(self.mode)
        batch = sample(model, fmt, examples, plan, decoding)
        passes = batch.total(batch.out.passes).tolist()
        thoughts = thought_passes(batch, fmt).tolist()
        contexts = [batch.prompts[segment] for segment in batch.last]
        completions = [batch.completion(row) for row in range(len(batch))]
        prefixes = [fmt.split(ids)[0] for ids in completions]
        rests = [ids[len(prefix) :] for ids, prefix in zip(completions, prefixes, strict=True)]
        answers = [fmt.answer_text(ids) for ids in completions]
        closing = fmt.thought_ids("")
        closed = [i for i, ids in enumerate(prefixes) if ids[-1:] == closing]
        if closed and options.sampler.temperature > 0 and not options.sample_answer:
            greedy = replace(decoding, sampler=Sampler(temperature=0), pad_id=fmt.pad_id)
            found = continuations(
                model,
                [contexts[i] + prefixes[i] for i in closed],
                [options.max_new_tokens - len(prefixes[i]) for i in closed],
                plan.as_last_segment(),
                greedy,
            )
            for i, rest in zip(closed, found, strict=True):
                rests[i], answers[i] = rest, fmt.bare_answer_text(rest)
        out = []
        for i, prefix in enumerate(prefixes):
            trace = fmt.thought_text(*batch.completions(i))
            message, text = None, [*prefix, *rests[i]]
            if fmt.segments.max_segments > 1:
                message = memory_ids(fmt, examples[i], contexts[i])
            elif i in set(closed):
                message, text = prefix[:-1], text[len(prefix) - 1 :]
            vectors = None if message is None else embedded(model, message).detach()
            out.append(Written(answers[i], passes[i], int(thoughts[i]), trace, vectors, text))
        return out

    def answer_inputs(
        self, model: Any, fmt: PromptFormat, example: Example, output: Written, message: Tensor
    ) -> Inputs:
        """Inputs as in other channels; between segments the message is the memory file."""
        if fmt.segments.max_segments == 1:
            return super().answer_inputs(model, fmt, example, output, message)
        return context(fmt, model, fmt.prompt_ids(example.prompt), message, output.text)


def continuations(
    model: Any,
    texts: list[list[int]],
    limits: list[int],
    plan: PhasePlan,
    options: DecodeOptions,
) -> list[list[int]]:
    """What the model writes after each text, at most as many tokens as the text's limit.

    All texts share a limit within a call of `decode`, so it is called again for those that go on
    beyond the smallest one.
    """
    out: list[list[int]] = [[] for _ in texts]
    running = [i for i, limit in enumerate(limits) if limit > 0]
    while running:
        most = min(limits[i] - len(out[i]) for i in running)
        tokens, lengths = pad([texts[i] + out[i] for i in running], options.pad_id)
        tokens, lengths = tokens.to(model.device), lengths.to(model.device)
        added = decode(model, tokens, lengths, plan, replace(options, max_new_tokens=most))
        for row, i in enumerate(running):
            out[i] += added.completion(row)
        running = [i for i in running if out[i][-1] not in plan.eos_ids and len(out[i]) < limits[i]]
    return out


class Token(Block):
    """Main's token alone."""

    mode = "slow"
