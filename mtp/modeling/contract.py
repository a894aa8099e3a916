"""The contract between main and the pass loop: checked before anything trains or decodes.

The pass loop and replay ask main for hidden rows, and the output layer (`output_layer.py`) for
logits. A main that does anything else would be sampled from one distribution and trained on
another. Fields of the config that nothing here can follow are refused by name; for everything else,
the model is compared with its own stock forward when it is built or loaded.

Ships with checkpoints: imports torch, transformers and siblings only.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .attention import STOCK
from .cache import BlockCache
from .output_layer import OutputLayer

VARIABLE_ROPE = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies depend on the length of the text."""

DROPOUT = (
    "activation_dropout",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_dropout",
    "attn_pdrop",
    "dropout",
    "embd_dropout",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "input_jitter_noise",
    "layerdrop",
    "resid_dropout",
    "resid_pdrop",
    "residual_dropout",
    "router_jitter_noise",
)
"""Fields of a config that make training random, if they are above 0."""

KEYS_AND_VALUES = {"full_attention", "sliding_attention", "chunked_attention", "moe", "mlp"}
"""Types of layers that keep no other state than keys and values by position, or none."""

WITHOUT_CACHE = ("openai-gpt",)
"""Families that keep nothing between forwards."""


def head_is_trained(config: PretrainedConfig) -> bool:
    """False if the config says that no stage trained the head; True if it says nothing."""
    return bool(getattr(config, "mtp_head_is_trained", True))


def check_fast_mode(config: PretrainedConfig) -> None:
    """Raises ValueError if the head would write and no stage has trained it."""
    if not head_is_trained(config):
        raise ValueError(
            "mtp_mode must be slow for a checkpoint whose head no stage has trained, got fast; "
            "once you have trained the head, set model.config.mtp_head_is_trained = True"
        )


def why_whole_text(family: type, config: PretrainedConfig) -> str | None:
    """Why the pass loop feeds a main each row's text from its beginning, at every pass; None: it
    does not.

    Nothing is kept between such passes, which is right and slower than with a cache.
    """
    types = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or [])
    if getattr(family, "_is_stateful", False) or not types <= KEYS_AND_VALUES:
        # Rows that grow at different rates would push padding through a recurrence or a
        # convolution, and a rejected draft could not be taken back.
        return "its layers keep more than keys and values by position"
    if config.model_type in WITHOUT_CACHE:
        return "it has none"
    module = sys.modules[stock_class(family).__module__]
    if any(name.endswith("ATTENTION_CLASSES") for name in vars(module)):
        return "its attention takes no mask of rows that grow at different rates"
    return None


def stock_class(family: type) -> type:
    """The class of transformers that a class with a head derives from."""
    return next(
        base
        for base in family.__mro__
        if issubclass(base, PreTrainedModel) and not hasattr(base, "main_states")
    )


def dropout_fields(config: PretrainedConfig) -> dict[str, float]:
    """Fields of main's config that make training random, by name."""
    config = config.get_text_config(decoder=True)
    found = {name: getattr(config, name, None) for name in DROPOUT}
    return {name: value for name, value in found.items() if value}


def without_dropout(config: PretrainedConfig) -> None:
    """Set the fields to 0: training scores the very distribution that was sampled from."""
    for name in dropout_fields(config):
        setattr(config.get_text_config(decoder=True), name, 0.0)


def check_config(config: PretrainedConfig) -> None:
    """Raises ValueError naming the field of main's config that the pass loop cannot follow."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model_type must be a decoder-only LM, got {config.model_type}, which has an encoder; "
            "choose another base model"
        )
    config = config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):
        kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
        if kind in VARIABLE_ROPE:
            raise ValueError(
                f"rope_parameters.rope_type must not be {kind} in main's config: its frequencies "
                "change as the text grows, so that cached keys and replay would differ; choose "
                "a base model with default, linear, yarn or llama3"
            )
    for name, value in dropout_fields(config).items():
        raise ValueError(
            f"{name} must be 0 in main's config, got {value}: training would score "
            "rollouts under another distribution than they were sampled from; set it to 0"
        )
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "output_router_logits must be false in main's config, got true: the loss of the "
            "router's balance would not be added to main's; set it to false"
        )


def find_decoder(model: Any) -> str:
    """The name of the child that is main without its output layer.

    Raises ValueError if there is no such child, or if the head could not read its embeddings.
    """
    name = type(model).__name__
    found = [n for n, child in model.named_children() if isinstance(child, PreTrainedModel)]
    if len(found) != 1:
        raise ValueError(
            f"{name} must have one child that is a model, its decoder, but it has "
            f"{', '.join(found) or 'none'}; choose a base model of another family"
        )
    width = model.config.get_text_config(decoder=True).hidden_size
    embeddings = model.get_input_embeddings().weight
    if embeddings.shape[-1] != width:
        raise ValueError(
            f"{name} must have embeddings of the width of its hidden rows, {width}, but theirs is "
            f"{embeddings.shape[-1]}; choose a base model of another family"
        )
    return found[0]


PROMPTS, STEPS = (13, 8), (5, 1, 1)
"""Lengths of the texts that `check_slow_mode` reads, and how many tokens follow in each pass."""


@torch.no_grad()
def check_slow_mode(model: Any, what: str | None = None) -> None:
    """Compare slow mode's logits with those of main's stock forward, on a few random tokens.

    Two texts of different lengths go through the pass loop's cache, masks and positions: the
    prompts in one pass, then a block, then single tokens. The stock forward reads the same texts,
    one at a time, with transformers' own attention. Four things must hold:

    * The stock logits are those of the output layer on the stock hidden rows. Both come from the
      same rows, so they differ by the rounding of one product: at most 1e-5 of the largest logit in
      float32, 0.02 in 16 bits.
    * The pass loop's logits are the stock's. Sums are taken in another order in every layer, and
      rounding grows with depth: the norm of the difference is at most 1e-3 of that of a text's
      logits in float32, 0.1 in 16 bits. SmolLM2-135M, of 30 layers, is at 1e-6 and at 0.03; with
      a window of 8 tokens it would be at 0.4 or more.
    * The taps that the pass loop gives the head are those hidden states of the stock forward,
      within the same bounds. Their index differs between versions of transformers.
    * The hidden rows in training are those in evaluation, within the same bounds: no dropout.

    Leaves torch's random generators as they are. A model on the meta device has no numbers and
    passes.

    Raises ValueError naming the model, `what` or else its class, if they differ, or if the pass
    loop cannot run it.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    name, was_training = what or type(model).__name__, model.training
    output = model.output_layers()[0]
    model.eval()
    try:
        _compare(model, output, name)
    except ValueError as error:
        if str(error).startswith(f"{name} must"):
            raise
        raise _cannot_run(name, error) from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise _cannot_run(name, error) from error
    finally:
        model.train(was_training)


def _cannot_run(name: str, error: Exception) -> ValueError:
    cause = (str(error).splitlines() or ["no reason given"])[0]
    return ValueError(
        f"{name} must run in the pass loop, but it stops with {type(error).__name__}: {cause}; "
        "choose a base model of another family, or a newer transformers"
    )


def _compare(model: Any, output: OutputLayer, name: str) -> None:
    decoder = model.mtp_decoder
    exact, close = (1e-5, 1e-3) if output.weight.dtype == torch.float32 else (0.02, 0.1)
    size = (len(PROMPTS), max(PROMPTS) + sum(STEPS))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(output.weight), size, generator=generator).to(output.weight.device)
    pad_id = getattr(model.main_config, "pad_token_id", None)
    if pad_id is not None:
        # Its embedding may be zeros, on which whatever selects by score is undecided.
        tokens = torch.where(tokens == pad_id, tokens - 1, tokens) % len(output.weight)
    for row, (ours, taps) in enumerate(_slow_rows(model, tokens)):
        text = tokens[row : row + 1, : len(ours)]
        with _stock_attention(model):
            logits = model(input_ids=text, use_cache=False).logits[0].float()
            out = decoder(input_ids=text, use_cache=False, output_hidden_states=True)
            hidden = out.last_hidden_state[0]
        in_training = _rows_in_training(model, text)
        if not bool(logits.isfinite().all()):
            raise ValueError(
                f"{name} must give finite logits, but some are not: its weights are damaged or its "
                "training has diverged; choose another checkpoint"
            )
        product = output.logits(hidden).float()
        difference = float((product - logits).abs().max() / logits.abs().max().clamp(min=1e-12))
        if not difference <= exact:
            raise ValueError(
                f"{name} must give logits that its config says: last hidden rows times output "
                f"matrix, scale, bias and softcap; but they differ by {difference:.1e} of the "
                "largest: sampling and losses would use another distribution; choose a base model "
                "of another family"
            )
        difference = _difference(output.logits(ours).float(), logits)
        if not difference <= close:
            raise ValueError(
                f"{name} must give the same logits in the pass loop as by its stock forward, but "
                f"they differ by {difference:.1e} of their size (rounding: {close:g}); choose a "
                "base model whose layers attend to earlier tokens only, by position"
            )
        for tap, states in zip(model.mtp_taps, taps, strict=True):
            difference = _difference(states.float(), out.hidden_states[tap][0].float())
            if not difference <= close:
                raise ValueError(
                    f"{name} must give the head hidden_states[{tap}] of its stock forward, but the "
                    f"pass loop's differ by {difference:.1e} of their size (rounding: {close:g}); "
                    "choose a base model of another family, or a newer transformers"
                )
        difference = _difference(in_training.float(), hidden.float())
        if not difference <= close:
            raise ValueError(
                f"{name} must give the same hidden rows in training as in evaluation, but they "
                f"differ by {difference:.1e} of their size; set its dropout to 0"
            )


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


@contextmanager
def _stock_attention(model: Any) -> Iterator[None]:
    """Inside, main attends by transformers' own implementation."""
    config = model.config
    found = config._attn_implementation
    config._attn_implementation = STOCK.get(found, found)
    try:
        yield
    finally:
        config._attn_implementation = found


def _rows_in_training(model: Any, text: Tensor) -> Tensor:
    """The decoder's hidden rows [T, D] in training, without a trace in the random generators."""
    device = text.device
    with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
        model.train()
        try:
            rows: Tensor = model.mtp_decoder(input_ids=text, use_cache=False).last_hidden_state[0]
            return rows
        finally:
            model.eval()


def _slow_rows(model: Any, tokens: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
    """Last hidden rows of each text by the pass loop's forward, and its taps: [length, D] each."""
    start = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    cache = BlockCache(model.main_config.num_hidden_layers, len(tokens), tokens.shape[1])
    rows: list[list[list[Tensor]]] = [[] for _ in tokens]  # by text, by forward: hidden, taps
    for new in (PROMPTS, *((step,) * len(tokens) for step in STEPS)):
        width = max(new)
        fed = torch.stack([t[s : s + width] for t, s in zip(tokens, start, strict=True)])
        length = int(start.max()) + width
        hidden, taps = model.main_states(fed, start, cache, length)
        for tap in taps:
            if tap.shape != hidden.shape:
                raise ValueError(
                    f"its layers give hidden states {list(tap.shape)}, which are not rows of the "
                    f"width of its last ones {list(hidden.shape)}"
                )
        for row, number in enumerate(new):
            rows[row].append([states[row, :number] for states in (hidden, *taps)])
        start = start + torch.tensor(new, device=start.device)
    whole = [[torch.cat(parts) for parts in zip(*kept, strict=True)] for kept in rows]
    return [(hidden, taps) for hidden, *taps in whole]
