"""Dense tensors that an update reads: which row predicts which token, and who wrote it.

A batch is flat text plus lists of rows. A row of main is a position of the text; a row of the head
is a slot of an anchor. Everything is packed: no row is there that is not scored, so each stream's
count is the length of its list.

Example, K = 2, text `p a b c d` with prompt `p`, blocks `a b c` (all kept) and `d`:
main rows are positions 0 (writes a) and 3 (writes d); the anchor 0 has head rows (0, slot 1) -> b
and (0, slot 2) -> c, which lie at text positions 1 and 2.

Shapes: B sequences, T time, R main rows, N anchors, K head slots, M head rows.
"""

from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from .generation_mtp import Decoded, PhasePlan

AnyBatch = TypeVar("AnyBatch", bound="TextBatch")


@dataclass
class TextBatch:
    """Text and the rows of it that are scored."""

    tokens: Tensor
    """[B, T] int64, padded on the right."""
    main_rows: Tensor
    """[R] index into B * T of the position whose row predicts a token that counts as main's."""
    main_targets: Tensor
    """[R] that token."""
    anchors: Tensor
    """[N] index into B * T of each anchor at which the head is run."""
    slot_inputs: Tensor
    """[N, K] t_0..t_{K-1}: what each slot reads."""
    head_rows: Tensor
    """[M] index into N * K of each slot that is scored."""
    head_targets: Tensor
    """[M] the slot's token."""
    head_slots: Tensor
    """[M] the slot's number, 1..K."""
    head_positions: Tensor
    """[M] index into B * T of main's row that predicts the same token."""

    def to(self: AnyBatch, device: torch.device) -> AnyBatch:
        """The same batch on a device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return type(self)(**moved)


@dataclass
class RolloutBatch(TextBatch):
    """Text sampled by the policy, with what the policy objective needs, row by row."""

    main_advantages: Tensor
    """[R] advantage of the rollout that the row belongs to."""
    main_sampled: Tensor
    """[R] log-probability under which the token was sampled."""
    main_old: Tensor
    """[R] log-probability that ratios are taken to: the sampler's, or a replay's before the
    update."""
    head_advantages: Tensor
    """[M]"""
    head_sampled: Tensor
    """[M]"""
    head_old: Tensor
    """[M]"""

    @property
    def main_rollouts(self) -> Tensor:
        """[R] row of `tokens` that each of main's rows belongs to."""
        return self.main_rows // self.tokens.shape[1]

    @property
    def head_rollouts(self) -> Tensor:
        """[M] the same of the head's."""
        return self.head_positions // self.tokens.shape[1]

    @property
    def main_blocks(self) -> Tensor:
        """[R] a number of the pass that wrote each of main's tokens: its anchor."""
        return self.main_rows

    @property
    def head_blocks(self) -> Tensor:
        """[M] the same of the head's."""
        return self.anchors[self.head_rows // max(1, self.slot_inputs.shape[1])]


def pad(sequences: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ragged ids -> [B, T] padded on the right, and lengths [B]."""
    lengths = torch.tensor([len(s) for s in sequences])
    tokens = torch.full((len(sequences), int(lengths.max())), pad_id)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return tokens, lengths


def _windows(tokens: Tensor, width: int, pad_id: int) -> Tensor:
    """[B, T] -> [B, T, width]: at each position the tokens that follow it."""
    padded = torch.nn.functional.pad(tokens, (0, width), value=pad_id)
    return padded.unfold(1, width, 1)[:, 1:]


def collate_text(
    samples: list[tuple[list[int], list[int]]],
    plan: PhasePlan,
    num_slots: int,
    pad_id: int,
    *,
    num_anchors: int = 0,
    block_anchors: bool = False,
    generator: torch.Generator | None = None,
) -> TextBatch:
    """Supervised batch of (prompt ids, completion ids): every completion token is main's target.

    Each position whose block would keep head slots under `plan` is an anchor, and only slots that
    would be kept are scored. `block_anchors` takes only the positions where passes begin when the
    text is decoded under `plan`; `num_anchors` > 0 draws so many of them per sequence.
    """
    tokens, lengths = pad([p + c for p, c in samples], pad_id)
    prompt_lengths = torch.tensor([len(p) for p, _ in samples])
    num_rows, time = tokens.shape
    at = torch.arange(time)
    flat = torch.arange(num_rows * time).view(num_rows, time)
    predicts = (at >= prompt_lengths[:, None] - 1) & (at < lengths[:, None] - 1)
    following = _windows(tokens, num_slots, pad_id)  # [B, T, K + 1]
    kept = plan.kept(following.flatten(0, 1), plan.phase_after(tokens).flatten())
    left = (lengths[:, None] - 1 - at).flatten()
    kept = torch.minimum(kept, left).view(num_rows, time)
    is_anchor = predicts & (kept > 1)
    if block_anchors:
        begins = torch.zeros_like(is_anchor)
        position, row = prompt_lengths - 1, torch.arange(num_rows)
        while bool((position < lengths - 1).any()):
            position = position.clamp(max=time - 1)
            begins[row, position] = True
            position = position + kept[row, position].clamp(min=1)
        is_anchor &= begins
    if num_anchors:
        scores = torch.rand(num_rows, time, generator=generator).masked_fill(~is_anchor, -1.0)
        best = scores.topk(min(num_anchors, time), 1).indices
        is_anchor &= torch.zeros_like(is_anchor).scatter(1, best, True)
    anchors = flat[is_anchor]
    blocks = following.flatten(0, 1)[anchors]  # [N, K + 1]
    scored = torch.arange(1, num_slots) < kept.flatten()[anchors, None]  # [N, K]
    return _text_batch(tokens, flat[predicts], anchors, blocks, scored)


def _text_batch(
    tokens: Tensor, main_rows: Tensor, anchors: Tensor, blocks: Tensor, scored: Tensor
) -> TextBatch:
    """Packs the rows: main_rows [R] and anchors [N] flat, blocks [N, K + 1], scored [N, K]."""
    flat = tokens.flatten()
    slot = torch.arange(1, blocks.shape[1]).expand_as(scored)
    head_rows = scored.flatten().nonzero()[:, 0]
    return TextBatch(
        tokens=tokens,
        main_rows=main_rows,
        main_targets=flat[main_rows + 1],
        anchors=anchors,
        slot_inputs=blocks[:, :-1].contiguous(),
        head_rows=head_rows,
        head_targets=blocks[:, 1:].flatten()[head_rows],
        head_slots=slot.flatten()[head_rows],
        head_positions=(anchors[:, None] + slot).flatten()[head_rows],
    )


def collate_rollouts(
    prompts: list[list[int]],
    out: Decoded,
    advantages: Tensor,
    rows: list[int],
    num_slots: int,
    pad_id: int,
) -> RolloutBatch:
    """The chosen rollouts as flat text, every token scored by its emitter.

    Args:
        prompts: prompt ids of each rollout.
        out: the sampler's record, on the CPU.
        advantages: [B] one per rollout.
        rows: which rollouts to take.
        num_slots: K + 1.
        pad_id: fills rows on the right.
    """
    texts, slots, logprobs = [], [], []
    for row in rows:
        length = int(out.lengths[row])
        texts.append(prompts[row] + out.tokens[row, :length].tolist())
        before = torch.full((len(prompts[row]),), -1)
        slots.append(torch.cat([before, out.slots[row, :length]]))
        logprobs.append(torch.cat([torch.zeros(len(before)), out.logprobs[row, :length]]))
    tokens, _ = pad(texts, pad_id)
    slot_of = torch.nn.utils.rnn.pad_sequence(slots, batch_first=True, padding_value=-1)
    sampled = torch.nn.utils.rnn.pad_sequence(logprobs, batch_first=True).flatten()
    main_rows = (slot_of == 0).flatten().nonzero()[:, 0] - 1
    following_slots = _windows(slot_of, num_slots, -1).flatten(0, 1)
    anchors = main_rows[following_slots[main_rows, 1] == 1] if num_slots > 1 else main_rows[:0]
    blocks = _windows(tokens, num_slots, pad_id).flatten(0, 1)[anchors]
    scored = following_slots[anchors, 1:] == torch.arange(1, num_slots)
    text = _text_batch(tokens, main_rows, anchors, blocks, scored)
    return _rollout_batch(text, sampled, advantages[torch.tensor(rows)])


def _rollout_batch(text: TextBatch, sampled: Tensor, advantages: Tensor) -> RolloutBatch:
    """Gives each row its rollout's advantage [B] and its token's log-probability [B * T]."""
    time = text.tokens.shape[1]
    main_sampled, head_sampled = sampled[text.main_rows + 1], sampled[text.head_positions + 1]
    return RolloutBatch(
        **{f.name: getattr(text, f.name) for f in fields(TextBatch)},
        main_advantages=advantages[text.main_rows // time],
        main_sampled=main_sampled,
        main_old=main_sampled,
        head_advantages=advantages[text.head_positions // time],
        head_sampled=head_sampled,
        head_old=head_sampled,
    )


def collate_slow_rollouts(
    prompts: list[list[int]],
    out: Decoded,
    advantages: Tensor,
    rows: list[int],
    plan: PhasePlan,
    num_slots: int,
    pad_id: int,
) -> RolloutBatch:
    """Rollouts that main wrote alone, with every position of a fast phase as an anchor.

    Main's tokens are its actions. The head's rows score what main wrote after each anchor, of which
    the head had no part: `head_sampled` is main's log-probability of the token. Arguments are those
    of `collate_rollouts`, and `plan`: the phases in fast mode.
    """
    lengths = out.lengths.tolist()
    completions = [out.tokens[row, : lengths[row]].tolist() for row in rows]
    samples = [(prompts[row], ids) for row, ids in zip(rows, completions, strict=True)]
    text = collate_text(samples, plan, num_slots, pad_id)
    sampled = torch.zeros(text.tokens.shape)
    for index, row in enumerate(rows):
        start = len(prompts[row])
        sampled[index, start : start + lengths[row]] = out.logprobs[row, : lengths[row]]
    return _rollout_batch(text, sampled.flatten(), advantages[torch.tensor(rows)])
