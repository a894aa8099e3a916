"""Cells of the table of channels: its tasks, its rows, and a run for each of them and a seed."""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..config import decides_numbers

ROOT = Path(__file__).parents[2]
MEASURED = "measured.json"
"""File of a run's measurement, in the run's folder."""

MUON = "stages.main.optimizers.main={algorithm:muon,lr:2e-3,warmup_steps:0}"
"""Optimizer of the tiny Llama, whatever an experiment's own is."""
TASKS: dict[str, list[str]] = {
    "graph_search": [],
    **{
        f"running_sum_{terms}": [
            "task=running_sum",
            f"task.num_terms={terms}",
            f"decoding.max_new_tokens={16 * terms}",
            "model=tiny_llama",
            MUON,
            "stages.main.steps=1500",
            "stages.main.evaluate_every=1000",
        ]
        for terms in (3, 5, 7)
    },
    "pointers": [
        "task=pointer_chasing",
        "task.num_nodes=8",
        "task.hops=3",
        "task.thought=nodes",
        "model=tiny_llama",
        "model.config.tie_word_embeddings=true",
        MUON,
        "stages.main.steps=1500",
        "stages.main.evaluate_every=250",
    ],
    "chain_sum": [
        "task=chain_sum",
        "task.options={min_terms:4,max_terms:4,min_digits:1,max_digits:1}",
        "model=smollm2",
        "model.attention=eager",
        "fabric.precision=bf16-mixed",
        "decoding.max_new_tokens=32",
        "decoding.system_prompt=''",
        "stages.main.optimizers.main={algorithm:adamw,lr:4e-4,decay:linear,final_lr_ratio:0.3}",
        "stages.main.examples.batch_size=16",
        "stages.main.steps=120",
        "stages.main.evaluate_every=40",
        "evaluation.num_problems=256",
        "evaluation.num_interim_problems=64",
        "evaluation.batch_size=64",
    ],
    "two_models": [],
    "segments": [],
    "projects": [],
}
"""Overrides of each task. Graph search is the experiments' own. Sums of three and seven terms are
for the number of tokens per pass; chain_sum is SmolLM2-135M's. The experiments of the last three
name it themselves, because only channels between two models, between segments, and between
problems, have them."""

RL_BLOCKS = (3, 8)
"""k of the rows of blocks with RL."""
ROWS: dict[str, list[str]] = {
    "no_thought": ["experiment=channels/no_thought"],
    "token": ["experiment=channels/token"],
    **{f"block_{k}": ["experiment=channels/block", f"head.num_slots={k}"] for k in (1, 2, 3, 5, 8)},
    "soft": ["experiment=channels/soft"],
    "multiplex": ["experiment=channels/multiplex"],
    "latent": ["experiment=channels/latent"],
    "gated": ["experiment=channels/gated"],
    "token_rl": ["experiment=channels/token", "stages.rl.rollouts.mode=slow"],
    **{f"block_{k}_rl": ["experiment=channels/block", f"head.num_slots={k}"] for k in RL_BLOCKS},
    "soft_rl": ["experiment=channels/soft"],
    "multiplex_rl": ["experiment=channels/multiplex"],
    "gated_rl": ["experiment=channels/gated"],
    "no_message": ["experiment=channels/no_message"],
    "token_message": ["experiment=channels/token_message"],
    **{
        f"block_message_{k}": ["experiment=channels/block_message", f"head.num_slots={k}"]
        for k in (1, 3, 5)
    },
    "kv": ["experiment=channels/kv"],
    "no_memory": ["experiment=channels/no_memory"],
    "text_memory": ["experiment=channels/text_memory"],
    "vector_memory": ["experiment=channels/vector_memory"],
    "own_memory": ["experiment=channels/own_memory"],
    "text_memory_shared": ["experiment=channels/text_memory_shared"],
    "vector_memory_shared": ["experiment=channels/vector_memory_shared"],
}
"""Overrides of each row of the table."""

MORE = {
    ("pointers", "latent"): [
        "channel.options.levels=2",
        "channel.options.text_steps=500",
        "channel.options.level_steps=400",
    ],
    **{
        ("pointers", f"{row}_rl"): [
            "stages.main.steps=350",
            "stages.rl.steps=500",
        ]
        for row in ("token", "soft", "multiplex", "gated")
    },
    **{
        ("pointers", f"block_{k}_rl"): [
            "stages.main.steps=600",
            "stages.rl.steps=500",
            "stages.rl.optimizers.main.lr=3e-4",
            "stages.rl.optimizers.head.lr=6e-4",
        ]
        for k in RL_BLOCKS
    },
    ("running_sum_5", "latent"): [
        "model.config.tie_word_embeddings=true",
        "channel.options.levels=4",
        "channel.options.text_steps=1500",
        "channel.options.level_steps=600",
        "stages.main.steps=4500",
        "stages.main.evaluate_every=500",
    ],
    **{
        ("chain_sum", row): ["fabric.precision=32-true"]  # a comparator has no other
        for row in ("no_thought", "soft", "multiplex")
    },
    ("chain_sum", "block_5"): [
        "head=smollm2",
        "head.taps=[10,20,30]",
        "stages.main.examples.num_anchors=8",
        "stages.main.optimizers.head={algorithm:muon,lr:1e-3,decay:linear,final_lr_ratio:0.3}",
    ],
}
"""Overrides of single cells, by task and row: a curriculum or a head that suits the task. Rows with
RL begin it where text or blocks are learned in part."""

READER = "token"
"""The row whose model reads the transcripts of all rows of its task and seed."""
CONTROLS = ("no_thought", "no_message", "no_memory", "own_memory")
"""Rows without a thought, a message, a memory, or a memory that outlives a problem."""
UNREAD = ("two_models", "segments", "projects")
"""Tasks without a reader: their answers follow from more than one thought."""
TEXT_ROW = re.compile(r"token|block_\d+")
"""Rows whose thought is text, a number of tokens per pass."""


def belongs(row: str, task: str) -> bool:
    """True if the table has this row for this task."""
    if "_message" in row or row == "kv":
        return task == "two_models"
    if row == "own_memory" or row.endswith("_shared"):
        return task == "projects"
    if row.endswith("_memory"):
        return task == "segments"
    if row.endswith("_rl"):
        return task == "pointers"
    if task == "chain_sum":
        return row in ("no_thought", "token", "block_5", "soft", "multiplex")
    if task in ("running_sum_3", "running_sum_7"):
        return TEXT_ROW.fullmatch(row) is not None
    return task in ("graph_search", "running_sum_5", "pointers")


@dataclass(frozen=True)
class Cell:
    """One run of the table."""

    row: str
    task: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]
    """Arguments of `train.py`, its folder and seed not included."""

    @property
    def is_trained(self) -> bool:
        """True if the run has ended."""
        return (self.folder / "summary.json").is_file()

    @property
    def is_measured(self) -> bool:
        """True if its model has been measured."""
        return (self.folder / MEASURED).is_file()

    @property
    def reader(self) -> Path | None:
        """Folder of the run whose model reads the transcripts; None without a reader."""
        return None if self.task in UNREAD else self.folder.parents[1] / READER / str(self.seed)

    @property
    def shown_command(self) -> str:
        """The training command without folder and seed, and without what decides no number, such
        as threads.
        """
        return " ".join(["train.py", *filter(decides_numbers, self.overrides)])

    def command(self, *more: str) -> list[str]:
        """The training command."""
        where = [f"seed={self.seed}", f"run_dir={self.folder}"]
        return [sys.executable, str(ROOT / "train.py"), *self.overrides, *where, *more]


def plan(
    rows: Iterable[str],
    tasks: Iterable[str],
    seeds: Iterable[int],
    runs: Path,
    overrides: Iterable[str],
) -> list[Cell]:
    """All cells; the first seed of every row comes first, and a task's reader before its others.

    Raises ValueError for unknown names, and for rows and tasks none of which belong together.
    """
    rows, tasks = list(rows), list(tasks)
    for given, known, option in ((rows, ROWS, "--rows"), (tasks, TASKS, "--tasks")):
        for name in given:
            if name not in known:
                raise ValueError(f"{option} must be of {', '.join(known)}, got {name}")
    cells = [
        Cell(
            row,
            task,
            seed,
            runs / task / row / str(seed),
            (
                *ROWS[row],
                *TASKS[task],
                *MORE.get((task, row), []),
                *overrides,
            ),
        )
        for seed in seeds
        for task in tasks
        for row in with_reader(task, [row for row in rows if belongs(row, task)])
    ]
    if not cells:
        raise ValueError(
            f"--tasks must be of the rows {', '.join(rows)}, got {', '.join(tasks)}; "
            f"{rows[0]} has {', '.join(task for task in TASKS if belongs(rows[0], task))}"
        )
    return cells


def with_reader(task: str, rows: list[str]) -> list[str]:
    """The rows of a task, if any, with the reader's as the first one."""
    if not rows or task in UNREAD:
        return rows
    return [READER, *(row for row in rows if row != READER)]
