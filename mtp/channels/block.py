"""Block and token: the channels of ordinary runs, behind the interface of the comparators.

Loss and decoding are those of `mtp/training` and `mtp/modeling`: this file only calls them, so that
one measurement and one table hold all channels. Training is `train.py` with `channel.name=text`.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..modeling.decode_options import DecodeOptions
from ..modeling.sampler import Sampler
from ..rollouts.legibility import thought_passes
from ..rollouts.prompt_format import PromptFormat
from ..rollouts.rollout import sample
from ..tasks.base import Example
from ..training.collate import collate_text
from ..training.objectives import replay_batch
from .channel import Channel, WriteOptions, Written


class Block(Channel):
    """The tokens of main and its head: all of a pass in a thought, main's in the answer."""

    has_log_prob = True
    mode: ClassVar[str] = "fast"

    def supervised_loss(
        self, model: Any, fmt: PromptFormat, examples: list[Example], *, step: int, seed: int
    ) -> Tensor:
        samples = [fmt.example_ids(example) for example in examples]
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
        passes, thoughts = batch.out.passes.tolist(), thought_passes(batch, fmt).tolist()
        completions = [batch.completion(row) for row in range(len(batch))]
        answers = [fmt.answer_text(ids) for ids in completions]
        again_ids: dict[int, list[int]] = {}
        if options.sampler.temperature > 0 and not options.sample_answer:
            prefixes = [fmt.split(ids)[0] for ids in completions]
            greedy = replace(decoding, sampler=Sampler(temperature=0))
            closed = [i for i, ids in enumerate(prefixes) if ids[-1:] == fmt.thought_ids("")]
            if closed:
                again = sample(
                    model,
                    fmt,
                    [examples[i] for i in closed],
                    plan,
                    greedy,
                    prefixes=[prefixes[i] for i in closed],
                )
                for row, i in enumerate(closed):
                    again_ids[i] = again.completion(row)
                    answers[i] = fmt.bare_answer_text(again_ids[i])
        out = []
        closing = fmt.thought_ids("")
        for i, ids in enumerate(completions):
            prefix = fmt.split(ids)[0]
            is_closed = prefix[-1:] == closing
            inner = torch.tensor(prefix[:-1], dtype=torch.long, device=model.device)
            vectors = model.get_input_embeddings()(inner).detach() if is_closed else None
            rest = again_ids.get(i, ids[len(prefix) :])
            text = [*closing, *rest] if is_closed else []
            trace = fmt.thought_text(ids)
            out.append(Written(answers[i], passes[i], int(thoughts[i]), trace, vectors, text))
        return out


class Token(Block):
    """Main's token alone."""

    mode = "slow"
