"""A causal LM with a small head that reads its hidden states and writes the next tokens of each
pass.

This module has the mixin that gives any Hugging Face causal LM a head, and one two-line class per
base family. Heads are in `heads.py`, decoding in `generation.py`, search in `search.py`; losses are
not shipped.

This file ships with checkpoints: imports torch, transformers and siblings only.

Shapes: B batch, T time, N anchors, K head slots, D main width, H head width, V vocabulary, E width
of the output matrix that the head uses (D when it shares main's, else H).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PretrainedConfig, Qwen3ForCausalLM, initialization

from .contract import check_config, check_layout
from .heads import HEADS, Head, HeadConfig, HeadLinear, HeadRMSNorm
from .output_layer import OutputLayer
from .search import MTPSearchMixin


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """`x` itself; its gradient is multiplied by `scale` (0 detaches, so no gradient is made)."""
    if scale == 1.0:
        return x
    return x.detach() if scale == 0.0 else _ScaleGradient.apply(x, scale)


class ReplayRows(NamedTuple):
    """Result of one parallel forward over flat text; logits are left to the caller."""

    main_hidden: Tensor
    """[B, T, D] main's hidden rows after the final norm; row t predicts token t + 1."""
    main_output: OutputLayer
    """Main's output layer."""
    head_hidden: Tensor | None
    """[N, K, E] the head's hidden rows; row (n, j) predicts slot j + 1 of anchor n. None without
    anchors."""
    head_output: OutputLayer
    """The head's output layer: the same object as main's if both are one, gradient included."""


class MTPMixin(MTPSearchMixin):
    """Gives a causal LM class a head. Put it before the stock class in the bases.

    The stock parameters keep their names; the head's are `mtp_head.*`. Settings are read from
    `config.mtp` (a dict of `HeadConfig` fields). A main that the pass loop cannot follow is refused
    (`contract.py`).
    """

    def __init__(self, config: PretrainedConfig):
        if getattr(config, "mtp", None) is None:
            config.mtp = HeadConfig().to_checkpoint()
        check_config(config)
        settings = HeadConfig.from_checkpoint(config.mtp)
        config.mtp = settings.to_checkpoint()
        super().__init__(config)
        check_layout(self)
        self.mtp_settings = settings
        self.mtp_taps = settings.resolved_taps(config.num_hidden_layers)
        self.mtp_head: Head = HEADS[settings.type](settings, config, len(self.mtp_taps))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize main as its family does, and the head's matrices by fan-in, whatever main's
        range is.
        """
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, HeadLinear):
            initialization.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
        elif isinstance(module, HeadRMSNorm):
            initialization.ones_(module.weight)

    def _resize_token_embeddings(
        self,
        new_num_tokens: int | None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Resize main's matrices, and the head's own with them: one row per token in each."""
        embeddings = super()._resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        head, size = self.mtp_head, embeddings.weight.shape[0]
        if hasattr(head, "embed_tokens"):
            self._get_resized_embeddings(head.embed_tokens, size, mean_resizing=mean_resizing)
        if hasattr(head, "lm_head"):
            old = head.lm_head
            new = self._get_resized_lm_head(old, size, mean_resizing=mean_resizing).weight
            # In its own module, so that `_init_weights` does not confuse it with main's.
            old.weight, old.out_features = (
                nn.Parameter(new.detach(), bool(old.weight.requires_grad)),
                size,
            )
        return embeddings

    @property
    def block_size(self) -> int:
        """Number of tokens per pass, K + 1."""
        return self.mtp_settings.num_slots + 1

    def main_hidden(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Main's forward: hidden rows [B, T, D] after the final norm and taps [B, T, taps, D]."""
        out = self.model(input_ids=input_ids, output_hidden_states=self.mtp_taps, **kwargs)
        taps = torch.stack([out.hidden_states[tap] for tap in self.mtp_taps], -2)
        return out.last_hidden_state, taps

    def head_embed(self, tokens: Tensor, channel_gradient: float = 1.0) -> Tensor:
        """Embeddings of tokens as the head reads them: [...] -> [..., D or H]."""
        if self.mtp_settings.shared_embeddings:
            return scale_gradient(self.get_input_embeddings()(tokens), channel_gradient)
        own = getattr(self.mtp_head, "embed_tokens", None)
        # The parallel head has no embedding: it does not read tokens.
        return own(tokens) if own is not None else tokens.new_empty(*tokens.shape, 0).float()

    def output_layers(self, channel_gradient: float = 1.0) -> tuple[OutputLayer, OutputLayer]:
        """The output layers of main and of the head, one object if the head uses main's.

        channel_gradient: scale of the head's gradient on main's layer. If it is not 1, the head's
        layer is another object, whose tensors hold the same numbers.
        """
        main = OutputLayer.from_module(self.get_output_embeddings(), "the model's output layer")
        if not self.mtp_settings.shared_embeddings:
            return main, OutputLayer.from_module(self.mtp_head.lm_head, "mtp_head.lm_head")
        if channel_gradient == 1.0:
            return main, main
        bias = None if main.bias is None else scale_gradient(main.bias, channel_gradient)
        return main, main.replaced(scale_gradient(main.weight, channel_gradient), bias)

    def replay(
        self,
        input_ids: Tensor,
        anchors: Tensor | None = None,
        slot_inputs: Tensor | None = None,
        channel_gradient: float = 1.0,
        logits_detach: bool = False,
    ) -> ReplayRows:
        """One causal forward over flat, right-padded text, and the head at the given anchors.

        Args:
            input_ids: [B, T] int64; padding on the right only, so no mask is needed.
            anchors: [N] int64 indices into the flattened B * T positions.
            slot_inputs: [N, K] int64, t_0..t_{K-1}: the token that each head slot reads.
            channel_gradient: scale of the head's gradient on every parameter of main, its embedding
                and output matrices included; 0 detaches.
            logits_detach: detach the head's gradient from an output layer shared with main.
        """
        main_output, head_output = self.output_layers(0.0 if logits_detach else channel_gradient)
        if anchors is None or slot_inputs is None:
            hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
            return ReplayRows(hidden, main_output, None, head_output)
        hidden, taps = self.main_hidden(input_ids, use_cache=False)
        taps = scale_gradient(taps, channel_gradient)
        context = self.mtp_head.replay_context(taps, input_ids, anchors)
        head_hidden = self.mtp_head(context, self.head_embed(slot_inputs, channel_gradient))
        return ReplayRows(hidden, main_output, head_hidden, head_output)


class LlamaMTPForCausalLM(MTPMixin, LlamaForCausalLM):
    """Llama and its kin (SmolLM2, Mistral-shaped checkpoints saved as Llama) with a head."""


class Qwen3MTPForCausalLM(MTPMixin, Qwen3ForCausalLM):
    """Qwen3 with a head."""


FAMILIES: dict[str, type[MTPMixin]] = {
    "llama": LlamaMTPForCausalLM,
    "qwen3": Qwen3MTPForCausalLM,
}
"""Class of each `config.model_type`. A new family takes two lines: a class above and an entry
here."""
