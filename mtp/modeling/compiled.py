"""Compiled passes: main's decoder under `torch.compile`, with shapes that repeat.

A pass launches some hundred small kernels. Compiled, main's part of it is one graph; on a CUDA
device one CUDA graph, which is launched at once. A graph is made for each shape, so that shapes
must be few:

* Keys and values have one length, in a static `BlockCache`; it and the number of rows are rounded
  up (`rounded`), and a pass is one token wide or a whole number of blocks.
* A row keeps its place in the cache until the call ends. Rows that have ended are dropped from all
  work but main's.
* The prompt, whose length varies, is read by the uncompiled decoder through the loop's own cache,
  which is then copied.

What is left out: the head and the output layers are not compiled.

Ships with checkpoints: imports torch and siblings only.

Shapes: R rows still running, S rows of the static cache, L tokens fed to a pass, D main width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from .cache import BlockCache
from .versions import ASKS_FOR_QUERIES

OPTION = "compile_passes (compile_config of generate)"
STATES = ("keys", "values")
MOST_SHAPES = 64
"""Maximum number of graphs per model."""
MOST_KEPT = 2
"""Maximum number of static caches that a model keeps between calls: CUDA graphs read fixed
addresses, so a cache is used again by the next call of its shape."""


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """Arguments of `torch.compile`."""

    backend: str | Callable[..., Any] = "inductor"
    mode: str = "reduce-overhead"
    """Mode on a CUDA device; `reduce-overhead` makes CUDA graphs. Other devices take torch's
    default."""


def rounded(number: int, least: int = 1) -> int:
    """`number` rounded up to a power of two, or to one and a half times a power of two."""
    power = least
    while power < number:
        power *= 2
    three_quarters = 3 * power // 4
    return three_quarters if power >= 4 and three_quarters >= max(number, least) else power


def refusal(model: Any, reason: str, remedy: str = "decode without it") -> ValueError:
    """The error for a main whose passes cannot be compiled."""
    return ValueError(f"{OPTION} must be left out for {type(model).__name__}: {reason}; {remedy}")


def check_compilable(model: Any) -> None:
    """Raises ValueError for a main whose passes cannot be compiled, as far as its kind says."""
    if not ASKS_FOR_QUERIES:
        raise refusal(
            model,
            "transformers before 5.14 reads the length of the text, so that every pass would be "
            "compiled",
            "install a newer transformers",
        )
    if model.reads_whole_text:
        raise refusal(model, "it has no cache of keys and values by position")
    if any(hasattr(weight, "full_tensor") for weight in model.parameters()):
        raise refusal(model, "its weights are in shards (fsdp2)")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise refusal(model, "it has adapters", "merge them by merge_and_unload()")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise refusal(model, "its weights move between devices", "load it without device_map")


@torch.no_grad()
def check_traceable(model: Any) -> None:
    """`check_compilable`, and one compiled pass by the quickest backend.

    Raises ValueError if torch cannot make one graph of it, or if its hidden rows differ from those
    of the uncompiled decoder.
    """
    check_compilable(model)
    num_layers, device = model.main_config.num_hidden_layers, next(model.parameters()).device
    tokens = torch.tensor([[1, 2, 3]], device=device)
    start = torch.zeros(1, dtype=torch.int64, device=device)
    cache, was_training = BlockCache(num_layers, 1, 8), model.training
    model.eval()
    try:
        model.main_states(tokens, start, cache, 3, is_even=True)
        passes = CompiledPasses(model, Compiler(backend="eager"), cache, 1, 2)
        ours, _ = passes.read(tokens[:, :2], start + 3, start + 4, with_taps=True)
        whole = torch.cat([tokens, tokens[:, :2]], 1)
        cache = BlockCache(num_layers, 1, 8)
        expected = model.main_states(whole, start, cache, 5, is_even=True)[0][:, 3:]
    finally:
        model.train(was_training)
        _MAINS.pop(model, None)
    difference = float((ours - expected).float().norm() / expected.float().norm().clamp(min=1e-12))
    if not difference <= (1e-3 if ours.dtype == torch.float32 else 0.1):
        raise refusal(model, f"its hidden rows would differ by {difference:.1e} of their size")


def pairs(cache: BlockCache, filled: BlockCache) -> list[tuple[Any, Any]]:
    """Main's layers of two caches, where the second has keys and values."""
    both: list[tuple[Any, Any]] = list(zip(cache.layers, filled.layers, strict=True))
    return [(layer, written) for layer, written in both if written.is_initialized]


class CompiledMain:
    """A model's compiled decoder, and the static caches that it keeps between calls."""

    def __init__(self, model: Any, compiler: Compiler):
        decoder = model.mtp_decoder
        on_cuda = next(model.parameters()).is_cuda

        def forward(**kwargs: Any) -> Any:
            return decoder(**kwargs)

        mode = compiler.mode if on_cuda and compiler.backend == "inductor" else None
        self.forward = torch.compile(
            forward, backend=compiler.backend, mode=mode, dynamic=False, fullgraph=True
        )
        self.kept: dict[Any, BlockCache] = {}

    @classmethod
    def of(cls, model: Any, compiler: Compiler) -> "CompiledMain":
        """The one of a model, which is made at the first call."""
        mains = _MAINS.setdefault(model, {})
        if compiler not in mains:
            mains[compiler] = cls(model, compiler)
        return mains[compiler]

    def take(self, filled: BlockCache, num_rows: int) -> tuple[Any, BlockCache]:
        """A static cache of zeros for the layers of a filled one, and the key that it is kept by.

        No other call uses it until it is given back.
        """
        most = rounded(filled.most, 64)
        one = filled.states[0]
        key = num_rows, most, one.device, one.dtype, one.is_inference(), tuple(filled.shapes)
        cache = self.kept.pop(key, None)
        if cache is None:
            cache = BlockCache(len(filled.layers), num_rows, most, is_static=True)
            for layer, written in pairs(cache, filled):
                empty = (getattr(written, name)[:1, :, :0] for name in STATES)
                layer.lazy_initialization(*(e.expand(num_rows, -1, -1, -1) for e in empty))
            for states in cache.states:
                torch._dynamo.mark_static_address(states)
        for states in cache.states:
            states.zero_()  # a number that is not finite would spread from under the mask
        return key, cache

    def give_back(self, key: Any, cache: BlockCache) -> None:
        """Keep a cache for the next call of its shape."""
        self.kept[key] = cache
        while len(self.kept) > MOST_KEPT:
            del self.kept[next(iter(self.kept))]


_MAINS: WeakKeyDictionary[Any, dict[Compiler, CompiledMain]] = WeakKeyDictionary()
"""Beside the models and not in them: a copy of a model must not run the decoder of another."""


class CompiledPasses:
    """Main's passes of one batch after its prompts."""

    def __init__(
        self,
        model: Any,
        compiler: Compiler,
        filled: BlockCache,
        num_rows: int,
        block_size: int,
    ):
        """Takes main's keys and values out of the cache that the prompts filled.

        num_rows: rows of the batch, of which some may have ended. block_size: maximum number of
        tokens per pass and row.
        """
        self.model, self.block_size = model, block_size
        self.main = CompiledMain.of(model, compiler)
        self.kept_by, self.cache = self.main.take(filled, rounded(num_rows))
        # [R] place of each running row
        self.rows = torch.arange(filled.num_rows, device=filled.positions.device)
        source = self.rows if filled.chosen is None else filled.chosen
        for layer, written in pairs(self.cache, filled):
            for name in STATES:
                states = getattr(written, name)[source, :, : filled.length]
                getattr(layer, name)[: filled.num_rows, :, : filled.length] = states
        filled.layers = []

    def read(
        self, fed: Tensor, start: Tensor, last: Tensor, with_taps: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Main's forward over tokens [R, L] from positions `start` [R] to `last` [R].

        Returns hidden rows [R, L, D] and each tap's, in memory that later passes leave alone.
        """
        width = fed.shape[1]
        more = 0 if width == 1 else -width % self.block_size
        tokens = fed.new_zeros(self.cache.num_rows, width + more)
        tokens[self.rows] = pad(fed, (0, more))
        ends = start.new_zeros(2, self.cache.num_rows)
        ends[:, self.rows] = torch.stack([start, last])
        hidden, taps = self._forward(tokens, ends, with_taps)
        return hidden[self.rows, :width], [tap[self.rows, :width] for tap in taps]

    def _forward(
        self, tokens: Tensor, ends: Tensor, with_taps: bool
    ) -> tuple[Tensor, list[Tensor]]:
        from torch._dynamo import config
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        if tokens.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            with config.patch(
                recompile_limit=MOST_SHAPES,
                optimize_ddp=False,  # it splits graphs for a backward pass
                skip_nnmodule_hook_guards=False,  # a hook that was added since is a new graph
            ):
                states: tuple[Tensor, list[Tensor]] = self.model.main_states(
                    tokens,
                    ends[0],
                    self.cache,
                    self.cache.capacity,  # one number: a length would be part of the graph
                    with_taps=with_taps,
                    last=ends[1],
                    decoder=self.main.forward,
                )
            return states
        except FailOnRecompileLimitHit as error:
            raise ValueError(
                f"{OPTION} must meet at most {MOST_SHAPES} shapes of a model, got one more: "
                f"{len(tokens)} rows of {tokens.shape[1]} tokens over {self.cache.capacity}; "
                "decode batches of fewer sizes, or without it"
            ) from error
        except TorchDynamoException as error:
            cause = " ".join(str(error).split("\n")[:2])
            stop = f"torch.compile stops with {type(error).__name__}: {cause}"
            raise refusal(self.model, stop) from error

    def select(self, rows: Tensor) -> None:
        """Continue with the given running rows."""
        self.rows = self.rows[rows]

    def close(self) -> None:
        """Leave the cache to later calls."""
        self.main.give_back(self.kept_by, self.cache)
