"""The contract between main and the pass loop: checked before anything trains or decodes.

The pass loop gives main one mask (attend to every earlier token) and multiplies its last hidden
rows by the output matrix. If main did anything else, it would sample from one distribution and
train on another, so such a main is refused.

Ships with checkpoints: imports torch, transformers and its sibling only.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig

from .cache import BlockCache

OUTPUT_FIELDS = {
    "final_logit_softcapping": None,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "lm_head_multiplier": 1.0,
}
"""Fields of a config that change the logits, each with the value that leaves them unchanged."""

VARIABLE_ROPE = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies depend on the length of the text."""

FULL = "full_attention"


def check_config(config: PretrainedConfig) -> None:
    """Raises ValueError naming the field of main's config that the pass loop cannot follow."""
    config = config.get_text_config()
    for name, neutral in OUTPUT_FIELDS.items():
        value = getattr(config, name, None)
        if value not in (None, neutral):
            raise ValueError(
                f"{name} must be {_shown(neutral)} in main's config, got {value}: logits are "
                "hidden rows times the output matrix here; choose a base model without it"
            )
    _check_layers(config)
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):
        kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
        if kind in VARIABLE_ROPE:
            raise ValueError(
                f"rope_parameters.rope_type must not be {kind} in main's config: its frequencies "
                "change as the text grows, so that cached keys and replay would differ; choose "
                "a base model with default, linear, yarn or llama3"
            )
    dropout = getattr(config, "attention_dropout", None)
    if dropout:
        raise ValueError(
            f"attention_dropout must be 0 in main's config, got {dropout}: training would score "
            "rollouts under another distribution than they were sampled from; set it to 0"
        )


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _check_layers(config: PretrainedConfig) -> None:
    """Raises ValueError if some layer does not attend to every earlier token."""
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    other = [f"{i}: {kind}" for i, kind in enumerate(types or []) if kind != FULL]
    if other:
        raise ValueError(
            f"layer_types must be {FULL} for every layer of main's config, got {', '.join(other)} "
            f"(sliding_window={_shown(window)}): the pass loop attends to every earlier token; "
            "choose a base model without such layers, or turn them off in its config "
            "(use_sliding_window=false, layer_types=null) if no text is longer than the window"
        )
    # A config class without such a field ignores one that was added to it.
    reads_types = types is not None and "layer_types" in type(config).__dataclass_fields__
    for name in ("sliding_window", "attention_chunk_size"):
        value, used = getattr(config, name, None), getattr(config, "use_sliding_window", True)
        if value is not None and used is not False and not reads_types:
            raise ValueError(
                f"{name} must be null in main's config, got {value}: the pass loop attends to "
                f"every earlier token; choose a base model without it, or set {name}=null in its "
                f"config if no text is longer than {value} tokens"
            )


def check_layout(model: Any) -> None:
    """Raises ValueError if main's modules are not where the pass loop expects them."""
    name = type(model).__name__
    if not hasattr(model, "model"):
        raise ValueError(
            f"{name} must keep its decoder in `model`, but it is in {model.base_model_prefix!r}; "
            "choose a base model of another family"
        )
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(
            f"{name} must have no bias in its output layer, but lm_head.bias is there: logits are "
            "hidden rows times the output matrix here; choose a base model without it"
        )


PROMPTS, STEPS = (13, 8), (5, 1, 1)
"""Lengths of the texts that `check_slow_mode` reads, and how many tokens follow in each pass."""


@torch.no_grad()
def check_slow_mode(model: Any, what: str | None = None) -> None:
    """Compare slow mode's logits with those of main's stock forward, on a few random tokens.

    Two texts of different lengths go through the pass loop's cache, mask and positions: the
    prompts in one pass, then a block, then single tokens. The stock forward reads the same texts,
    one at a time. Two things must hold:

    * The stock logits are the stock hidden rows times the output matrix. Both come from the same
      rows, so they differ by the rounding of one product: at most 1e-5 of the largest logit in
      float32, 0.02 in 16 bits.
    * The pass loop's logits are the stock's. Sums are taken in another order in every layer, and
      rounding grows with depth: the norm of the difference is at most 1e-3 of that of a text's
      logits in float32, 0.1 in 16 bits. SmolLM2-135M, of 30 layers, is at 1e-6 and at 0.03; with
      a window of 8 tokens it would be at 0.4 or more.

    Uses a random generator of its own. A model on the meta device has no numbers and passes.

    Raises ValueError naming the model, `what` or else its class, if they differ.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    was_training = model.training
    model.eval()
    try:
        _compare(model, what or type(model).__name__)
    finally:
        model.train(was_training)


def _compare(model: Any, name: str) -> None:
    weight = model.get_output_embeddings().weight
    exact, close = (1e-5, 1e-3) if weight.dtype == torch.float32 else (0.02, 0.1)
    size = (len(PROMPTS), max(PROMPTS) + sum(STEPS))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(weight), size, generator=generator).to(weight.device)
    for row, ours in enumerate(_slow_rows(model, tokens)):
        text = tokens[row : row + 1, : len(ours)]
        logits = model(input_ids=text, use_cache=False).logits[0].float()
        if not bool(logits.isfinite().all()):
            raise ValueError(
                f"{name} must give finite logits, but some are not: its weights are damaged or its "
                "training has diverged; choose another checkpoint"
            )
        hidden = model.model(input_ids=text, use_cache=False).last_hidden_state[0]
        product = F.linear(hidden, weight).float()
        difference = float((product - logits).abs().max() / logits.abs().max().clamp(min=1e-12))
        if not difference <= exact:
            raise ValueError(
                f"{name} must give logits that are its last hidden rows times its output matrix, "
                f"but they differ by {difference:.1e} of the largest: sampling and losses would "
                "use another distribution; choose a base model without a scale, cap or bias there"
            )
        other = F.linear(ours, weight).float()
        difference = float((other - logits).norm() / logits.norm().clamp(min=1e-12))
        if not difference <= close:
            raise ValueError(
                f"{name} must give the same logits in the pass loop as by its stock forward, but "
                f"they differ by {difference:.1e} of their size (rounding: {close:g}); choose a "
                "base model whose layers attend to every earlier token, by rotary positions"
            )


def _slow_rows(model: Any, tokens: Tensor) -> list[Tensor]:
    """Last hidden rows of each text by the pass loop's forward: [length, D] each."""
    start = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    cache = BlockCache(model.config.num_hidden_layers, len(tokens), tokens.shape[1])
    rows: list[list[Tensor]] = [[] for _ in tokens]
    for new in (PROMPTS, *((step,) * len(tokens) for step in STEPS)):
        width = max(new)
        fed = torch.stack([t[s : s + width] for t, s in zip(tokens, start, strict=True)])
        length = int(start.max()) + width
        hidden, _ = model.main_states(fed, start, cache, length, with_taps=False)
        for kept, states, number in zip(rows, hidden, new, strict=True):
            kept.append(states[:number])
        start = start + torch.tensor(new, device=start.device)
    return [torch.cat(kept) for kept in rows]
