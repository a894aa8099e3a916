"""The choice of a run's channel: the information that leaves one pass and enters the next."""

from dataclasses import dataclass, field
from typing import Any

TEXT = "text"
"""The channel of ordinary runs: blocks of tokens, from main and the head."""


@dataclass(kw_only=True)
class ChannelConfig:
    """The channel of a run. `mtp/channels/` implements all but `text`."""

    name: str = TEXT
    """Name of the channel. `text`: tokens of main and the head, as the phases and stages of the run
    define them. `soft`, `multiplex`, `latent`, `gated`: comparators, which main uses alone and in
    the thought only. `token_message`, `block_message`, `kv`: from another model, the sharer.
    `vector_memory`: between segments. Main's head is neither trained nor used by any of them."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of a comparator: fields of its `options_class`."""

    @property
    def is_text(self) -> bool:
        """True for an ordinary run."""
        return self.name == TEXT

    def validate(self) -> None:
        """Raises ValueError for options that nothing reads."""
        if self.is_text and self.options:
            raise ValueError(
                f"channel.options must be empty for channel.name={TEXT}, got {self.options}; "
                "choose a comparator, such as channel.name=soft"
            )
