"""A causal LM with a small head that reads its hidden states and writes the next tokens of each
pass.

What is here: the mixin that gives any Hugging Face causal LM a head, and the classes that have it,
made on demand: `LlamaMTPForCausalLM` is transformers' `LlamaForCausalLM` with a head, and so on for
all that `AutoModelForCausalLM` knows. What is left out: heads (`heads.py`), decoding
(`generation.py`), search (`search.py`) and losses.

This file ships with checkpoints: imports torch, transformers and siblings only.

Shapes: B batch, T time, N anchors, K head slots, D main width, H head width, V vocabulary, E width
of the output matrix that the head uses (D when it shares main's, else H).
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, initialization
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .contract import check_config, find_decoder, why_whole_text
from .eagle3 import Eagle3Head
from .heads import HEADS, Head, HeadConfig, HeadLinear, HeadRMSNorm, register_head
from .native_mtp import NativeMTPHead
from .output_layer import OutputLayer
from .search import MTPSearchMixin
from .versions import wanted_states

logger = logging.get_logger(__name__)

register_head("eagle3", Eagle3Head)
register_head("native_mtp", NativeMTPHead)


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
        reason = why_whole_text(type(self), config)
        self.reads_whole_text = reason is not None
        if self.reads_whole_text:
            logger.warning_once(
                f"{type(self).__name__} decodes with mtp_mode without a cache, because {reason}: "
                "each pass reads the whole text again, which is right but slower"
            )
        super().__init__(config)
        self._decoder_name = find_decoder(self)
        self.mtp_settings = settings
        main = self.main_config
        self.mtp_taps = settings.resolved_taps(main.num_hidden_layers)
        self.mtp_head: Head = HEADS[settings.type](settings, main, len(self.mtp_taps))
        self.post_init()

    @property
    def main_config(self) -> Any:
        """The config of main as a language model: `config`, or its part that is about text."""
        return self.config.get_text_config(decoder=True)

    @property
    def mtp_decoder(self) -> Any:
        """Main without its output layer."""
        return getattr(self, self._decoder_name)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: weights are initialized by transformers' functions only, as in its own classes.

        Loading would otherwise skip modules without weights of their own, such as a family's
        decoder, some of which fill the buffers of modules below them.
        """
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize main as its family does, and the head's matrices by fan-in, whatever main's
        range is.
        """
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, HeadLinear):
            initialization.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
        elif isinstance(module, HeadRMSNorm):
            initialization.ones_(module.weight)
        elif isinstance(module, Eagle3Head):
            module.init_buffers()

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
        if isinstance(head, Eagle3Head) and head.draft_tokens is not None:
            head.resize_vocabulary(size)
        elif hasattr(head, "lm_head"):
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
        wanted = wanted_states(self.mtp_taps)
        out = self.mtp_decoder(input_ids=input_ids, output_hidden_states=wanted, **kwargs)
        taps = torch.stack([out.hidden_states[tap] for tap in self.mtp_taps], -2)
        return out.last_hidden_state, taps

    def head_embed(self, tokens: Tensor, channel_gradient: float = 1.0) -> Tensor:
        """Embeddings of tokens as the head reads them: [...] -> [..., D or H]."""
        if self.mtp_settings.shared_embeddings:
            return scale_gradient(self.get_input_embeddings()(tokens), channel_gradient)
        own = getattr(self.mtp_head, "embed_tokens", None)
        # The parallel head has no embedding: it does not read tokens.
        return own(tokens) if own is not None else tokens.new_empty(*tokens.shape, 0).float()

    def head_context(
        self, taps: Tensor, tokens: Tensor, anchors: Tensor, channel_gradient: float = 1.0
    ) -> list[Tensor]:
        """The head's contexts at N anchors of whole texts, see `Head.replay_context`."""
        embed = partial(self.head_embed, channel_gradient=channel_gradient)
        return self.mtp_head.replay_context(taps, tokens, anchors, embed)

    def output_layers(self, channel_gradient: float = 1.0) -> tuple[OutputLayer, OutputLayer]:
        """The output layers of main and of the head, one object if the head uses main's.

        channel_gradient: scale of the head's gradient on main's layer. If it is not 1, the head's
        layer is another object, whose tensors hold the same numbers.
        """
        main = OutputLayer.of_main(
            self.get_output_embeddings(), self.main_config, "the model's output layer"
        )
        own = getattr(self.mtp_head, "lm_head", None)
        if own is not None:
            tokens, size = self.mtp_head.draft_tokens, len(main.weight)
            return main, OutputLayer.from_module(own, "mtp_head.lm_head", tokens, size)
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
            hidden = self.mtp_decoder(input_ids=input_ids, use_cache=False).last_hidden_state
            return ReplayRows(hidden, main_output, None, head_output)
        hidden, taps = self.main_hidden(input_ids, use_cache=False)
        taps = scale_gradient(taps, channel_gradient)
        context = self.head_context(taps, input_ids, anchors, channel_gradient)
        head_hidden = self.mtp_head(context, self.head_embed(slot_inputs, channel_gradient))
        return ReplayRows(hidden, main_output, head_hidden, head_output)


def family_class(model_type: str) -> Any:
    """The class with a head of a `config.model_type`.

    Raises ValueError for a type that transformers has no causal LM of.
    """
    stock = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if stock is None:
        raise ValueError(
            f"model_type must be one that transformers has a causal LM of, got {model_type!r}; "
            "choose another base model, or a newer transformers"
        )
    return __getattr__(with_head(stock))


def with_head(stock: str) -> str:
    """The name of a class with a head: LlamaForCausalLM -> LlamaMTPForCausalLM."""
    at = max(stock.find("For"), stock.find("LMHead"), 0)
    return f"{stock[:at]}MTP{stock[at:]}"


def __getattr__(name: str) -> Any:
    """Make the class of a family when it is first asked for."""
    stock = next(
        (s for s in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if with_head(s) == name), None
    )
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    content = {"__module__": __name__, "__doc__": f"{stock} with a head."}
    made = type(name, (MTPMixin, getattr(transformers, stock)), content)
    return globals().setdefault(name, made)
