"""Scores of the tokens of rollouts: how sure their emitter was, and what other models prefer.

One replay of the text gives, for each token:

- entropy and likeliest tokens of the distribution that it follows (main's, or that of a head slot);
- for a head's token, main's log-probability of it, given the whole text before it;
- for a head's token, how much its log-probability depends on the message: the difference to the
  one under the message of another pass;
- the log-probability that a frozen reference gives it.

Distributions are those of temperature 1, as in greedy decoding.

Shapes: R rows, V vocabulary, N anchors.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..modeling.output_layer import OutputLayer
from ..rollouts.prompt_format import PromptFormat
from ..rollouts.rollout import Rollouts
from ..training.batch import PolicyRows, RolloutBatch
from ..training.collate import collate_rollouts

NUM_ALTERNATIVES = 4
"""Likeliest tokens that are kept of each distribution."""
TOKENS_AT_ONCE = 8192
"""Padded tokens of one replay."""
ROWS_AT_ONCE = 256
"""Rows whose logits are in memory at once."""

Alternatives = list[tuple[int, float]]
"""Token ids with their log-probabilities, the likeliest first."""


@dataclass
class TokenScores:
    """Scores of the tokens that one segment wrote, a value per token; None where it has none."""

    entropy: list[float | None]
    """Entropy, in nats, of the distribution that the token follows."""
    alternatives: list[Alternatives | None]
    """Likeliest tokens of that distribution."""
    main: list[float | None]
    """Main's log-probability of a token of the head."""
    main_likeliest: list[int | None]
    """Main's likeliest token in place of a token of the head."""
    message: list[float | None]
    """Log-probability of a token of the head, minus that under another pass's message."""
    reference: list[float | None] = field(default_factory=list)
    """The reference's log-probability; empty without a reference."""
    reference_likeliest: list[int | None] = field(default_factory=list)
    """The reference's likeliest token; empty without a reference."""

    @classmethod
    def empty(cls, length: int, has_reference: bool) -> "TokenScores":
        """Scores of `length` tokens, none of them known yet."""
        none: list[Any] = [None] * length
        own = (list(none) for _ in range(5))
        references = (list(none) for _ in range(2 * has_reference))
        return cls(*own, *references)


class _Rows:
    """Log-probabilities of rows of hidden states, made a few rows at a time."""

    def __init__(self, hidden: Tensor, output: OutputLayer, targets: Tensor):
        """hidden [R, E], targets [R]."""
        parts = []
        for first in range(0, len(targets), ROWS_AT_ONCE):
            chosen = slice(first, first + ROWS_AT_ONCE)
            log_probs = output.logits(hidden[chosen]).float().log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(-1)
            best = log_probs.topk(min(NUM_ALTERNATIVES, log_probs.shape[-1]), -1)
            logprob = log_probs.gather(-1, targets[chosen, None])[:, 0]
            parts.append((logprob, entropy, best.values, best.indices))
        columns = [torch.cat(column).tolist() for column in zip(*parts, strict=True)]
        self.logprob, self.entropy, best_logprob, best_ids = columns or [[], [], [], []]
        self.alternatives: list[Alternatives] = [
            list(zip(ids, values, strict=True))
            for ids, values in zip(best_ids, best_logprob, strict=True)
        ]


@torch.no_grad()
def token_scores(
    model: Any,
    batch: Rollouts,
    segments: list[int],
    fmt: PromptFormat,
    *,
    use_head: bool,
    reference: Any = None,
) -> list[TokenScores]:
    """Scores of the tokens of the given segments, in their order.

    Args:
        model: the model that wrote them.
        batch: the rollouts that the segments belong to.
        segments: numbers of segments.
        fmt: tokens and phases.
        use_head: False if no token is the head's.
        reference: frozen model; None: no scores of a reference.
    """
    is_training = model.training
    model.train(False)
    scores = [
        TokenScores.empty(int(batch.out.lengths[segment]), reference is not None)
        for segment in segments
    ]
    for chosen in _pieces(batch, segments):
        text = collate_rollouts(
            batch.prompts,
            batch.out,
            torch.zeros(len(batch.prompts)),
            [segments[i] for i in chosen],
            fmt.block_size,
            fmt.pad_id,
        )
        starts = [len(batch.prompts[segments[i]]) for i in chosen]
        _score_text(model, text, [scores[i] for i in chosen], starts, use_head, reference)
    model.train(is_training)
    return scores


def _pieces(batch: Rollouts, segments: list[int]) -> list[list[int]]:
    """Places in `segments`, a few at a time, so that a padded batch is not too large."""
    pieces: list[list[int]] = []
    longest = 0
    for place, segment in enumerate(segments):
        length = len(batch.prompts[segment]) + int(batch.out.lengths[segment])
        longest = max(longest, length)
        if pieces and longest * (len(pieces[-1]) + 1) <= TOKENS_AT_ONCE:
            pieces[-1].append(place)
        else:
            pieces.append([place])
            longest = length
    return pieces


def _score_text(
    model: Any,
    text: RolloutBatch,
    scores: list[TokenScores],
    starts: list[int],
    use_head: bool,
    reference: Any,
) -> None:
    """Fill in the scores of one batch. `starts`: number of context tokens of each segment."""
    width = text.tokens.shape[1]
    text = text.to(next(model.parameters()).device)

    def places(rows: PolicyRows) -> list[tuple[TokenScores, int]]:
        """Scores and token of each row."""
        at = (rows.positions % width + 1).tolist()
        return [
            (scores[segment], position - starts[segment])
            for segment, position in zip(rows.rollouts.tolist(), at, strict=True)
        ]

    main_output, head_output = model.output_layers()
    has_head_rows = use_head and len(text.head) > 0
    if has_head_rows:
        hidden, taps = model.main_hidden(text.tokens, use_cache=False)
    else:
        hidden = model.replay(text.tokens).main_hidden
    flat = hidden.flatten(0, 1)
    rows = _Rows(flat[text.main.positions], main_output, text.main.targets)
    for (score, token), entropy, best in zip(
        places(text.main), rows.entropy, rows.alternatives, strict=True
    ):
        score.entropy[token], score.alternatives[token] = entropy, best
    if has_head_rows:
        context = model.head_context(taps, text.tokens, text.anchors)
        embeds, outputs = model.head_embed(text.slot_inputs), text.head.outputs
        own = model.mtp_head(context, embeds).flatten(0, 1)[outputs]
        other = model.mtp_head(model.mtp_head.swapped(context), embeds).flatten(0, 1)[outputs]
        mine, theirs, mains = (
            _Rows(hidden, output, text.head.targets)
            for hidden, output in (
                (own, head_output),
                (other, head_output),
                (flat[text.head.positions], main_output),
            )
        )
        has_other = len(text.anchors) > 1
        for i, (score, token) in enumerate(places(text.head)):
            score.entropy[token] = mine.entropy[i]
            score.alternatives[token] = mine.alternatives[i]
            score.main[token] = mains.logprob[i]
            score.main_likeliest[token] = mains.alternatives[i][0][0]
            score.message[token] = mine.logprob[i] - theirs.logprob[i] if has_other else None
    if reference is not None:
        replayed = reference.replay(text.tokens)
        flat = replayed.main_hidden.flatten(0, 1)
        for rows_of in (text.main, text.head):
            rows = _Rows(flat[rows_of.positions], replayed.main_output, rows_of.targets)
            for i, (score, token) in enumerate(places(rows_of)):
                score.reference[token] = rows.logprob[i]
                score.reference_likeliest[token] = rows.alternatives[i][0][0]
