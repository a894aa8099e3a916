"""`generate` with `mtp_mode`: transformers' conventions around the pass loop.

The mixin here reads a request (padding, generation config, processors, criteria, streamer), refuses
impossible ones before any pass, and runs `decode.decode`. The rest of the library imports decoding
from this module.

Ships with checkpoints: imports torch, transformers and siblings only.

Shapes: B rows, T prompt, L new tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from .attention import check_attention, of_blocks
from .cache import BlockCache
from .compiled import check_compilable
from .contract import check_fast_mode, stock_class
from .decode import decode
from .decode_options import DecodeOptions
from .head_loss import MTPHeadLossMixin
from .memory import Memory
from .memory_file import MemoryFile
from .phases import (
    MODES,
    Phase,
    PhasePlan,
    check_phases,
    make_plan,
    phases_from_json,
    phases_to_json,
)
from .records import FORCED, Block, Decoded, pad
from .requests import (
    OF_MTP,
    STOCK,
    Request,
    Wanted,
    check_own,
    check_processors,
    first_set,
    read_mask,
    read_processors,
    read_prompts,
    token_ids,
)
from .sampler import Sampler
from .saving import MTPFilesMixin
from .segments import Segments, SegmentSettings, check_segments, decode_segments
from .versions import in_turns, wanted_states

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


@dataclass
class MTPGenerateOutput(ModelOutput):
    """Output of `generate(..., mtp_mode=..., return_dict_in_generate=True)`."""

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
    """[B] bool, True if the text ended by an end token or a stopping criterion."""


class MTPGenerationMixin(MTPFilesMixin, MTPHeadLossMixin):
    """`generate` with `mtp_mode`. Without it, the stock `generate` runs on main alone."""

    reads_whole_text: bool
    mtp_decoder: Any
    mtp_taps: list[int]

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """transformers' choice of an implementation, with the forms for blocks of its two."""
        found: str = super().get_correct_attn_implementation(  # type: ignore[misc]
            requested_attention, is_init_check
        )
        return found if self.reads_whole_text else of_blocks(found, stock_class(type(self)))

    def main_states(
        self,
        fed: Tensor,
        start: Tensor,
        cache: BlockCache,
        length: int,
        *,
        is_even: bool = False,
        with_taps: bool = True,
        last: Tensor | None = None,
        decoder: Callable[..., Any] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Feed tokens [B, L] whose first is at position `start` [B]; the cache then holds `length`.

        is_even: every active row ends at `length`, so one token per row needs no mask. last [B]:
        position of each row's last token, before its padding; None: there is no padding. decoder:
        main's compiled decoder; None: main's own. Returns main's hidden rows after its final norm
        [B, L, D], and each tap's [B, L, D]; no taps if `with_taps` is False.
        """
        taps = self.mtp_taps if with_taps else []
        positions = start[:, None] + torch.arange(fed.shape[1], device=fed.device)
        cache.place(positions, length, is_even)
        if last is not None:
            # Main may have no position as late as that of a padding column.
            positions = positions.minimum(last[:, None])
        if self.reads_whole_text:
            # Nothing that a row reads is padding: texts are padded on the right.
            text = cache.whole_text(fed)
            out = self.mtp_decoder(
                input_ids=text if last is None else text[:, : int(last.max()) + 1],
                use_cache=False,
                output_hidden_states=wanted_states(taps),
            )
            rows = torch.arange(len(fed), device=fed.device)[:, None]
            hidden = out.last_hidden_state[rows, positions]
            return hidden, [out.hidden_states[tap][rows, positions] for tap in taps]
        out = (decoder or self.mtp_decoder)(
            input_ids=fed,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=wanted_states(taps),
            in_pass=True,
        )
        return out.last_hidden_state, [out.hidden_states[tap] for tap in taps]

    def phase_plan(
        self,
        mode: str,
        k: int | None = None,
        max_thought_tokens: int | None = None,
        config: GenerationConfig | None = None,
    ) -> PhasePlan:
        """The plan saved with the checkpoint (`generation_config.mtp_phases`), for one request.

        Args:
            mode: `fast` runs each phase in its own mode, `slow` and `verified` all in that mode.
            k: head slots of a pass; None: all that the head has.
            max_thought_tokens: number of tokens after which the first phase is closed by force.
            config: the request's config, whose phases and end tokens override the checkpoint's.

        Raises ValueError for settings that the checkpoint cannot follow.
        """
        if mode not in MODES:
            raise ValueError(
                f"mtp_mode must be one of {list(MODES)}, by row or for all, or {STOCK!r} for all; "
                f"got {mode!r}"
            )
        if mode == "fast":
            check_fast_mode(self.config)
        saved = first_set("mtp_phases", config, self.generation_config)
        if saved is None:
            raise ValueError("generation_config.mtp_phases is missing: export the model with mtp")
        if k is not None and not 1 <= k < self.block_size:
            raise ValueError(
                f"mtp_k must be between 1 and the head's {self.block_size - 1} slots, got {k}"
            )
        eos = first_set("eos_token_id", config, self.generation_config)
        plan = make_plan(
            list(phases_from_json(saved, str).values()),
            [entry["opened_by"] for entry in saved],
            block_size=self.block_size if k is None else k + 1,
            eos_ids=token_ids(eos),
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

    @in_turns
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
        """Transformers' `generate`; with `mtp_mode`, the pass loop.

        Args:
            inputs: [B, T] token ids, padded on either side; `input_ids` is a synonym.
            generation_config: config of this call; the model's own by default.
            mtp_mode: `fast`, `slow` or `verified`, or one of them for each row; `stock`:
                transformers' own `generate` on main alone, with all its arguments. None: the value
                in the generation config, `stock` if it has none.
            mtp_k: head slots of a pass; None: the value in the generation config, else all that the
                head has.
            max_thought_tokens: budget of the first phase, whose closing delimiter is then forced;
                None: the value in the generation config, else that of the phase.
            generator: source of randomness for sampling.
            kwargs: with a mode, the supported options of `requests.OPTIONS`, such as
                logits_processor (applied to every slot), stopping_criteria (called after every
                token) and streamer (receives a block at a time).

        Returns [B * num_return_sequences, T + L] ids, or `MTPGenerateOutput`. Raises ValueError,
        before any pass, for options that the pass loop does not support.
        """
        check_own(generation_config, self.generation_config)
        mode = first_set("mtp_mode", generation_config, self.generation_config)
        mode = mode if mtp_mode is None else mtp_mode
        if mode is None or mode == STOCK:
            ours = {
                "mtp_k": mtp_k,
                "max_thought_tokens": max_thought_tokens,
                "generator": generator,
            }
            for name, value in ours.items():
                if value is not None:
                    raise ValueError(
                        f"{name} must be left out if mtp_mode is {mode!r}, got "
                        f"{value}; give one of {list(MODES)}"
                    )
            return super().generate(inputs, generation_config, **kwargs)  # type: ignore[misc]
        request = self._read_request(
            inputs,
            generation_config,
            mode,
            mtp_k,
            max_thought_tokens,
            generator,
            kwargs,
            in_step=True,
        )
        prompts = request.given
        copies, streamer = request.num_return_sequences, request.streamer
        if streamer is not None and len(prompts) * copies > 1:
            raise ValueError(f"streamer takes one sequence at a time, got {len(prompts) * copies}")
        if streamer is not None:
            streamer.put(prompts.cpu())
        out = decode(
            self,  # type: ignore[arg-type]
            request.prompts,
            request.prompt_lengths,
            [plan.as_last_segment() for plan in request.plans],
            request.options,
            on_block=None if streamer is None else lambda block: put_block(streamer, block),
            num_return_sequences=copies,
        )
        if streamer is not None:
            streamer.end()
        sequences = torch.cat([prompts.repeat_interleave(copies, 0), out.tokens], 1)
        if not request.wanted["return_dict_in_generate"]:
            return sequences
        return MTPGenerateOutput(
            sequences=sequences,
            slots=out.slots,
            logprobs=out.logprobs,
            passes=out.passes,
            accepted=out.accepted,
            finished=out.finished,
        )

    @in_turns
    def generate_segments(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        tokenizer: Any,
        mtp_mode: str | Sequence[str] | None = None,
        mtp_k: int | None = None,
        max_segments: int | None = None,
        generator: torch.Generator | None = None,
        on_block: Callable[[Block], None] | None = None,
        on_segment: Callable[[int, list[int], Memory], None] | None = None,
        memories: Sequence[Memory] | None = None,
        memory_file: str | None = None,
        **kwargs: Any,
    ) -> Segments:
        """Trajectories that summarize into a memory file and continue thinking; see `segments.py`.

        The settings saved with the checkpoint (`generation_config.mtp_segments`) define the context
        of the next segment. `max_new_tokens` is the limit of a segment.

        Args:
            inputs: [B, T] token ids, padded on either side.
            generation_config: config of this call; the model's own by default.
            tokenizer: the model's; it reads summaries and writes the memory file.
            mtp_mode: mode of all phases, or one for each row; None: the value in the generation
                config (slow for `stock`), else `fast`.
            mtp_k: as in `generate`.
            max_segments: maximum number of segments per trajectory; None: as saved.
            generator: source of randomness for sampling.
            on_block: called after each pass.
            on_segment: called with a trajectory's number, its next context and its memory.
            memories: memory in which each trajectory begins, such as `Memory.passed_on` of an
                earlier problem; None: empty ones.
            memory_file: path of a memory file that all trajectories, and other processes, share;
                None: each trajectory has a memory of its own.
            kwargs: as in `generate`, without a streamer and without options that count from the
                beginning of a single text.

        Raises ValueError, before any pass, for unsupported options.
        """
        saved = first_set("mtp_segments", generation_config, self.generation_config)
        settings = SegmentSettings(**(saved or {}))
        if max_segments is not None:
            settings.max_segments = max_segments
        phases = first_set("mtp_phases", generation_config, self.generation_config) or []
        check_segments(settings, phases_from_json(phases, str), "generation_config", "mtp_")
        budget = first_set("max_thought_tokens", generation_config, self.generation_config)
        if settings.max_segments > 1 and budget is not None:
            raise ValueError(
                "max_thought_tokens must be left out of the generation config with several "
                f"segments, got {budget}; set max_tokens of a phase, or max_segments=1"
            )
        request = self._read_request(
            inputs,
            generation_config,
            mtp_mode,
            mtp_k,
            None,
            generator,
            {"tokenizer": tokenizer, **kwargs},
            one_context=settings.max_segments == 1,
        )
        if request.streamer is not None:
            raise ValueError("generate_segments does not support streamer; use on_block")
        if memory_file is not None and settings.max_segments == 1:
            raise ValueError(
                "max_segments must be above 1 with memory_file, got 1: one segment writes no "
                "summary; raise it or leave out memory_file"
            )
        if memories is not None and (memory_file is not None or settings.max_segments == 1):
            raise ValueError(
                "memories must be given without memory_file and with max_segments above 1, got "
                f"memory_file={memory_file!r} and max_segments={settings.max_segments}; leave one "
                "out"
            )
        return decode_segments(
            self,  # type: ignore[arg-type]
            request.prompts,
            request.prompt_lengths,
            request.plans,
            request.options,
            settings,
            tokenizer,
            on_block=on_block,
            on_segment=on_segment,
            num_return_sequences=request.num_return_sequences,
            memories=memories,
            memory_file=None if memory_file is None else MemoryFile(memory_file),
        )

    def _read_request(
        self,
        inputs: Tensor | None,
        generation_config: GenerationConfig | None,
        mtp_mode: str | Sequence[str] | None,
        mtp_k: int | None,
        max_thought_tokens: int | None,
        generator: torch.Generator | None,
        kwargs: dict[str, Any],
        one_context: bool = True,
        in_step: bool = False,
    ) -> Request:
        """The request as `decode` takes it. Raises ValueError for unsupported options.

        mtp_mode, mtp_k, max_thought_tokens: None takes the generation config's. one_context: True
        if a text continues its prompt throughout. in_step: each row stays one text of the batch, so
        criteria may be called with all of them at once.
        """
        check_attention(self)
        check_own(generation_config, self.generation_config)
        configs = generation_config, self.generation_config
        wanted = Wanted(kwargs, *configs)
        wanted.check()
        prompts = read_prompts(inputs, wanted["input_ids"])
        eos_ids = token_ids(wanted["eos_token_id"])
        pad_id = next(iter(token_ids(wanted["pad_token_id"])), None)
        copies = wanted["num_return_sequences"]
        copies = 1 if copies is None else copies
        if copies > 1 and not wanted["do_sample"]:
            raise ValueError(
                f"num_return_sequences={copies} greedy sequences of a prompt would be the same; "
                "set do_sample=True"
            )
        cache = wanted["cache_implementation"] or "dynamic"
        if cache not in ("dynamic", "static"):
            raise ValueError(f"cache_implementation must be dynamic or static, got {cache!r}")
        compiler = wanted.compiler()
        if compiler is not None:
            check_compilable(self)
        max_new_tokens = wanted.max_new_tokens(prompts.shape[1] if one_context else None)
        stock = wanted.stock_config(eos_ids, pad_id, prompts.device)
        stock.max_length = prompts.shape[1] + max_new_tokens
        mask = read_mask(self, wanted["attention_mask"], prompts, stock)
        check_processors(wanted["logits_processor"] or [], len(prompts) * copies)
        fill = (eos_ids[0] if eos_ids else 0) if pad_id is None else pad_id
        process = read_processors(self, wanted, prompts, mask, stock, one_context)
        own: dict[str, Any] = dict(zip(OF_MTP, (mtp_mode, mtp_k, max_thought_tokens), strict=True))
        mode, k, most = (
            first_set(name, *configs) if value is None else value for name, value in own.items()
        )
        mode = "fast" if mode is None else mode
        if mode == STOCK:
            if mtp_mode is not None:
                raise ValueError(
                    f"mtp_mode must be one of {list(MODES)}, by row or for all, got {STOCK!r}, "
                    "which is for generate alone; use slow, which writes the same text"
                )
            mode = "slow"
        modes = [mode] * len(prompts) if isinstance(mode, str) else list(mode)
        by_mode = {mode: self.phase_plan(mode, k, most, generation_config) for mode in modes}
        for plan in by_mode.values():
            plan.eos_ids = eos_ids
        plans = [by_mode[mode] for mode in modes]
        order = mask.argsort(dim=1, descending=True, stable=True)
        options = DecodeOptions(
            sampler=wanted.sampler(),
            max_new_tokens=max_new_tokens,
            pad_id=fill,
            generator=generator,
            process=process if len(process) else None,
            stop=wanted.stops(len(prompts) * copies, in_step),
            static_cache=cache == "static",
            compiler=compiler,
            # Greedy tokens are the same with and without; a sample from the generator is not.
            impl=None if wanted["do_sample"] else "auto",
        )
        padded, lengths = prompts.gather(1, order), mask.sum(1)
        return Request(prompts, wanted, padded, lengths, plans, options, copies, wanted["streamer"])


def put_block(streamer: Any, block: Block) -> None:
    """Hand a pass's tokens of a batch of one to a transformers streamer."""
    length = int(block.lengths[0]) if len(block.lengths) else 0
    if length:
        streamer.put(block.tokens[0, :length].cpu())
