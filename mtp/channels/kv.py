"""KV: the sharer's keys and values, projected and fused into the receiver's cache.

Cache2Cache (Fu et al., arXiv 2510.03215), for two models with a half of the problem each
(`two_models.py`). The sharer reads its half in one pass and writes nothing. The receiver reads as
many placeholders (the pad token), and each layer l of its cache becomes

    z  = silu(W [K_sharer ; K_receiver])
    K' = K_receiver + g * sigmoid(A z) * (P z)

by head and position, and V the same with weights of its own; A z is one number per head, g one
number per layer. Then the receiver reads its own half and writes, attending to the fused cache. So
position t of the receiver is fused with position t of the sharer, as in the paper, where both read
the same tokens. The message is K' - K_receiver: zeros give the receiver alone.

Training has two levels. At first both models learn text messages by token. After `text_steps` both
are frozen and only the fuser learns, from the receiver's text. The paper has two-layer MLPs and a
gate that is annealed to 0 or 1; both are left out here. P begins at zero.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from ..common.bounds import bounded
from ..rollouts.prompt_format import PromptFormat
from ..tasks.base import Example
from .channel import WriteOptions, Written, closer_id
from .reading import Reader, ids_tensor, logits_of, padded_left
from .two_models import TokenMessage, received, shared_half
from .writing import continue_text


@dataclass(kw_only=True)
class KVOptions:
    """Settings of `channel.name=kv`."""

    text_steps: int = bounded(150, at_least=0)
    """Optimizer steps in which both models learn text messages, before only the fuser learns."""
    hidden_size: int = bounded(64, at_least=1, at_most=65536)
    """Width of the fuser's hidden layer."""


class Fusion(nn.Module):
    """The change of one layer's keys, or values."""

    def __init__(self, heads: int, head_dim: int, hidden_size: int):
        super().__init__()
        self.input = nn.Linear(2 * heads * head_dim, hidden_size)
        self.output = nn.Linear(hidden_size, heads * head_dim)
        self.weight = nn.Linear(hidden_size, heads)
        self.gate = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """[B, H, T, d] of the sharer and the receiver -> [B, H, T, d] to add to the receiver's."""
        flat = torch.cat([source, target], 1).transpose(1, 2).flatten(2)
        hidden = F.silu(self.input(flat))
        change = self.output(hidden).unflatten(-1, target.shape[1::2])
        weighted = self.gate.sigmoid() * self.weight(hidden).sigmoid()[..., None] * change
        return weighted.transpose(1, 2)


class KV(TokenMessage):
    """The sharer's cache."""

    options_class = KVOptions

    def __init__(self, options: KVOptions, sharer: Any):
        super().__init__(options, sharer)
        probe = DynamicCache(config=sharer.main_config)
        ids = torch.zeros(1, 1, dtype=torch.long, device=sharer.device)
        with torch.no_grad():
            sharer.mtp_decoder(input_ids=ids, past_key_values=probe, use_cache=True)
        tensors = tensors_of(probe)
        if any(not isinstance(x, Tensor) or x.ndim != 4 for x in tensors):
            raise ValueError(
                "model.family must have keys and values in every layer for channel.name=kv, got "
                f"{type(sharer).__name__}; choose model.family=llama"
            )
        self.fusions = nn.ModuleList(
            Fusion(x.shape[1], x.shape[3], options.hidden_size) for x in tensors
        )
        """The fusion of the keys and that of the values, layer by layer."""

    def last_level_begins(self) -> int:
        return int(self.options.text_steps)

    def supervised_loss(
        self, model: Any, fmt: PromptFormat, examples: list[Example], *, step: int, seed: int
    ) -> Tensor:
        if step < self.options.text_steps:
            return super().supervised_loss(model, fmt, examples, step=step, seed=seed)
        texts = [fmt.completion_ids(e.thought, e.answer) for e in examples]
        with frozen(model, self.fusions):
            ids, scored = ids_tensor(texts, fmt.pad_id, next(self.parameters()).device)
            _, hidden, _ = self.read(model, fmt, examples, then=ids[:, :-1])
            logits = logits_of(model, hidden[:, -ids.shape[1] :][scored])
        return F.cross_entropy(logits, ids[scored])

    def read(
        self,
        model: Any,
        fmt: PromptFormat,
        examples: list[Example],
        *,
        messages: list[Tensor] | None = None,
        then: Tensor | None = None,
    ) -> tuple[Reader, Tensor, list[Tensor]]:
        """The receiver after it has read the fused cache, its prompts and the ids `then` [B, L].

        messages: [n, E] of each example; None: those of the sharer. Returns the reader, the hidden
        rows of the last pass, and the messages.
        """
        halves = [fmt.prompt_ids(shared_half(example)) for example in examples]
        lengths = [len(ids) for ids in halves]
        if messages is not None:
            lengths = [len(message) for message in messages]
        reader = Reader(model, [[fmt.pad_id] * n for n in lengths], fmt.pad_id)
        reader.read_prompts()
        if messages is None:
            changes = self.changes(reader, Reader(self.sharer, halves, fmt.pad_id))
            messages = [change[-n:] for change, n in zip(changes, lengths, strict=True)]
        fuse(reader.cache, messages)
        prompts = [fmt.question_ids(example) for example in examples]
        ids, mask = padded_left(prompts, fmt.pad_id, reader.prompts.device)
        if then is not None:
            ids, mask = torch.cat([ids, then], 1), torch.cat([mask, torch.ones_like(then)], 1)
        return reader, reader.read(reader.embedding(ids), mask), messages

    def changes(self, receiver: Reader, sharer: Reader) -> Tensor:
        """[B, T, E] changes of the receiver's cache: keys and values of all layers side by side."""
        with torch.no_grad():
            sharer.read_prompts()
        pairs = zip(tensors_of(sharer.cache), tensors_of(receiver.cache), strict=True)
        found = [fusion(*pair) for fusion, pair in zip(self.fusions, pairs, strict=True)]
        return torch.cat([change.transpose(1, 2).flatten(2) for change in found], -1)

    @torch.no_grad()
    def write(
        self, model: Any, fmt: PromptFormat, examples: list[Example], options: WriteOptions
    ) -> list[Written]:
        reader, hidden, messages = self.read(model, fmt, examples)
        closer = closer_id(fmt)
        texts = continue_text(reader, hidden[:, -1], options, closer=closer, ends=fmt.eos_ids)
        # One pass before the receiver's own: the sharer reads its half while the receiver reads
        # placeholders.
        return [
            received(fmt, ids, 1, message, "") for ids, message in zip(texts, messages, strict=True)
        ]

    @torch.no_grad()
    def answer_log_probs(
        self,
        model: Any,
        fmt: PromptFormat,
        examples: list[Example],
        outputs: list[Written],
        messages: list[Tensor],
    ) -> Tensor:
        device = next(self.parameters()).device
        ids, scored = ids_tensor([output.text for output in outputs], fmt.pad_id, device)
        _, hidden, _ = self.read(model, fmt, examples, messages=messages, then=ids[:, :-1])
        log_p = logits_of(model, hidden[:, -ids.shape[1] :]).log_softmax(-1)
        return (log_p.gather(-1, ids[..., None])[..., 0] * scored).sum(-1)


def tensors_of(cache: DynamicCache) -> list[Tensor]:
    """Keys and values of all layers, [B, H, T, d] each."""
    layers: list[Any] = cache.layers
    names = ("keys", "values")
    return [getattr(layer, name, None) for layer in layers for name in names]  # type: ignore[misc]


def fuse(cache: DynamicCache, messages: list[Tensor]) -> None:
    """Add each row's message [n, E] to the last n positions of its keys and values, in place of the
    layers' tensors.
    """
    longest = tensors_of(cache)[0].shape[2]
    change = torch.stack([F.pad(m, (0, 0, longest - len(m), 0)) for m in messages])
    first = 0
    for layer in cache.layers:
        for name in ("keys", "values"):
            tensor = getattr(layer, name)
            size = tensor.shape[1] * tensor.shape[3]
            part = change[..., first : first + size].unflatten(-1, tensor.shape[1::2])
            setattr(layer, name, tensor + part.transpose(1, 2))
            first += size


@contextmanager
def frozen(model: nn.Module, trained: nn.Module) -> Iterator[None]:
    """Context in which only the parameters of `trained` require a gradient."""
    kept = {id(parameter) for parameter in trained.parameters()}
    chosen = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    for parameter in chosen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in chosen:
            parameter.requires_grad_(True)
