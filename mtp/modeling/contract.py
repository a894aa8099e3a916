"""The contract between main and the pass loop: checked before anything trains or decodes.

The pass loop feeds main a few tokens of each row at a time, at positions of the rows' own, through
a cache that is indexed by position, and applies main's output layer itself. If main did anything
else, it would sample from one distribution and train on another, so such a main is refused. A main
whose state has no positions reads its whole text again in each pass: right, but slower
(`reason_to_reread`).

Ships with checkpoints: imports torch, transformers and siblings only.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .output_layer import OutputLayer

REREAD = {"gpt_neo": "its local layers count positions from the end of the keys"}
"""Families, by `model_type`, that read the whole text in each pass for a reason that their config
does not show."""

DROPOUTS = (
    "attention_dropout",
    "attn_dropout",
    "attn_pdrop",
    "dropout",
    "embd_pdrop",
    "emb_pdrop",
    "hidden_dropout",
    "resid_dropout",
    "resid_pdrop",
    "activation_dropout",
    "layerdrop",
    "embedding_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "embed_dropout",
    "residual_dropout",
    "ffn_dropout",
)
"""Fields of a config that drop numbers at random in training."""


def check_config(config: PretrainedConfig) -> None:
    """Raises ValueError naming the field of main's config that the pass loop cannot follow."""
    config = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model_type must be that of a decoder-only model, got {config.model_type!r}, which "
            "has an encoder too; choose another base model"
        )
    for name in DROPOUTS:
        value = getattr(config, name, None)
        if isinstance(value, float) and value:
            raise ValueError(
                f"{name} must be 0 in main's config, got {value}: training would score "
                "rollouts under another distribution than they were sampled from; set it to 0"
            )
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "output_router_logits must be false in main's config, got true: no router loss is part "
            "of the objective; set it to false"
        )
    longest_text(config)


def without_dropout(config: PretrainedConfig) -> list[str]:
    """Set a config's dropouts to 0; returns the names of the fields that were not."""
    config = config.get_text_config()
    found = [name for name in DROPOUTS if isinstance(getattr(config, name, None), float)]
    found = [name for name in found if getattr(config, name)]
    for name in found:
        setattr(config, name, 0.0)
    return found


def longest_text(config: PretrainedConfig) -> int | None:
    """Number of tokens up to which main's rotary frequencies do not depend on the length of a text;
    None if they never do.

    A longer text would rotate cached keys by other frequencies than replay. Raises ValueError if
    the config does not say where the frequencies change.
    """
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limits = []
    for parameters in (rope, *rope.values()):
        kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
        if kind not in ("dynamic", "longrope"):
            continue
        of_config = getattr(config, "max_position_embeddings", None)
        if kind == "longrope":
            of_config = getattr(config, "original_max_position_embeddings", None)
            of_config = parameters.get("original_max_position_embeddings", of_config)
        if of_config is None:
            raise ValueError(
                f"rope_parameters.rope_type={kind} needs original_max_position_embeddings in "
                "main's config: from there on the frequencies change, so that cached keys and "
                "replay would differ; add it"
            )
        limits.append(int(of_config))
    return min(limits, default=None)


def decoder_name(model: Any) -> str:
    """Name of the child of a causal LM that computes the hidden rows.

    Raises ValueError if there is none, or more than one that could be it.
    """
    found = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    if len(found) > 1 and model.base_model_prefix in found:
        return str(model.base_model_prefix)
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} must have one child that is a PreTrainedModel, its decoder, "
            f"but it has {found or 'none'}; choose a base model of another family"
        )
    return found[0]


def forward_takes(module: nn.Module, name: str) -> bool:
    """True if a module's forward has a parameter of that name, or passes any on."""
    parameters = inspect.signature(module.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def reason_to_reread(model: Any, decoder: nn.Module) -> str | None:
    """Reason why main must read the whole text in each pass, None if a cache serves.

    The cache of the pass loop holds keys and values by position, so that rows grow at different
    rates and rejected tokens are overwritten. A recurrent or convolutional state, or keys that are
    compressed, cannot do that.
    """
    config = model.config.get_text_config()
    if config.model_type in REREAD:
        return REREAD[config.model_type]
    if getattr(type(model), "_is_stateful", False) or getattr(type(decoder), "_is_stateful", False):
        return "it keeps a recurrent state"
    if "past_key_values" not in inspect.signature(decoder.forward).parameters:
        return "it has no cache of keys and values"
    plain = DynamicLayer, DynamicSlidingWindowLayer
    for layer in DynamicCache(config=config).layers:
        name = type(layer).__name__
        if type(layer) not in plain and name != "DummyLayer":
            return f"its cache has layers that are not keys and values by position ({name})"
    return None


def num_cache_layers(config: PretrainedConfig) -> int:
    """Number of layers of keys and values that main's forward writes; some layers have several."""
    return max(len(DynamicCache(config=config).layers), config.num_hidden_layers)


PROMPTS, STEPS = (13, 8), (5, 1, 1)
"""Lengths of the texts that `check_slow_mode` reads, and how many tokens follow in each pass."""


@torch.no_grad()
def check_slow_mode(model: Any, what: str | None = None) -> None:
    """Compare slow mode's logits with those of main's stock forward, on a few random tokens.

    Two texts of different lengths go through the pass loop's cache, masks and positions: the
    prompts in one pass, then a block, then single tokens. The stock forward reads the same texts,
    one at a time. Two things must hold:

    * The stock logits are those of the output layer, as read from the config, of the stock hidden
      rows. Both come from the same rows, so they differ by the rounding of one product: at most
      1e-5 of the largest logit in float32, 0.02 in 16 bits.
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
    output: OutputLayer = model.output_layers()[0]
    weight = output.weight
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
        try:
            hidden, taps = model.decoder_states(model.mtp_taps, input_ids=text, use_cache=False)
        except (AttributeError, IndexError, TypeError) as error:
            raise ValueError(
                f"{name} must record its hidden states before and after each of its "
                f"{model.mtp_depth} layers, which the head reads at {model.mtp_taps}: {error}; "
                "choose a base model of another family"
            ) from error
        expected = (1, len(ours), model.text_config.hidden_size)
        for tap, states in zip(model.mtp_taps, taps, strict=True):
            if states.shape != expected:
                raise ValueError(
                    f"{name} must have hidden states of shape {list(expected)} at layer {tap}, "
                    f"which the head reads, got {list(states.shape)}; choose a base model of "
                    "another family"
                )
        applied = output.logits(hidden[0].to(weight.dtype)).float()
        if applied.shape != logits.shape:
            raise ValueError(
                f"{name} must give a logit for each row of its output matrix, got "
                f"{logits.shape[1]} for {len(weight)} rows; choose a base model of another family"
            )
        difference = float((applied - logits).abs().max() / logits.abs().max().clamp(min=1e-12))
        if not difference <= exact:
            raise ValueError(
                f"{name} must give logits that are its output layer of its last hidden rows (scale "
                f"{output.scale:g}, softcap {output.softcap}), but they differ by {difference:.1e} "
                "of the largest: sampling and losses would use another distribution; choose a "
                "base model without another scale, cap or layer there"
            )
        other = output.logits(ours.to(weight.dtype)).float()
        difference = float((other - logits).norm() / logits.norm().clamp(min=1e-12))
        if not difference <= close:
            raise ValueError(
                f"{name} must give the same logits in the pass loop as by its stock forward, but "
                f"they differ by {difference:.1e} of their size (rounding: {close:g}); choose a "
                "base model whose layers attend to earlier tokens by the given positions"
            )


def _slow_rows(model: Any, tokens: Tensor) -> list[Tensor]:
    """Last hidden rows of each text by the pass loop's forward: [length, D] each."""
    start = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    cache = model.new_cache(len(tokens), tokens.shape[1])
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
