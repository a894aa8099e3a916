"""The report page with many long rollouts: size, time to write, and time from a click to the paint.

    python benchmarks/report_page.py                      500 rollouts of 2,000 tokens
    python benchmarks/report_page.py --rollouts 50 --tokens 200

Chromium runs headless (Debian's package `chromium`, driven by Playwright). A click on a rollout in
the list is timed within the page: from its event until the second animation frame after it, which
comes once the frame with the new tokens has been painted.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mtp.reports.page.browser import open_page
from mtp.reports.page.html import write_page

TARGET_MS = 200.0
WORDS = [
    "the",
    " sum",
    " of",
    " 37",
    " and",
    " 85",
    "=",
    "122",
    ";",
    " so",
    ",",
    " we",
    " add",
    "\n",
]
CLICK = """async (number) => {
  const row = document.querySelectorAll("#list .row")[number];
  const began = performance.now();
  row.click();
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  return performance.now() - began;
}"""
CPU_PARTS = ("ScriptDuration", "RecalcStyleDuration", "LayoutDuration", "TaskDuration")


def rollout(number: int, tokens: int, random_numbers: random.Random) -> dict[str, Any]:
    """A record as thoughts.jsonl has it, with all columns."""
    texts = random_numbers.choices(WORDS, k=tokens)
    values = [round(-random_numbers.expovariate(2), 4) for _ in range(tokens)]
    best = [[[text, value], ["x", -2.0], ["y", -3.0], ["z", -4.0]]
            for text, value in zip(texts, values, strict=True)]  # fmt: skip
    slots = [at % 6 for at in range(tokens)]
    heads = [value if slot else None for value, slot in zip(values, slots, strict=True)]
    return {
        "global_step": 100, "step": 100, "ends_stage": True, "stage": "rl", "mode": "fast",
        "problem": number, "prompt": f"problem {number}", "answer": "122", "given": "121",
        "right": number % 2 == 0, "passes": list(range(0, tokens, 6)),
        "phases": [[0, "thought", "fast"], [tokens - 4, "answer", "slow"]],
        "segments": [{"start": 0, "context": "", "ended_by": "end", "memory": ""}],
        "steps": [[at, at + 20, at % 3 > 0, None] for at in range(0, tokens - 20, 20)],
        "mistake": {"token": 19, "kind": "step", "written": "37+85=121", "expected": None},
        "tokens": texts, "slots": slots, "logprob": values, "entropy": [-v for v in values],
        "alternatives": best, "main": heads, "message": heads, "reference": values,
    }  # fmt: skip


def write_run(folder: Path, rollouts: int, tokens: int) -> None:
    """The folder of a run with this many rollouts of this many tokens."""
    folder.mkdir()
    random_numbers = random.Random(0)
    (folder / "config.yaml").write_text("name: long\nseed: 1\n")
    with (folder / "thoughts.jsonl").open("w") as file:
        for number in range(rollouts):
            file.write(json.dumps(rollout(number, tokens, random_numbers)) + "\n")


def main() -> int:
    """Print the measurements; the exit code is 1 if a click takes too long."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--clicks", type=int, default=9)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "long"
        write_run(folder, given.rollouts, given.tokens)
        output = folder / "report.html"
        began = time.perf_counter()
        write_page([folder], output)
        written = time.perf_counter() - began
        with open_page(output, width=1280, height=900) as page:
            page.select_option("#show", "all")
            times = []
            for click in range(given.clicks):
                page.evaluate("(top) => (document.getElementById('list').scrollTop = top)",
                              click * 46 * (given.rollouts // given.clicks))  # fmt: skip
                page.wait_for_timeout(100)
                times.append(page.evaluate(CLICK, 8))
            shown = page.locator("#panes .t").count()
            rows = page.locator("#list .row").count()
        megabytes = output.stat().st_size / 1e6
    times.sort()
    print(f"{given.rollouts} rollouts of {given.tokens} tokens: {megabytes:.0f} MB, written in "
          f"{written:.1f} s; {rows} rows and {shown} tokens are elements")  # fmt: skip
    print(f"click to paint: median {times[len(times) // 2]:.0f} ms, slowest {times[-1]:.0f} ms "
          f"(target {TARGET_MS:.0f} ms)")  # fmt: skip
    return int(times[len(times) // 2] > TARGET_MS)


if __name__ == "__main__":
    sys.exit(main())
