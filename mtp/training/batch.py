"""Dense tensors that an update reads: which row predicts which token, and who wrote it.

A batch is flat text plus lists of rows. A row of main is a position of the text; a row of the head
is a slot of an anchor. Everything is packed: no row is there that is not scored, so each stream's
count is the length of its list.

Rollouts that say the same, in the same blocks, share one text, which goes through the models once;
each has rows of its own. Small policies repeat themselves a lot within a group. A rollout of
several segments has a text for each, and one advantage for all of them.

Example, K = 2, text `p a b c d` with prompt `p`, blocks `a b c` (all kept) and `d`:
main rows are positions 0 (writes a) and 3 (writes d); the anchor 0 has head rows (0, slot 1) -> b
and (0, slot 2) -> c, which lie at text positions 1 and 2.

Shapes: B texts, T time, R main rows, N anchors, K head slots, M head rows, G rollouts,
S segments.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..modeling.phases import PhasePlan
from ..modeling.records import FORCED, Decoded, pad

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
    """Text sampled by the policy, with what the policy objective needs, row by row.

    A rollout of several segments has a text for each of them, and its rows lie in all of them.
    """

    main_rollouts: Tensor
    """[R] number of the rollout that the row belongs to, 0..G-1."""
    main_advantages: Tensor
    """[R] its advantage."""
    main_sampled: Tensor
    """[R] log-probability under which the token was sampled."""
    main_old: Tensor
    """[R] log-probability that ratios are taken to: the sampler's, or a replay's before the
    update."""
    head_rollouts: Tensor
    """[M]"""
    head_advantages: Tensor
    """[M]"""
    head_sampled: Tensor
    """[M]"""
    head_old: Tensor
    """[M]"""

    @property
    def num_rollouts(self) -> int:
        """G. Main writes in every rollout."""
        return len(self.main_rollouts.unique())

    @property
    def main_blocks(self) -> Tensor:
        """[R] a number of the pass that wrote each of main's tokens."""
        return self.main_rollouts * self.tokens.numel() + self.main_rows

    @property
    def head_blocks(self) -> Tensor:
        """[M] the same of the head's."""
        anchors = self.anchors[self.head_rows // max(1, self.slot_inputs.shape[1])]
        return self.head_rollouts * self.tokens.numel() + anchors


def _windows(tokens: Tensor, width: int, pad_id: int) -> Tensor:
    """[B, T] -> [B, T, width]: at each position the tokens that follow it."""
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
    would be kept are scored. `block_anchors` takes only the positions where passes begin when the
    text is decoded under `plan`; `num_anchors` > 0 samples so many of them per sequence, each
    sequence by its own seed of `anchor_seeds`, so that they do not depend on the batch.
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
    block_size: int,
    pad_id: int,
    owners: list[int] | None = None,
) -> RolloutBatch:
    """The chosen rollouts as flat text, every token scored by its emitter.

    Args:
        prompts: [S] prompt ids of each segment; a rollout is one segment or several.
        out: the sampler's record of the segments, on the CPU.
        advantages: one per rollout.
        rows: which segments to take.
        block_size: K + 1.
        pad_id: fills rows on the right.
        owners: [S] the rollout of each segment; None: segment i is rollout i.
    """
    chosen = Chosen(prompts, out, rows, owners)
    tokens, _ = pad([prompts[row] + out.completion(row) for row in chosen.texts], pad_id)
    slot_of = chosen.slots()
    main_rows = (slot_of == 0).flatten().nonzero()[:, 0] - 1
    following_slots = _windows(slot_of, block_size, -1).flatten(0, 1)
    anchors = main_rows[following_slots[main_rows, 1] == 1] if block_size > 1 else main_rows[:0]
    blocks = _windows(tokens, block_size, pad_id).flatten(0, 1)[anchors]
    scored = following_slots[anchors, 1:] == torch.arange(1, block_size)
    return chosen.batch(_text_batch(tokens, main_rows, anchors, blocks, scored), advantages)


class Chosen:
    """Segments picked for a batch, and which of them say the same in the same blocks."""

    def __init__(
        self,
        prompts: list[list[int]],
        out: Decoded,
        rows: list[int],
        owners: list[int] | None = None,
    ):
        self.prompts, self.out, self.rows = prompts, out, rows
        mine = rows if owners is None else [owners[row] for row in rows]
        self.owners = torch.tensor(mine)
        """[S] the rollout of each segment."""
        number = {owner: index for index, owner in enumerate(dict.fromkeys(mine))}
        self.rollout_of = torch.tensor([number[owner] for owner in mine])
        """[S] its number in the batch, 0..G-1."""
        said: dict[tuple, int] = {}
        self.texts: list[int] = []
        """[B] the first segment of each text."""
        text_of = []
        nth: Counter[int] = Counter()
        for row, owner in zip(rows, mine, strict=True):
            slots = out.slots[row, : int(out.lengths[row])].tolist()
            # Segments of one rollout never share a text: each has blocks of its own.
            key = (tuple(prompts[row]), tuple(out.completion(row)), tuple(slots), nth[owner])
            nth[owner] += 1
            if key not in said:
                said[key] = len(said)
                self.texts.append(row)
            text_of.append(said[key])
        self.text_of = torch.tensor(text_of)
        """[S] number of each segment's text."""

    def slots(self) -> Tensor:
        """[B, T] who wrote each token of each text, see `Decoded`; -1 in prompts and padding."""
        rows = [
            torch.nn.functional.pad(
                self.out.slots[row, : int(self.out.lengths[row])],
                (len(self.prompts[row]), 0),
                value=-1,
            )
            for row in self.texts
        ]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)

    def batch(self, text: TextBatch, advantages: Tensor) -> RolloutBatch:
        """Gives each segment rows of its own, with its advantage and log-probabilities.

        text: the rows of each text; advantages: [all rollouts].
        """
        time = text.tokens.shape[1]
        sampled = torch.zeros(len(self.rows), time)
        for index, row in enumerate(self.rows):
            start, length = len(self.prompts[row]), int(self.out.lengths[row])
            sampled[index, start : start + length] = self.out.logprobs[row, :length]
        of_main, main_segments = self.copies(text.main_rows // time)
        of_head, head_segments = self.copies(text.head_positions // time)
        rows = {
            f.name: getattr(text, f.name)[of_main if f.name.startswith("main_") else of_head]
            for f in fields(TextBatch)
            if f.name.startswith(("main_", "head_"))
        }
        main_sampled = sampled[main_segments, rows["main_rows"] % time + 1]
        head_sampled = sampled[head_segments, rows["head_positions"] % time + 1]
        given = advantages[self.owners]
        return RolloutBatch(
            tokens=text.tokens,
            anchors=text.anchors,
            slot_inputs=text.slot_inputs,
            **rows,
            main_rollouts=self.rollout_of[main_segments],
            main_advantages=given[main_segments],
            main_sampled=main_sampled,
            main_old=main_sampled,
            head_rollouts=self.rollout_of[head_segments],
            head_advantages=given[head_segments],
            head_sampled=head_sampled,
            head_old=head_sampled,
        )

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


def collate_slow_rollouts(
    prompts: list[list[int]],
    out: Decoded,
    advantages: Tensor,
    rows: list[int],
    plan: PhasePlan,
    block_size: int,
    pad_id: int,
    owners: list[int] | None = None,
    *,
    num_anchors: int = 0,
    block_anchors: bool = False,
    anchor_seed: int = 0,
) -> RolloutBatch:
    """Rollouts that main wrote alone, with the anchors of a solved example.

    Main's tokens are its actions. The head's rows score what main wrote after each anchor, of which
    the head had no part: `head_sampled` is main's log-probability of the token. Arguments are those
    of `collate_rollouts` and of `collate_text`; `plan` has the phases in fast mode. A text's
    anchors are sampled by `anchor_seed` and the text, so that they do not depend on the batch.
    """
    chosen = Chosen(prompts, out, rows, owners)
    samples = [(prompts[row], out.completion(row)) for row in chosen.texts]
    text = collate_text(
        samples,
        plan,
        block_size,
        pad_id,
        num_anchors=num_anchors,
        block_anchors=block_anchors,
        anchor_seeds=[text_seed(anchor_seed, *sample) for sample in samples],
    )
    return chosen.batch(drop_forced(text, chosen.slots() == FORCED), advantages)


def text_seed(seed: int, prompt: list[int], completion: list[int]) -> int:
    """A seed of one text: equal for texts that are equal."""
    digest = hashlib.sha256(repr((seed, prompt, completion)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def drop_forced(text: TextBatch, forced: Tensor) -> TextBatch:
    """The batch without rows whose target is a forced token: forced [B, T] bool."""
    forced = forced.flatten()
    of_main, of_head = ~forced[text.main_rows + 1], ~forced[text.head_positions + 1]
    if bool(of_main.all() & of_head.all()):
        return text
    kept = {
        f.name: getattr(text, f.name)[of_main if f.name.startswith("main_") else of_head]
        for f in fields(text)
        if f.name.startswith(("main_", "head_"))
    }
    return replace(text, **kept)
