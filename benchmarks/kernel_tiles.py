"""Time of each Triton kernel by itself, by its tile, on this GPU.

    python benchmarks/kernel_tiles.py [--json] [--kernel NAME ...] [--size M,D,V ...]
                                      [--tile ROWS,VOCAB,DEPTH,WARPS,STAGES[,described] ...]

bfloat16 operands. Without --tile: what `mtp_kernels.configs` ships for this device, with operands
read through tensor descriptors where that is shipped, and without. `of product` is the kernel's
rate over that of the vendor's matrix product of the same operands, in FLOP of the product. Kernels
of a chunk get at most 2,048 rows, those of decoding 16 and 80. This is how the tiles were chosen:
there is no autotuning (see `mtp_kernels.configs`).
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from measure import add_json_option, print_json
from output_layer import NUM_SLOTS, SIZES_GPU
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from mtp_kernels import configs  # noqa: E402
from mtp_kernels.configs import KERNELS, Config  # noqa: E402
from mtp_kernels.tiles import operand_arguments, scaling_options, tile_options  # noqa: E402

CHUNK_ROWS = 2048
DECODE_ROWS = (16, 80)
SCALING = scaling_options(None, 1.0, None)


def triton_of(op: str) -> Any:
    """The module that launches an op's kernels."""
    return import_module(f"mtp_kernels.linear_{op}.triton")


def with_tile(config: Config, call: Callable[[], object]) -> Callable[[], object]:
    """`call` with this configuration in place of the shipped one."""

    def run() -> object:
        shipped = configs.shipped_config
        configs.shipped_config = lambda *_: config
        try:
            return call()
        finally:
            configs.shipped_config = shipped

    return run


def kernel_call(
    kernel: str, config: Config, hidden: Tensor, weight: Tensor, target: Tensor
) -> Callable[[], object]:
    """One launch of a kernel for hidden [R, D], weight [V, D], target [R]."""
    rows, (vocab, depth) = hidden.shape[0], weight.shape
    device, dtype = hidden.device, hidden.dtype
    scaling = (1.0, None)
    if kernel in ("row_stats", "row_stats_store"):
        buffer = torch.empty(rows, vocab, device=device) if kernel == "row_stats_store" else None
        stats = triton_of("logprob").stats_triton
        call = lambda: stats(hidden, weight, None, target, *scaling, logits=buffer)  # noqa: E731
        return with_tile(config, call)
    if kernel == "gradient_from_logits":
        logits, values = torch.randn(rows, vocab, device=device), torch.rand(3, rows, device=device)
        gradient = triton_of("loss").gradient_from_logits
        return with_tile(config, lambda: gradient(logits, target, values, dtype, *scaling))
    if kernel in ("sample", "residual"):
        position = torch.arange(rows, device=device)
        seed = torch.zeros_like(position)
        if kernel == "sample":
            sample = triton_of("sample").best_triton
            call = lambda: sample(hidden, weight, None, seed, position, 0, *scaling)  # noqa: E731
            return with_tile(config, call)
        lse = torch.full((rows,), 12.0, device=device)
        layer, draft = (hidden, weight, None, lse), (hidden.flip(0), weight, None, lse)
        residual, rest = triton_of("verify").residual_triton, (position % 2 == 0, seed, position)
        return with_tile(config, lambda: residual(*layer, *draft, *rest, *scaling))
    operands = operand_arguments(config, hidden, weight)
    options = {**SCALING, **tile_options(config, hidden)}
    tiles = (triton.cdiv(rows, config.rows), triton.cdiv(vocab, config.vocab))
    out = torch.empty(rows, vocab, device=device, dtype=dtype)
    if kernel == "row_gradient":
        values = torch.rand(5, rows, device=device)
        launch = triton_of("logprob").row_gradient_kernel[tiles]
        sizes = (rows, vocab, depth)
        return lambda: launch(*operands, hidden, target, values, out, *sizes, **options)
    teacher = torch.randn(rows // NUM_SLOTS, vocab, device=device)
    place = (torch.arange(rows, device=device) // NUM_SLOTS).clamp(max=len(teacher) - 1)
    given = (*operands, hidden, teacher, teacher.logsumexp(-1), place)
    if kernel == "kl_stats":
        row_tiles, splits, per_split = configs.split_grid(rows, vocab, config, device)
        floats = torch.empty(splits, 4, rows, device=device)
        launch = triton_of("kl").kl_stats_kernel[row_tiles, splits]
        sizes = (rows, vocab, depth, per_split)
        return lambda: launch(*given, floats, *sizes, REVERSE=False, **options)
    values = torch.rand(3, rows, device=device)
    launch = triton_of("kl").kl_gradient_kernel[tiles]
    switches = {"REVERSE": False, "OF_TEACHER": False}
    return lambda: launch(*given, values, out, rows, vocab, depth, **switches, **options)


def seconds_of(call: Callable[[], object]) -> float:
    """Median time of a call on the device."""
    return triton.testing.do_bench(call, warmup=10, rep=60, return_mode="median") / 1e3


def chosen_tiles(kernel: str, given: list[str] | None, weight: Tensor) -> list[Config]:
    """The tiles to time: those given, or the shipped ones."""
    if given:
        return [
            Config(*map(int, tile.split(",")[:5]), described=tile.endswith(",described"))
            for tile in given
        ]
    architecture = configs.architecture_of(weight.device.index or 0)
    shipped = (configs.shipped_config(kernel, architecture, weight.dtype, d) for d in (True, False))
    return list(dict.fromkeys(shipped))


def main() -> None:
    """Times every kernel and size, and prints one line each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_json_option(parser)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--size", nargs="+", default=SIZES_GPU, help="rows,D,V")
    parser.add_argument("--tile", nargs="+", help="tiles in place of the shipped ones")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("kernel_tiles.py needs a GPU that torch can use; there is none")
    results = []
    for size in options.size:
        most, depth, vocab = map(int, size.split(","))
        torch.manual_seed(0)
        hidden = (torch.randn(most, depth, device="cuda") * 0.5).bfloat16()
        weight = (torch.randn(vocab, depth, device="cuda") * 0.1).bfloat16()
        target = torch.randint(0, vocab, (most,), device="cuda")
        part = hidden[:CHUNK_ROWS]
        product = 2 * len(part) * depth * vocab / seconds_of(partial(torch.mm, part, weight.T))
        print(f"\nD = {depth}, V = {vocab}; matrix product {product / 1e12:.0f} TFLOP/s")
        for kernel in options.kernel:
            sizes = DECODE_ROWS if kernel in ("sample", "residual") else (min(CHUNK_ROWS, most),)
            sizes = (most,) if kernel == "row_stats" else sizes
            for config in chosen_tiles(kernel, options.tile, weight):
                for rows in sizes:
                    call = kernel_call(kernel, config, hidden[:rows], weight, target[:rows])
                    seconds = seconds_of(call)
                    rate = 2 * rows * depth * vocab * (2 if kernel == "residual" else 1) / seconds
                    tile = f"{config.rows}x{config.vocab}x{config.depth} w{config.warps}"
                    tile += f" s{config.stages}" + " described" * config.described
                    print(
                        f"{kernel:21} {tile:28} rows {rows:6} {seconds * 1e3:9.4f} ms "
                        f"{rate / 1e12:6.0f} TFLOP/s, {rate / product:4.2f} of product; weight at "
                        f"{weight.nbytes / seconds / 1e9:5.0f} GB/s",
                        flush=True,
                    )
                    result = {"kernel": kernel, "tile": tile, "rows": rows, "D": depth, "V": vocab}
                    results.append({**result, "seconds": seconds, "over_product": rate / product})
    print_json(options.json, {"results": results})


if __name__ == "__main__":
    main()
