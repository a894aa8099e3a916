"""The pass loop: one forward of main and one block of up to K + 1 tokens at a time, batched.

What is here: phases and their modes, the cut of a block, the sampler (whose distribution replay
uses too), a key-value cache indexed by position, the loop, and `generate(..., mtp_mode=...)`.

This file travels with exported checkpoints, so it imports torch and transformers only.

Semantics. At the last position of the context (the anchor) main samples t_0 and the head t_1..t_K.
A row in a fast phase keeps all, in a slow phase t_0 only. A block is cut after the first phase
delimiter or end-of-sequence token in it, so no token of a slow phase is ever the head's. Kept
tokens go through main in the next pass, as ordinary tokens.

Shapes: B rows, L new tokens of a pass, K head slots, V vocabulary, D main width.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.utils import ModelOutput

MODES = ("fast", "slow")


@dataclass(kw_only=True)
class Phase:
    """A stretch of the output with its own mode."""

    mode: str = "slow"
    """`fast`: keep all slots of a pass. `slow`: keep slot 0 only."""
    opened_by: str | None = None
    """The delimiter, one token, that ends the phase before and begins this one."""


@dataclass
class PhasePlan:
    """Phases as the pass loop needs them: token ids and numbers of kept slots.

    Example, K = 5: `PhasePlan(keep=[6, 1], opened_by=[7, 8], eos_ids=[2])` begins fast, turns fast
    at token 7, slow at token 8 and ends at token 2. The last delimiter of a prompt decides the
    phase that the output begins in; without any it is the first phase.
    """

    keep: list[int]
    """Slots kept of a pass, by phase: 1 (slow) to K + 1 (fast)."""
    opened_by: list[int | None]
    """Token id that begins the phase, by phase."""
    eos_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.delimiters = [i for i in self.opened_by if i is not None]
        self.begun = [p for p, i in enumerate(self.opened_by) if i is not None]

    def as_slow(self) -> "PhasePlan":
        """The same phases, every one in slow mode."""
        return PhasePlan([1] * len(self.keep), self.opened_by, self.eos_ids)

    def opened(self, tokens: Tensor) -> Tensor:
        """[...] token ids -> [...] index of the phase that each begins, or -1."""
        phase = torch.full_like(tokens, -1)
        for token, begun in zip(self.delimiters, self.begun, strict=True):
            phase = torch.where(tokens == token, begun, phase)
        return phase

    def is_end(self, tokens: Tensor) -> Tensor:
        """[...] token ids -> [...] bool, True where the token ends the sequence."""
        end = torch.zeros_like(tokens, dtype=torch.bool)
        for token in self.eos_ids:
            end |= tokens == token
        return end

    def phase_after(self, tokens: Tensor, phase: Tensor | None = None) -> Tensor:
        """Phase after each token: [B, T] -> [B, T], given the phase before them ([B], or 0)."""
        opened = self.opened(tokens)
        where = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        last = torch.where(opened >= 0, where, -1).cummax(1).values
        before = torch.zeros_like(tokens[:, 0]) if phase is None else phase
        return torch.where(last >= 0, opened.gather(1, last.clamp(min=0)), before[:, None])

    def kept(self, block: Tensor, phase: Tensor) -> Tensor:
        """Number of tokens kept of each block: [B, K + 1] tokens and [B] phases -> [B].

        The phase's own number, cut after the first delimiter or end token.
        """
        keep = torch.tensor(self.keep, device=block.device)[phase]
        stops = (self.opened(block) >= 0) | self.is_end(block)
        width = block.shape[1]
        first = torch.where(stops, torch.arange(width, device=block.device), width).min(1).values
        return torch.minimum(keep, first + 1)


@dataclass(kw_only=True)
class Sampler:
    """The distribution that tokens are drawn from. Replay scores under the very same one."""

    temperature: float = 1.0
    """0: greedy; log-probabilities are then those of the unscaled distribution."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probability reaches top_p; 1 keeps all."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all) or above, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    @property
    def truncates(self) -> bool:
        """True if some tokens can have probability zero."""
        return self.top_k > 0 or self.top_p < 1

    def log_probs(self, logits: Tensor) -> Tensor:
        """[..., V] logits of any dtype -> [..., V] float32 log-probabilities."""
        scores = logits.float()
        if self.temperature > 0:
            scores = scores / self.temperature
        if self.top_k:
            kth = scores.topk(min(self.top_k, scores.shape[-1]), -1).values[..., -1:]
            scores = scores.masked_fill(scores < kth, -torch.inf)
        if self.top_p < 1:
            ordered, index = scores.sort(-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            drop = (before >= self.top_p).scatter(-1, index, before >= self.top_p)
            scores = scores.masked_fill(drop, -torch.inf)
        return scores.log_softmax(-1)

    def sample(self, logits: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """[..., V] logits -> tokens [...] int64 and their log-probabilities [...] float32."""
        log_probs = self.log_probs(logits)
        if self.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            flat = log_probs.exp().flatten(0, -2)
            tokens = torch.multinomial(flat, 1, generator=generator).view(logits.shape[:-1])
        return tokens, log_probs.gather(-1, tokens[..., None])[..., 0]


class BlockCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, stored at their position: [B, heads, capacity, width]."""

    def __init__(self, cache: "BlockCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, width = key_states.shape
        self.keys = key_states.new_zeros(rows, heads, self.cache.capacity, width)
        self.values = value_states.new_zeros(rows, heads, self.cache.capacity, width)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.keys.shape[2] < self.cache.capacity:
            more = self.cache.capacity - self.keys.shape[2]
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, more))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, more))
        where = self.cache.positions[:, None, :, None].expand_as(key_states)
        self.keys.scatter_(2, where, key_states)
        self.values.scatter_(2, where, value_states)
        length = self.cache.length
        return self.keys[:, :, :length], self.values[:, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length, 0

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return -1


class BlockCache(Cache):
    """A cache whose index is the token's position, so that rows may grow at different rates.

    Rows are padded on the right. A padded position is overwritten by the row's next block before
    any query can reach it, so the mask is simply: key position <= query position. To drop tokens
    is to move a row's start back.
    """

    def __init__(self, num_layers: int):
        self.capacity = 0
        self.length = 0
        self.positions = torch.empty(0)
        super().__init__(layers=[BlockCacheLayer(self) for _ in range(num_layers)])

    def place(self, positions: Tensor, length: int) -> Tensor:
        """Say where the next forward writes: positions [B, L], all below `length`.

        Returns the attention mask [B, 1, L, length], True where a query may look.
        """
        self.positions, self.length = positions, length
        if length > self.capacity:
            self.capacity = max(length, 2 * self.capacity, 64)
        keys = torch.arange(length, device=positions.device)
        return keys <= positions[:, None, :, None]

    def select(self, rows: Tensor) -> None:
        """Keep the given rows only."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


@dataclass
class Decoded:
    """What the pass loop wrote, per row of the batch: B rows, at most L tokens."""

    tokens: Tensor
    """[B, L] int64, padded on the right with the pad id."""
    slots: Tensor
    """[B, L] int64: the slot of each token (0: main's; 1..K: the head's), -1 on padding."""
    logprobs: Tensor
    """[B, L] float32 under the sampler's distribution, 0 on padding."""
    lengths: Tensor
    """[B] int64 tokens."""
    passes: Tensor
    """[B] int64 forward passes of main."""
    finished: Tensor
    """[B] bool: ended by an end-of-sequence token, not by the length limit."""


@dataclass
class MTPGenerateOutput(ModelOutput):
    """`generate(..., mtp_mode=..., return_dict_in_generate=True)`."""

    sequences: Tensor | None = None
    """[B, prompt + L] the prompt as given and the output, padded on the right."""
    slots: Tensor | None = None
    """[B, L] the slot of each output token (0: main's; 1..K: the head's), -1 on padding."""
    logprobs: Tensor | None = None
    """[B, L] log-probability of each output token under the sampling distribution."""
    passes: Tensor | None = None
    """[B] forward passes of main."""


@torch.no_grad()
def decode(
    model: Any,
    prompts: Tensor,
    prompt_lengths: Tensor,
    plan: PhasePlan,
    sampler: Sampler,
    *,
    max_new_tokens: int,
    pad_id: int,
    generator: torch.Generator | None = None,
) -> Decoded:
    """Run the pass loop until every row has ended or has `max_new_tokens` tokens.

    Args:
        model: an `MTPMixin` model.
        prompts: [B, T] int64, padded on the right.
        prompt_lengths: [B] int64, at least 1.
        plan: phases; see `PhasePlan`.
        sampler: how tokens are drawn.
        max_new_tokens: most tokens a row may get; a last block is cut to it.
        pad_id: fills the unused end of each row.
        generator: source of randomness for sampling.
    """
    device, (num_rows, _) = prompts.device, prompts.shape
    width = model.num_slots
    columns = torch.arange(width, device=device)
    room = max_new_tokens + width
    tokens = torch.full((num_rows, room), pad_id, device=device)
    slots = torch.full((num_rows, room), -1, device=device)
    logprobs = torch.zeros(num_rows, room, device=device)
    lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
    passes = torch.zeros_like(lengths)
    finished = torch.zeros(num_rows, dtype=torch.bool, device=device)
    head_weight, main_weight = model.head_output_weight(), model.get_output_embeddings().weight

    # State of the rows still running; `rows` says where they belong in the outputs.
    rows = torch.arange(num_rows, device=device)
    active = torch.ones(num_rows, dtype=torch.bool, device=device)
    phase = plan.phase_after(prompts).gather(1, prompt_lengths[:, None] - 1)[:, 0]
    fresh, num_fresh = prompts, prompt_lengths
    start = torch.zeros_like(prompt_lengths)
    cache = BlockCache(model.config.num_hidden_layers)
    keep = torch.tensor(plan.keep, device=device)
    length = prompts.shape[1]

    while True:
        positions = start[:, None] + torch.arange(fresh.shape[1], device=device)
        mask = cache.place(positions, length)
        main_row, taps = model.anchor_rows(fresh, num_fresh - 1, positions, mask, cache)
        block = torch.full((len(rows), width), pad_id, device=device)
        block_logprobs = torch.zeros(len(rows), width, device=device)
        block[:, 0], block_logprobs[:, 0] = sampler.sample(main_row @ main_weight.T, generator)
        # A block that already ends at slot 0 needs no head.
        ends = (plan.opened(block[:, 0]) >= 0) | plan.is_end(block[:, 0])
        fast = ((keep[phase] > 1) & ~ends & active).nonzero()[:, 0]
        if len(fast):
            block[fast, 1:], block_logprobs[fast, 1:] = head_slots(
                model, taps[fast], block[fast, 0], head_weight, sampler, generator
            )
        kept = torch.minimum(plan.kept(block, phase), max_new_tokens - lengths[rows])
        kept = torch.where(active, kept, 0)
        is_kept = columns < kept[:, None]
        to = lengths[rows, None] + columns
        tokens[rows[:, None], to] = torch.where(is_kept, block, pad_id)
        slots[rows[:, None], to] = torch.where(is_kept, columns, -1)
        logprobs[rows[:, None], to] = torch.where(is_kept, block_logprobs, 0.0)
        lengths[rows] += kept
        passes[rows] += active.long()
        last_kept = block.gather(1, (kept - 1).clamp(min=0)[:, None])[:, 0]
        begun = plan.opened(last_kept)
        phase = torch.where(begun >= 0, begun, phase)
        finished[rows] |= active & plan.is_end(last_kept)
        active = active & ~finished[rows] & (lengths[rows] < max_new_tokens)
        num_active = int(active.sum())
        if not num_active:
            break
        # An inactive row is fed one pad token at position 0 until half of the rows are inactive.
        start = torch.where(active, start + num_fresh, 0)
        num_fresh = torch.where(active, kept, 1)
        fresh = torch.where(is_kept, block, pad_id)
        if 2 * num_active <= len(rows):
            chosen = active.nonzero()[:, 0]
            cache.select(chosen)
            rows, active, phase = rows[chosen], active[chosen], phase[chosen]
            start, fresh, num_fresh = start[chosen], fresh[chosen], num_fresh[chosen]
        widest = int(num_fresh.max())
        fresh = fresh[:, :widest]
        length = int(start.max()) + widest

    longest = int(lengths.max())
    return Decoded(
        tokens[:, :longest],
        slots[:, :longest],
        logprobs[:, :longest],
        lengths,
        passes,
        finished,
    )


def head_slots(
    model: Any,
    taps: Tensor,
    first: Tensor,
    weight: Tensor,
    sampler: Sampler,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Sample the head's K tokens: taps [B, taps, D] and t_0 [B] -> tokens and log-probs [B, K]."""
    head = model.mtp_head
    message = head.message(taps)
    if not head.sequential:
        return sampler.sample(head(message) @ weight.T, generator)
    state, token, out, out_logprobs = None, first, [], []
    for slot in range(model.num_slots - 1):
        hidden, state = head.step(message, model.head_embed(token[:, None]), slot, state)
        token, logprob = sampler.sample(hidden[:, 0] @ weight.T, generator)
        out.append(token)
        out_logprobs.append(logprob)
    return torch.stack(out, 1), torch.stack(out_logprobs, 1)


class MTPGenerationMixin:
    """`generate` with `mtp_mode`. Without it, the stock `generate` runs on main alone."""

    def anchor_rows(
        self, fresh: Tensor, at: Tensor, positions: Tensor, mask: Tensor, cache: BlockCache
    ) -> tuple[Tensor, Tensor]:
        """Feed new tokens [B, L] to main; hidden row [B, D], taps [B, taps, D] at column `at`."""
        if self.config._attn_implementation == "eager":
            mask = torch.zeros(mask.shape, dtype=self.dtype, device=mask.device).masked_fill(
                ~mask, torch.finfo(self.dtype).min
            )
        out = self.model(
            input_ids=fresh,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=self.mtp_taps,
        )
        rows = torch.arange(len(fresh), device=fresh.device)
        taps = torch.stack([out.hidden_states[tap][rows, at] for tap in self.mtp_taps], 1)
        return out.last_hidden_state[rows, at], taps

    def phase_plan(self, mode: str) -> PhasePlan:
        """The plan saved with the checkpoint (`generation_config.mtp_phases`), in a mode.

        `fast` runs each phase in its own mode, `slow` runs all of them in slow mode.
        Raises ValueError for another mode or a checkpoint without phases.
        """
        if mode not in MODES:
            raise ValueError(f"mtp_mode must be one of {list(MODES)}, got {mode!r}")
        saved = getattr(self.generation_config, "mtp_phases", None)
        if saved is None:
            raise ValueError("generation_config.mtp_phases is missing: export the model with mtp")
        eos = self.generation_config.eos_token_id
        plan = PhasePlan(
            keep=[self.num_slots if p["mode"] == "fast" else 1 for p in saved],
            opened_by=[p["opened_by"] for p in saved],
            eos_ids=[eos] if isinstance(eos, int) else list(eos or []),
        )
        return plan if mode == "fast" else plan.as_slow()

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        mtp_mode: str | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`; with `mtp_mode="fast"` or `"slow"`, the pass loop.

        The pass loop honours input_ids (padded on either side), attention_mask, max_new_tokens,
        do_sample, temperature, top_k, top_p, eos_token_id, pad_token_id and
        return_dict_in_generate, given here or in the generation config. Any other argument raises.
        """
        if mtp_mode is None:
            return super().generate(inputs, generation_config, **kwargs)  # type: ignore[misc]
        settings = generation_config or self.generation_config
        prompts = kwargs.pop("input_ids", inputs)
        if prompts is None:
            raise ValueError("input_ids must be given to generate with mtp_mode")
        attention = kwargs.pop("attention_mask", None)
        honoured = [
            "max_new_tokens",
            "do_sample",
            "temperature",
            "top_k",
            "top_p",
            "eos_token_id",
            "pad_token_id",
            "return_dict_in_generate",
        ]
        unknown = sorted(set(kwargs) - set(honoured))
        if unknown:
            raise ValueError(f"generate with mtp_mode does not take {unknown}; it takes {honoured}")

        def setting(key: str, default: Any) -> Any:
            value = kwargs.get(key, getattr(settings, key, None))
            return default if value is None else value

        plan = self.phase_plan(mtp_mode)
        eos = setting("eos_token_id", plan.eos_ids)
        plan.eos_ids = [eos] if isinstance(eos, int) else list(eos)
        pad_id = setting("pad_token_id", plan.eos_ids[0] if plan.eos_ids else 0)
        sampled = setting("do_sample", False)
        sampler = Sampler(
            temperature=setting("temperature", 1.0) if sampled else 0.0,
            top_k=setting("top_k", 0) if sampled else 0,
            top_p=setting("top_p", 1.0) if sampled else 1.0,
        )
        if attention is None:
            attention = torch.ones_like(prompts)
        order = attention.long().argsort(dim=1, descending=True, stable=True)
        out = decode(
            self,
            prompts.gather(1, order),
            attention.sum(1),
            plan,
            sampler,
            max_new_tokens=setting("max_new_tokens", 256),
            pad_id=pad_id,
            generator=generator,
        )
        sequences = torch.cat([prompts, out.tokens], 1)
        if not setting("return_dict_in_generate", False):
            return sequences
        return MTPGenerateOutput(
            sequences=sequences, slots=out.slots, logprobs=out.logprobs, passes=out.passes
        )


def phases_to_json(phases: dict[str, Phase], token_id: Any) -> list[dict[str, Any]]:
    """What `generation_config.mtp_phases` holds; `token_id` maps a delimiter to its id."""
    out = []
    for name, phase in phases.items():
        entry = {"name": name, **asdict(phase)}
        entry["opened_by"] = None if phase.opened_by is None else token_id(phase.opened_by)
        out.append(entry)
    return out
