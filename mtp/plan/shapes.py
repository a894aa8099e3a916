"""Sizes of main and of the head, and the numbers of parameters that follow from them.

Main is a decoder with gated feed-forward layers and grouped keys, as Llama, Qwen and Mistral are.
The head is an `eavesdrop` or a `parallel` one (`mtp/modeling/heads.py`). Adapters, mixtures of
experts and other families are left out: their weights and activations are other ones.

Shapes: D main width, F width of its feed-forward layers, L layers, V vocabulary, H head width.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class MainShape:
    """Sizes of main."""

    width: int
    """D."""
    inner: int
    """F."""
    num_layers: int
    """L."""
    query_width: int
    """Query heads times the width of a head."""
    key_width: int
    """Key heads times the width of a head."""
    num_heads: int
    """Query heads."""
    vocab: int
    """V."""
    is_tied: bool
    """True if embeddings and output layer are one matrix."""

    @property
    def fields(self) -> dict[str, Any]:
        """The sizes by their names in a config of Llama or Qwen2."""
        return {
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.key_width * self.num_heads // self.query_width,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.is_tied,
        }

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer."""
        attention = 2 * self.width * (self.query_width + self.key_width)
        return attention + 3 * self.width * self.inner + 2 * self.width

    @property
    def matrix_parameters(self) -> int:
        """Weights of the output matrix."""
        return self.vocab * self.width

    @property
    def root_parameters(self) -> int:
        """Weights outside the layers: embeddings, output matrix and the final norm."""
        return (1 if self.is_tied else 2) * self.matrix_parameters + self.width

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.num_layers * self.layer_parameters + self.root_parameters

    @property
    def product_parameters(self) -> int:
        """Weights that every token is multiplied by: those of the layers."""
        return self.num_layers * (self.layer_parameters - 2 * self.width)


@dataclass(frozen=True)
class HeadShape:
    """Sizes of the head, which shares main's embeddings and output layer."""

    kind: str = "eavesdrop"
    """`eavesdrop` or `parallel`."""
    num_slots: int = 5
    """K."""
    width: int = 96
    """H."""
    num_layers: int = 1
    """Layers of an `eavesdrop` head."""
    inner: int = 256
    """Width of its feed-forward layers."""
    num_heads: int = 4
    num_taps: int = 3

    def __post_init__(self) -> None:
        if self.kind not in ("eavesdrop", "parallel"):
            raise ValueError(
                f"head must be eavesdrop or parallel, got {self.kind!r}; others are not planned"
            )

    @property
    def fields(self) -> dict[str, Any]:
        """The sizes by their names in `HeadConfig`, with the type."""
        return {
            "type": self.kind,
            "num_slots": self.num_slots,
            "hidden_size": self.width,
            "num_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "intermediate_size": self.inner,
        }

    def parameters(self, main: MainShape) -> int:
        """All weights of the head beside `main`."""
        message = self.num_taps * main.width * self.width
        if self.kind == "parallel":
            return message + self.num_slots * self.width**2 + self.width + self.width * main.width
        layer = 4 * self.width**2 + 3 * self.width * self.inner + 2 * self.width
        ends = 2 * main.width * self.width + self.num_slots * self.width + self.width
        return message + self.num_layers * layer + ends


def llama(
    width: int, inner: int, num_layers: int, heads: int, keys: int, vocab: int, is_tied: bool
) -> MainShape:
    """A main whose heads have the usual width, D / heads."""
    size = width // heads
    return MainShape(width, inner, num_layers, width, keys * size, heads, vocab, is_tied)


MAINS = {
    "135m": llama(576, 1536, 30, 9, 3, 49_152, True),
    "0.5b": llama(896, 4864, 24, 14, 2, 151_936, True),
    "1b": llama(2048, 8192, 16, 32, 8, 128_256, True),
    "1.5b": llama(1536, 8960, 28, 12, 2, 151_936, True),
    "8b": llama(4096, 14_336, 32, 32, 8, 128_256, False),
    "70b": llama(8192, 28_672, 80, 64, 8, 128_256, False),
}
"""Sizes by name: SmolLM2-135M, Qwen2.5-0.5B and 1.5B, Llama 3.2 1B, Llama 3.1 8B and 70B."""


def head_for(main: MainShape, kind: str = "eavesdrop", num_slots: int = 5) -> HeadShape:
    """A head of two layers, of main's width up to 2,048, as the shipped experiments have it."""
    width = min(main.width, 2048)
    num_heads = main.num_heads if width == main.width else width // 64
    return HeadShape(kind, num_slots, width, 2, 8 * width // 3, num_heads)


def main_of(name: str) -> MainShape:
    """A main by name, or from the config.json of a model or its folder.

    Raises ValueError for a name that is neither, and for a config without these sizes.
    """
    if name.lower() in MAINS:
        return MAINS[name.lower()]
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"--main must be one of {', '.join(MAINS)}, a config.json or a folder that has one, "
            f"got {name!r}"
        )
    try:
        return main_of_config(json.loads(path.read_text(encoding="utf-8")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must have the sizes of a decoder with gated layers, got {error!r}; use one of "
            f"{', '.join(MAINS)} that is of a similar size"
        ) from None


def main_of_config(config: dict[str, Any]) -> MainShape:
    """A main from a config of transformers. Raises ValueError for a mixture of experts."""
    config = config.get("text_config", config)
    experts = [name for name in config if "experts" in name and config[name]]
    if experts:
        raise ValueError(f"{experts[0]}: a mixture of experts is not planned")
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    return MainShape(
        width=config["hidden_size"],
        inner=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        query_width=heads * size,
        key_width=(config.get("num_key_value_heads") or heads) * size,
        num_heads=heads,
        vocab=config["vocab_size"],
        is_tied=bool(config.get("tie_word_embeddings", True)),
    )
