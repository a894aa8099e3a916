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
from ..modeling.records import pad
from ..modeling.sampler import Sampler
from ..rollouts.legibility import thought_passes
from ..rollouts.prompt_format import PromptFormat
from ..rollouts.rollout import sample
from ..tasks.base import Example
from ..training.collate import collate_text
from ..training.objectives import replay_batch
from ..training.stage import AnchorsConfig
from .channel import Channel, WriteOptions, Written, plain_text
from .reading import Inputs, embedded
from .segments import context, memory_ids


class Block(Channel):
    """The tokens of main and its head: all of a pass in a thought, main's in the answer."""

    options_class = AnchorsConfig
    has_log_prob = True
    mode: ClassVar[str] = "fast"

    def supervised_loss(
        self, model: Any, fmt: PromptFormat, examples: list[Example], *, step: int, seed: int
    ) -> Tensor:
        samples = [sample for example in examples for sample in fmt.example_segments(example)]
        plan = fmt.plan("fast")
        batch = collate_text(
            samples,
            plan,
            fmt.block_size,
            fmt.pad_id,
            num_anchors=self.options.num_anchors,
            block_anchors=self.options.block_anchors,
            anchor_seeds=range(seed, seed + len(samples)),
        ).to(model.device)
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
            tokens, lengths = pad([contexts[i] + prefixes[i] for i in closed], fmt.pad_id)
            left = torch.tensor([options.max_new_tokens - len(prefixes[i]) for i in closed])
            greedy = replace(
                decoding, sampler=Sampler(temperature=0), pad_id=fmt.pad_id, limits=left
            )
            device = model.device
            last = plan.as_last_segment()
            again = decode(model, tokens.to(device), lengths.to(device), last, greedy)
            for row, i in enumerate(closed):
                rests[i] = again.completion(row)
                answers[i] = fmt.bare_answer_text(rests[i])
        out = []
        for i, prefix in enumerate(prefixes):
            trace = fmt.thought_text(*batch.completions(i))
            message, text, transcript = None, [*prefix, *rests[i]], None
            if fmt.segments.max_segments > 1:
                message = memory_ids(fmt, examples[i], contexts[i])
            elif i in set(closed):
                message, text = prefix[:-1], text[len(prefix) - 1 :]
                transcript = plain_text(fmt, message)
            vectors = None if message is None else embedded(model, message).detach()
            out.append(
                Written(answers[i], passes[i], int(thoughts[i]), trace, vectors, text, transcript)
            )
        return out

    def answer_inputs(
        self, model: Any, fmt: PromptFormat, example: Example, output: Written, message: Tensor
    ) -> Inputs:
        """Inputs as in other channels; between segments the message is the memory file."""
        if fmt.segments.max_segments == 1:
            return super().answer_inputs(model, fmt, example, output, message)
        return context(fmt, model, fmt.question_ids(example), message, output.text)


class Token(Block):
    """Main's token alone."""

    mode = "slow"
