"""Batches made of solved examples and rollouts: which emitter samples each token, packed by row.

Shapes as in `batch.py`; S is the number of segments of a sampler's record.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..modeling.phases import PhasePlan
from ..modeling.records import FORCED, Decoded, pad
from .batch import PolicyRows, RolloutBatch, Rows, TextBatch


def _windows(tokens: Tensor, width: int, pad_id: int) -> Tensor:
    """[B, T] -> [B, T, width]: the tokens that follow each position."""
    padded = torch.nn.functional.pad(tokens, (0, width), value=pad_id)
    return padded.unfold(1, width, 1)[:, 1:]


def collate_text(
    samples: list[tuple[list[int], list[int]]],
    plan: PhasePlan,
    block_size: int,
    pad_id: int,
    *,
    num_anchors: int = 0,
    block_anchors: bool = False,
    anchor_seeds: Sequence[int] = (),
) -> TextBatch:
    """Supervised batch of (prompt ids, completion ids): every completion token is main's target.

    Each position whose block would keep head slots under `plan` is an anchor, and only slots that
    would be kept are scored. `block_anchors` keeps only the positions where passes begin when the
    text is decoded under `plan`. `num_anchors` > 0 samples up to this many anchors per sequence,
    each sequence with its own seed of `anchor_seeds`, so that they do not depend on the batch.
    """
    tokens, lengths = pad([p + c for p, c in samples], pad_id)
    prompt_lengths = torch.tensor([len(p) for p, _ in samples])
    num_rows, time = tokens.shape
    at = torch.arange(time)
    flat = torch.arange(num_rows * time).view(num_rows, time)
    predicts = (at >= prompt_lengths[:, None] - 1) & (at < lengths[:, None] - 1)
    following = _windows(tokens, block_size, pad_id)  # [B, T, K + 1]
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
        scores = torch.full((num_rows, time), -1.0)
        sizes = lengths.tolist()
        for scored_row, size, seed in zip(scores, sizes, anchor_seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            scored_row[:size] = torch.rand(size, generator=generator)
        scores = scores.masked_fill(~is_anchor, -1.0)
        best = scores.topk(min(num_anchors, time), 1).indices
        is_anchor &= torch.zeros_like(is_anchor).scatter(1, best, True)
    anchors = flat[is_anchor]
    blocks = following.flatten(0, 1)[anchors]  # [N, K + 1]
    scored = torch.arange(1, block_size) < kept.flatten()[anchors, None]  # [N, K]
    return _text_batch(tokens, flat[predicts], anchors, blocks, scored)


def _text_batch(
    tokens: Tensor, positions: Tensor, anchors: Tensor, blocks: Tensor, scored: Tensor
) -> TextBatch:
    """Packs the rows.

    positions [R] of main's rows and anchors [N] index into B * T; blocks [N, K + 1] are the tokens
    after each anchor, and scored [N, K] is True for slots that have a row.
    """
    main = Rows(
        positions=positions,
        slots=torch.zeros_like(positions),
        targets=tokens.flatten()[positions + 1],
        outputs=positions,
    )
    slots = torch.arange(1, blocks.shape[1]).expand_as(scored)
    outputs = scored.flatten().nonzero()[:, 0]
    head = Rows(
        positions=(anchors[:, None] + slots).flatten()[outputs],
        slots=slots.flatten()[outputs],
        targets=blocks[:, 1:].flatten()[outputs],
        outputs=outputs,
    )
    return TextBatch(tokens, anchors, blocks[:, :-1].contiguous(), main, head)


def collate_rollouts(
    prompts: list[list[int]],
    record: Decoded,
    advantages: Tensor,
    segments: list[int],
    block_size: int,
    pad_id: int,
    owners: list[int] | None = None,
) -> RolloutBatch:
    """The chosen segments as flat text, every token scored by its emitter.

    Args:
        prompts: [S] prompt ids of each segment; a rollout is one segment or several.
        record: the sampler's record of the segments, on the CPU.
        advantages: one per rollout.
        segments: indices of the segments to take.
        block_size: K + 1.
        pad_id: fills texts on the right.
        owners: [S] the rollout of each segment; None: segment i is rollout i.
    """
    chosen = ChosenSegments(prompts, record, segments, owners)
    tokens, _ = pad([prompts[s] + record.completion(s) for s in chosen.segment_of_text], pad_id)
    slot_of = chosen.slots()
    positions = (slot_of == 0).flatten().nonzero()[:, 0] - 1
    following_slots = _windows(slot_of, block_size, -1).flatten(0, 1)
    anchors = positions[following_slots[positions, 1] == 1] if block_size > 1 else positions[:0]
    blocks = _windows(tokens, block_size, pad_id).flatten(0, 1)[anchors]
    scored = following_slots[anchors, 1:] == torch.arange(1, block_size)
    return chosen.batch(_text_batch(tokens, positions, anchors, blocks, scored), advantages)


def collate_main_rollouts(
    prompts: list[list[int]],
    record: Decoded,
    advantages: Tensor,
    segments: list[int],
    plan: PhasePlan,
    block_size: int,
    pad_id: int,
    owners: list[int] | None = None,
    *,
    num_anchors: int = 0,
    block_anchors: bool = False,
    anchor_seed: int = 0,
) -> RolloutBatch:
    """Rollouts of main's own distribution, slow or verified, with the anchors of a solved example.

    Main's tokens are its actions. The head's rows score the tokens that main wrote after each
    anchor, which the head did not influence: their `sampled` is main's log-probability of the
    token. Arguments are those of `collate_rollouts` and of `collate_text`; `plan` has the phases in
    which the head writes. A text's anchors are sampled by `anchor_seed` and the text, so that they
    do not depend on the batch.
    """
    chosen = ChosenSegments(prompts, record, segments, owners)
    samples = [(prompts[s], record.completion(s)) for s in chosen.segment_of_text]
    text = collate_text(
        samples,
        plan,
        block_size,
        pad_id,
        num_anchors=num_anchors,
        block_anchors=block_anchors,
        anchor_seeds=[text_seed(anchor_seed, *sample) for sample in samples],
    )
    text = drop_forced(text, chosen.slots() == FORCED)
    return replace(chosen.batch(text, advantages), head_samples=False)


class ChosenSegments:
    """Segments chosen for a batch; those with the same tokens in the same blocks share a text."""

    def __init__(
        self,
        prompts: list[list[int]],
        record: Decoded,
        segments: list[int],
        owners: list[int] | None = None,
    ):
        """Arguments as in `collate_rollouts`; C is the length of `segments`."""
        self.prompts, self.record, self.segments = prompts, record, segments
        owner_of = segments if owners is None else [owners[segment] for segment in segments]
        number = {owner: index for index, owner in enumerate(dict.fromkeys(owner_of))}
        text_by_key: dict[tuple, int] = {}
        self.segment_of_text: list[int] = []
        """[B] the first segment of each text."""
        text_of = []
        nth: Counter[int] = Counter()
        for segment, owner in zip(segments, owner_of, strict=True):
            slots = record.slots[segment, : int(record.lengths[segment])].tolist()
            # Segments of one rollout never share a text: each has blocks of its own.
            tokens = (tuple(prompts[segment]), tuple(record.completion(segment)))
            key = (*tokens, tuple(slots), nth[owner])
            nth[owner] += 1
            if key not in text_by_key:
                text_by_key[key] = len(text_by_key)
                self.segment_of_text.append(segment)
            text_of.append(text_by_key[key])
        self.owner_of = torch.tensor(owner_of)
        """[C] rollout of each chosen segment, among all sampled rollouts."""
        self.rollout_of = torch.tensor([number[owner] for owner in owner_of])
        """[C] the rollout's number in the batch, 0..G-1."""
        self.text_of = torch.tensor(text_of)
        """[C] number of each chosen segment's text, 0..B-1."""

    def slots(self) -> Tensor:
        """[B, T] slot of each token of each text, see `Decoded`; -1 in prompts and padding."""
        rows = [
            torch.nn.functional.pad(
                self.record.slots[segment, : int(self.record.lengths[segment])],
                (len(self.prompts[segment]), 0),
                value=-1,
            )
            for segment in self.segment_of_text
        ]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)

    def batch(self, text: TextBatch, advantages: Tensor) -> RolloutBatch:
        """Give each segment its own rows, with its advantage and log-probabilities.

        text: the rows of each text; advantages: one per sampled rollout.
        """
        time = text.tokens.shape[1]
        sampled = torch.zeros(len(self.segments), time)
        for index, segment in enumerate(self.segments):
            start, length = len(self.prompts[segment]), int(self.record.lengths[segment])
            sampled[index, start : start + length] = self.record.logprobs[segment, :length]

        def policy_rows(rows: Rows) -> PolicyRows:
            source, chosen = self.copies(rows.positions // time)
            rows = rows.take(source)
            logprobs = sampled[chosen, rows.positions % time + 1]
            return PolicyRows(
                **vars(rows),
                rollouts=self.rollout_of[chosen],
                advantages=advantages[self.owner_of[chosen]],
                sampled=logprobs,
                old=logprobs,
            )

        main, head = policy_rows(text.main), policy_rows(text.head)
        return RolloutBatch(text.tokens, text.anchors, text.slot_inputs, main, head)

    def copies(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """texts [R] of rows -> the row to copy and the segment that gets it, [sum of copies] each.

        A row is copied for every segment that shares its text.
        """
        by_text = self.text_of.argsort(stable=True)
        number = self.text_of.bincount()
        begins = number.cumsum(0) - number
        times = number[texts]
        source = torch.arange(len(texts)).repeat_interleave(times)
        nth = torch.arange(len(source)) - (times.cumsum(0) - times)[source]
        return source, by_text[begins[texts[source]] + nth]


def text_seed(seed: int, prompt: list[int], completion: list[int]) -> int:
    """Seed of a text; equal texts have equal seeds."""
    digest = hashlib.sha256(repr((seed, prompt, completion)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def drop_forced(text: TextBatch, forced: Tensor) -> TextBatch:
    """The batch without rows whose target is a forced token: forced [B, T] bool."""
    is_free = ~forced.flatten()
    main, head = (rows.take(is_free[rows.positions + 1]) for rows in (text.main, text.head))
    return replace(text, main=main, head=head)
