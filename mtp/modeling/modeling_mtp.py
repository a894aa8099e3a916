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
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, initialization
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .contract import (
    check_config,
    decoder_name,
    forward_takes,
    longest_text,
    num_cache_layers,
    reason_to_reread,
)
from .heads import HEADS, Head, HeadConfig, HeadLinear, HeadRMSNorm
from .output_layer import OutputLayer
from .search import MTPSearchMixin

logger = logging.get_logger(__name__)


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
        text = self.text_config
        self.mtp_decoder = decoder_name(self)
        self.mtp_longest = longest_text(text)
        self.mtp_rereads = reason_to_reread(self, self.main_decoder)
        self.mtp_cache_layers = num_cache_layers(text)
        names = ("position_ids", "in_pass")
        self.mtp_pass_arguments = [n for n in names if forward_takes(self.main_decoder, n)]
        self.mtp_depth = text.num_hidden_layers
        if self.mtp_rereads is not None:
            logger.warning_once(
                f"{type(self).__name__} reads its whole text again in each pass, because "
                f"{self.mtp_rereads}: decoding is right, but slower than with a cache"
            )
        self.mtp_settings = settings
        self.mtp_taps = settings.resolved_taps(self.mtp_depth)
        self.mtp_head: Head = HEADS[settings.type](settings, text, len(self.mtp_taps))
        self.post_init()

    @property
    def text_config(self) -> PretrainedConfig:
        """Main's config, of its text model if it has several."""
        return self.config.get_text_config()  # type: ignore[attr-defined, no-any-return]

    @property
    def main_decoder(self) -> nn.Module:
        """The part of main that computes hidden rows."""
        return self._modules[self.mtp_decoder]  # type: ignore[attr-defined, no-any-return]

    @classmethod
    def stock_class(cls) -> type[PreTrainedModel]:
        """The class of transformers for main alone."""
        return next(
            base
            for base in cls.__mro__
            if issubclass(base, PreTrainedModel) and not issubclass(base, MTPMixin)
        )

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, as for transformers' own classes: main is one of them.

        For custom code, transformers converts no older names of weights, such as those of separate
        experts, and leaves buffers that no file holds without values.
        """
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """transformers looks into the source of the class, which is that of the stock class."""
        return cls.stock_class()._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """As above, for experts."""
        return cls.stock_class()._can_set_experts_implementation()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize main as its family does, and the head's matrices by fan-in, whatever main's
        range is.
        """
        if isinstance(module, nn.Embedding) and module in self._head_modules():
            # Some families look for main's own embedding here.
            std = getattr(self.text_config, "initializer_range", 0.02)
            initialization.normal_(module.weight, mean=0.0, std=std)
            return
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, HeadLinear):
            initialization.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
        elif isinstance(module, HeadRMSNorm):
            initialization.ones_(module.weight)

    def _head_modules(self) -> set[nn.Module]:
        """The head's modules; none while main is built."""
        head = getattr(self, "mtp_head", None)
        return set() if head is None else set(head.modules())

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
        hidden, taps = self.decoder_states(self.mtp_taps, input_ids=input_ids, **kwargs)
        return hidden, torch.stack(taps, -2)

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
        module, options = self.get_output_embeddings(), OutputLayer.options_of(self.text_config)
        main = OutputLayer.from_module(module, "the model's output layer", **options)
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
        self.check_length(input_ids.shape[1])
        main_output, head_output = self.output_layers(0.0 if logits_detach else channel_gradient)
        if anchors is None or slot_inputs is None:
            hidden, _ = self.decoder_states([], input_ids=input_ids, use_cache=False)
            return ReplayRows(hidden, main_output, None, head_output)
        hidden, taps = self.main_hidden(input_ids, use_cache=False)
        taps = scale_gradient(taps, channel_gradient)
        context = self.mtp_head.replay_context(taps, input_ids, anchors)
        head_hidden = self.mtp_head(context, self.head_embed(slot_inputs, channel_gradient))
        return ReplayRows(hidden, main_output, head_hidden, head_output)


_made: dict[str, type[MTPMixin]] = {}


def add_head(stock: type[PreTrainedModel]) -> type[MTPMixin]:
    """The class of transformers' causal LM with a head: `LlamaForCausalLM` gives
    `LlamaMTPForCausalLM`.
    """
    name = stock.__name__
    at = next((name.index(end) for end in ENDINGS if name.endswith(end)), len(name))
    name = f"{name[:at]}MTP{name[at:]}"
    if name not in _made:
        doc = f"{stock.__name__} with a head."
        _made[name] = type(name, (MTPMixin, stock), {"__module__": __name__, "__doc__": doc})
    return _made[name]


ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Endings of the names of transformers' classes; `MTP` is inserted before them."""


def family_class(model_type: str, what: str = "model_type") -> type[MTPMixin]:
    """The class, with a head, of a family of causal LMs that transformers knows.

    Raises ValueError for another `model_type`; `what` is what the error calls it.
    """
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if name is None:
        raise ValueError(
            f"{what} must be that of a causal LM of transformers, such as llama, qwen3 or gemma2, "
            f"got {model_type!r}; choose another"
        )
    return add_head(getattr(transformers, name))


def __getattr__(name: str) -> Any:
    """Classes by name, made when they are asked for, as `auto_map` of a checkpoint does."""
    stock = getattr(transformers, name.replace("MTP", "", 1), None) if "MTP" in name else None
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return add_head(stock)
