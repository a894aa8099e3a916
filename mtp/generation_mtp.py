"""`generate` with `mtp_mode`: transformers' conventions around the pass loop.

What is here: the mixin that reads a request (padding, generation config, processors, criteria,
streamer), refuses impossible ones before any pass, and runs `passes_mtp.decode`. This module is
also the door to decoding for the rest of the library.

Travels with exported checkpoints: imports torch, transformers and siblings only.

Shapes: B rows, T prompt, L new tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.utils import ModelOutput

from .attention_mtp import attention_of_blocks
from .cache_mtp import BlockCache
from .memory_mtp import Memory
from .passes_mtp import decode
from .phases_mtp import (
    MODES,
    Phase,
    PhasePlan,
    check_phases,
    make_plan,
    phases_from_json,
    phases_to_json,
)
from .records_mtp import FORCED, Block, Decoded, pad
from .sampling_mtp import Sampler
from .segments_mtp import Segments, SegmentSettings, check_segments, decode_segments

__all__ = [
    "FORCED",
    "MODES",
    "Block",
    "Decoded",
    "MTPGenerateOutput",
    "MTPGenerationMixin",
    "Memory",
    "Phase",
    "PhasePlan",
    "Sampler",
    "SegmentSettings",
    "Segments",
    "check_phases",
    "check_segments",
    "decode",
    "decode_segments",
    "make_plan",
    "pad",
    "phases_from_json",
    "phases_to_json",
]

HONOURED = (
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "eos_token_id",
    "pad_token_id",
    "num_return_sequences",
    "cache_implementation",
    "return_dict_in_generate",
)
"""Fields of a generation config, or arguments of `generate`, that the pass loop reads."""

NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "watermarking_config": None,
    "stop_strings": None,
    "max_time": None,
}
"""Fields that the pass loop does not read, with the value that asks for nothing."""


@dataclass
class MTPGenerateOutput(ModelOutput):
    """`generate(..., mtp_mode=..., return_dict_in_generate=True)`."""

    sequences: Tensor | None = None
    """[B, T + L] the prompt as given and the output, padded on the right."""
    slots: Tensor | None = None
    """[B, L] emitter of each output token: 0 main, 1..K the head's slot, -1 padding, -2 forced."""
    logprobs: Tensor | None = None
    """[B, L] log-probability of each output token under its emitter's sampling distribution."""
    passes: Tensor | None = None
    """[B] forward passes of main."""
    accepted: Tensor | None = None
    """[B, L] slot of the head that proposed a token which main accepted (verified mode), else 0."""
    finished: Tensor | None = None
    """[B] bool, ended by an end token or a stopping criterion."""


class Request(NamedTuple):
    """A call of `generate`, as `decode` takes it."""

    given: Tensor
    """[B, T] prompts as they were given."""
    setting: dict[str, Any]
    """Of `HONOURED`, what the call or its config sets."""
    text: tuple[Tensor, Tensor, list[PhasePlan], Sampler]
    """Prompts padded on the right, their lengths, their plans, the sampler."""
    arguments: dict[str, Any]
    """Keyword arguments of `decode`."""
    streamer: Any
    """transformers' streamer, or None."""


class MTPGenerationMixin:
    """`generate` with `mtp_mode`. Without it, the stock `generate` runs on main alone."""

    def main_states(
        self,
        fed: Tensor,
        start: Tensor,
        cache: BlockCache,
        length: int,
        *,
        is_even: bool = False,
        with_taps: bool = True,
    ) -> tuple[Tensor, list[Tensor]]:
        """Feed tokens [B, L] whose first is at position `start` [B]; the cache then holds `length`.

        is_even: every row that counts ends there, which spares one token a row its mask.
        Returns main's hidden rows after its final norm [B, L, D], and each tap's [B, L, D], none
        without taps.
        """
        taps = self.mtp_taps if with_taps else []
        positions = start[:, None] + torch.arange(fed.shape[1], device=fed.device)
        mask = cache.place(positions, length, is_even)
        if mask is not None and self.config._attn_implementation == "eager":
            mask = torch.zeros(mask.shape, dtype=self.dtype, device=mask.device).masked_fill(
                ~mask, torch.finfo(self.dtype).min
            )
        with attention_of_blocks(self.config):
            out = self.model(
                input_ids=fed,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=taps or None,
            )
        return out.last_hidden_state, [out.hidden_states[tap] for tap in taps]

    def phase_plan(
        self, mode: str, k: int | None = None, max_thought_tokens: int | None = None
    ) -> PhasePlan:
        """The plan saved with the checkpoint (`generation_config.mtp_phases`), for one request.

        Args:
            mode: `fast` runs each phase in its own mode, `slow` and `verified` all in that mode.
            k: head slots of a pass; None: all that the head has.
            max_thought_tokens: after so many tokens of the first phase it is closed by force.

        Raises ValueError for settings that the checkpoint cannot follow.
        """
        if mode not in MODES:
            raise ValueError(f"mtp_mode must be one of {list(MODES)}, got {mode!r}")
        saved = getattr(self.generation_config, "mtp_phases", None)
        if saved is None:
            raise ValueError("generation_config.mtp_phases is missing: export the model with mtp")
        if k is not None and not 1 <= k < self.num_slots:
            raise ValueError(
                f"mtp_k must be between 1 and the head's {self.num_slots - 1} slots, got {k}"
            )
        eos = self.generation_config.eos_token_id
        plan = make_plan(
            list(phases_from_json(saved, str).values()),
            [entry["opened_by"] for entry in saved],
            num_slots=self.num_slots if k is None else k + 1,
            eos_ids=[eos] if isinstance(eos, int) else list(eos or []),
            mode=mode,
            closed_by=[entry.get("closed_by") for entry in saved],
        )
        if max_thought_tokens is not None:
            if max_thought_tokens < 1 or len(saved) < 2:
                raise ValueError(
                    "max_thought_tokens must be at least 1, for a model with a phase after the "
                    f"thought; got {max_thought_tokens} and {len(saved)} phases"
                )
            plan.max_tokens[0] = max_thought_tokens
        return plan

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        mtp_mode: str | Sequence[str] | None = None,
        mtp_k: int | None = None,
        max_thought_tokens: int | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`; with `mtp_mode`, the pass loop.

        Args:
            inputs: [B, T] token ids, padded on either side; `input_ids` is the same.
            generation_config: of this call; the model's own by default.
            mtp_mode: `fast`, `slow` or `verified`, or one of them for each row. None: stock
                `generate` on main alone, with all its arguments.
            mtp_k: head slots of a pass; None: all that the head has.
            max_thought_tokens: budget of the first phase, whose closing delimiter is then forced.
            generator: source of randomness for sampling.
            kwargs: with `mtp_mode` one of `HONOURED`, and attention_mask, logits_processor (applied
                to every slot), stopping_criteria (asked after every token) and streamer (given a
                block at a time).

        Returns [B * num_return_sequences, T + L] ids, or `MTPGenerateOutput`. Raises ValueError,
        before any pass, for what the pass loop cannot do.
        """
        if mtp_mode is None:
            return super().generate(inputs, generation_config, **kwargs)  # type: ignore[misc]
        request = self._read_request(
            inputs, generation_config, mtp_mode, mtp_k, max_thought_tokens, generator, kwargs
        )
        prompts, setting = request.given, request.setting
        padded, lengths, plans, sampler = request.text
        copies, streamer = request.arguments["num_return_sequences"], request.streamer
        if streamer is not None and len(prompts) * copies > 1:
            raise ValueError(f"streamer takes one sequence at a time, got {len(prompts) * copies}")
        if streamer is not None:
            streamer.put(prompts.cpu())
        out = decode(
            self,
            padded,
            lengths,
            [plan.as_last_segment() for plan in plans],
            sampler,
            on_block=None if streamer is None else lambda block: put_block(streamer, block),
            **request.arguments,
        )
        if streamer is not None:
            streamer.end()
        sequences = torch.cat([prompts.repeat_interleave(copies, 0), out.tokens], 1)
        if not setting.get("return_dict_in_generate"):
            return sequences
        return MTPGenerateOutput(
            sequences=sequences,
            slots=out.slots,
            logprobs=out.logprobs,
            passes=out.passes,
            accepted=out.accepted,
            finished=out.finished,
        )

    def generate_segments(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        tokenizer: Any,
        mtp_mode: str | Sequence[str] = "fast",
        mtp_k: int | None = None,
        max_segments: int | None = None,
        generator: torch.Generator | None = None,
        on_block: Callable[[Block], None] | None = None,
        on_segment: Callable[[int, list[int], Memory], None] | None = None,
        **kwargs: Any,
    ) -> Segments:
        """Trajectories that summarize into a memory file and think on; see `segments_mtp`.

        The settings saved with the checkpoint (`generation_config.mtp_segments`) say what a next
        segment is given. Arguments are those of `generate`, `max_new_tokens` being a segment's, and

        Args:
            inputs: [B, T] token ids, padded on either side.
            generation_config: of this call; the model's own by default.
            tokenizer: of the model; it reads summaries and writes the memory file.
            mtp_mode: for all phases' modes, or one for each row.
            mtp_k: head slots of a pass; None: all that the head has.
            max_segments: of a trajectory; None: as saved.
            generator: source of randomness for sampling.
            on_block: called after each pass.
            on_segment: called with a trajectory's number, its next context and its memory.
            kwargs: as in `generate`, without a streamer.

        Raises ValueError, before any pass, for what cannot be done.
        """
        saved = getattr(self.generation_config, "mtp_segments", None)
        settings = SegmentSettings(**(saved or {}))
        if max_segments is not None:
            settings.max_segments = max_segments
        phases = getattr(self.generation_config, "mtp_phases", None) or []
        check_segments(settings, phases_from_json(phases, str), "generation_config", "mtp_")
        request = self._read_request(
            inputs, generation_config, mtp_mode, mtp_k, None, generator, kwargs
        )
        if request.streamer is not None:
            raise ValueError("generate_segments takes no streamer; give it on_block")
        return decode_segments(
            self,
            *request.text,
            settings=settings,
            tokenizer=tokenizer,
            on_block=on_block,
            on_segment=on_segment,
            **request.arguments,
        )

    def _read_request(
        self,
        inputs: Tensor | None,
        generation_config: GenerationConfig | None,
        mtp_mode: str | Sequence[str],
        mtp_k: int | None,
        max_thought_tokens: int | None,
        generator: torch.Generator | None,
        kwargs: dict[str, Any],
    ) -> "Request":
        """What `decode` is asked for. Raises ValueError for what it cannot do."""
        prompts = kwargs.pop("input_ids", inputs)
        if prompts is None:
            raise ValueError("input_ids must be given to generate with mtp_mode")
        attention = kwargs.pop("attention_mask", None)
        process = LogitsProcessorList(kwargs.pop("logits_processor", None) or [])
        stop = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
        streamer = kwargs.pop("streamer", None)
        setting = read_settings(generation_config or self.generation_config, kwargs)
        copies = setting.get("num_return_sequences", 1)
        if copies > 1 and not setting.get("do_sample"):
            raise ValueError(
                f"num_return_sequences={copies} greedy sequences of a prompt would be the same; "
                "set do_sample=True"
            )
        cache = setting.get("cache_implementation", "dynamic")
        if cache not in ("dynamic", "static"):
            raise ValueError(f"cache_implementation must be dynamic or static, got {cache!r}")
        modes = [mtp_mode] * len(prompts) if isinstance(mtp_mode, str) else list(mtp_mode)
        by_mode = {mode: self.phase_plan(mode, mtp_k, max_thought_tokens) for mode in modes}
        eos = setting.get("eos_token_id")
        for plan in by_mode.values():
            if eos is not None:
                plan.eos_ids = [eos] if isinstance(eos, int) else list(eos)
        plans = [by_mode[mode] for mode in modes]
        eos_ids = plans[0].eos_ids
        if attention is None:
            attention = torch.ones_like(prompts)
        if not bool(attention.any(1).all()):
            raise ValueError("attention_mask leaves a row without a token; give every row a prompt")
        order = attention.long().argsort(dim=1, descending=True, stable=True)
        text = prompts.gather(1, order), attention.sum(1), plans, make_sampler(setting)
        arguments = {
            "max_new_tokens": setting.get("max_new_tokens", 256),
            "pad_id": setting.get("pad_token_id", eos_ids[0] if eos_ids else 0),
            "generator": generator,
            "process": process if len(process) else None,
            "stop": stop if len(stop) else None,
            "num_return_sequences": copies,
            "static_cache": cache == "static",
            # Greedy tokens are the same with and without; a draw from the generator is not.
            "kernels": None if setting.get("do_sample") else "auto",
        }
        return Request(prompts, setting, text, arguments, streamer)


def read_settings(config: GenerationConfig, given: dict[str, Any]) -> dict[str, Any]:
    """What a request sets of `HONOURED`: the arguments given, else the config's.

    Raises ValueError for anything else that the arguments or the config ask for.
    """
    unknown = sorted(key for key in given if key not in HONOURED)
    unknown = [key for key in unknown if given[key] not in (None, NEUTRAL.get(key))]
    if unknown:
        raise ValueError(
            f"generate with mtp_mode does not take {unknown}; it takes {list(HONOURED)}"
        )
    for key, neutral in NEUTRAL.items():
        value = getattr(config, key, None)
        if value is not None and value != neutral:
            raise ValueError(
                f"generation_config.{key} must be {neutral} with mtp_mode, got {value}; give a "
                "logits_processor or a stopping_criteria that does it"
            )
    merged = {key: given.get(key, getattr(config, key, None)) for key in HONOURED}
    return {key: value for key, value in merged.items() if value is not None}


def make_sampler(setting: dict[str, Any]) -> Sampler:
    """The distribution that a request asks for."""
    if not setting.get("do_sample"):
        return Sampler(temperature=0.0)
    return Sampler(
        temperature=setting.get("temperature", 1.0),
        top_k=setting.get("top_k", 0),
        top_p=setting.get("top_p", 1.0),
    )


def put_block(streamer: Any, block: Block) -> None:
    """Hand a pass's tokens of a batch of one to a transformers streamer."""
    length = int(block.lengths[0]) if len(block.lengths) else 0
    if length:
        streamer.put(block.tokens[0, :length].cpu())
