"""Verification of drafted tokens: the accepted prefix and the token after it, without logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from mtp_kernels.checks import check_ids, check_integers, check_operands, check_scale
from mtp_kernels.dispatch import autocast_operands
from mtp_kernels.linear_logprob import linear_logprob
from mtp_kernels.linear_verify.op import residual_rows
from mtp_kernels.linear_verify.reference import count_accepted
from mtp_kernels.noise import accept_uniform, seed_rows


class LinearVerify(NamedTuple):
    """Per-sequence results: `num_accepted` drafts are kept, and `token` follows them."""

    num_accepted: Tensor
    """[N] int64 number of accepted drafts."""
    token: Tensor
    """[N] int64 token after them: resampled where a draft was rejected, else one more."""
    logprob: Tensor
    """[N, K + 1] float32, nats: main's log-probability of the accepted drafts and `token`; then
    0."""


@torch.no_grad()
def linear_verify(
    hidden: Tensor,
    weight: Tensor,
    draft: Tensor,
    draft_hidden: Tensor,
    draft_weight: Tensor | None = None,
    *,
    seed: int | Tensor,
    position: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    draft_bias: Tensor | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
) -> LinearVerify:
    """Speculative sampling (arXiv 2211.17192): the resulting tokens are distributed as main's
    samples.

    Draft j is accepted while u < p_j(draft_j) / q_j(draft_j); the first rejected one is resampled
    from max(p_j - q_j, 0). If the whole draft is accepted, one more token is sampled from p_K. At
    temperature 0 a draft is accepted if it is main's largest logit. Each distribution is computed
    from hidden states as in `linear_logprob`; the drafts must have been sampled at this temperature
    and softcap.

    Args:
        hidden: [N, K + 1, D] main's hidden states; row j predicts what draft j proposes.
        weight: [V, D] main's output matrix.
        draft: [N, K] proposed tokens; from the first ignore_index on there is no draft.
        draft_hidden: [N, K, H] hidden states that the drafts were sampled from.
        draft_weight: [V, H] their output matrix; None if it is main's, with main's bias unless
            draft_bias is given.
        seed: as in `linear_sample`, an integer or one per sequence [N].
        position: [N] absolute position in tokens of draft 0.
        temperature, softcap: of both distributions.
        bias, draft_bias: [V] added to main's and to the draft's logits, or None.
        ignore_index: marks the end of a shorter draft.
        impl: "auto", "reference", "torch" or "triton".
    """
    if draft_weight is None:
        draft_weight, draft_bias = weight, bias if draft_bias is None else draft_bias
    hidden, weight, bias = autocast_operands(hidden, weight, bias)  # type: ignore[assignment]
    proposal_operands = autocast_operands(draft_hidden, draft_weight, draft_bias)
    draft_hidden, draft_weight, draft_bias = proposal_operands  # type: ignore[assignment]
    assert draft_weight is not None
    check_operands(hidden, weight, bias)
    check_operands(draft_hidden, draft_weight, draft_bias)
    if weight.shape[0] != draft_weight.shape[0]:
        raise ValueError(
            "weight and draft_weight must share one vocabulary, got "
            f"{weight.shape[0]} and {draft_weight.shape[0]} rows"
        )
    if draft.ndim != 2 or draft.shape[1] == 0:
        raise ValueError(
            f"draft must be [N, K] with K >= 1, got shape {tuple(draft.shape)}; "
            "without drafts give one column of ignore_index"
        )
    num, slots = draft.shape
    if hidden.shape[:-1] != (num, slots + 1) or draft_hidden.shape[:-1] != (num, slots):
        raise ValueError(
            "hidden must be [N, K + 1, D] and draft_hidden [N, K, H] for draft [N, K]; got "
            f"{tuple(hidden.shape)}, {tuple(draft_hidden.shape)} and {tuple(draft.shape)}"
        )
    if position.shape != (num,):
        raise ValueError(f"position must be [N] = [{num}], got shape {tuple(position.shape)}")
    check_integers(draft=draft, seed=seed, position=position)
    check_scale(temperature, softcap, greedy=True)
    greedy = temperature == 0
    scaling = {"temperature": temperature or 1.0, "softcap": softcap, "impl": impl}
    scaling["ignore_index"] = None

    valid = (draft != ignore_index).cumprod(1).bool()
    drafted = torch.where(valid, draft, 0)
    check_ids("draft", drafted, weight.shape[0])
    target = torch.nn.functional.pad(drafted, (0, 1))  # the row after the drafts has no target
    main = linear_logprob(hidden, weight, target, bias=bias, **scaling)  # type: ignore[arg-type]
    seeds, first = seed_rows(seed, position)
    step = torch.arange(slots, device=draft.device)
    if greedy:
        num_accepted = count_accepted(valid & (main.argmax[:, :slots] == drafted))
        token = main.argmax.gather(1, num_accepted[:, None])[:, 0]
        last = hidden[torch.arange(num, device=draft.device), num_accepted]
        picked = linear_logprob(last, weight, token, bias=bias, **scaling).logprob  # type: ignore[arg-type]
    else:
        proposal = linear_logprob(draft_hidden, draft_weight, drafted, bias=draft_bias, **scaling)  # type: ignore[arg-type]
        uniform = accept_uniform(
            seeds[:, None].expand(num, slots).reshape(-1), (first[:, None] + step).reshape(-1)
        ).view(num, slots)
        accept = uniform.log() < main.logprob[:, :slots] - proposal.logprob
        num_accepted = count_accepted(valid & accept)
        row = torch.arange(num, device=draft.device)
        slot = num_accepted.clamp_max(slots - 1)
        rejected = (num_accepted < slots) & valid[row, slot]
        token, picked = residual_rows(
            hidden[row, num_accepted],
            weight,
            bias,
            main.lse[row, num_accepted],
            draft_hidden[row, slot],
            draft_weight,
            draft_bias,
            proposal.lse[row, slot],
            rejected,
            seeds,
            first + num_accepted,
            temperature,
            softcap,
            impl,
        )
    kept = torch.arange(slots + 1, device=draft.device)
    logprob = torch.where(kept < num_accepted[:, None], main.logprob, 0.0)
    logprob = logprob.scatter(1, num_accepted[:, None], picked[:, None].to(logprob.dtype))
    return LinearVerify(num_accepted, token, logprob)
