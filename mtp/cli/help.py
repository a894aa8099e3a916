"""`python train.py --help` and `mtp train --help`, from conf/ alone: all choices, with each file's
first comment.

Imports nothing that a run needs, so help is printed at once.
"""

import textwrap
from pathlib import Path

from ..common.conf import options_of

WIDTH = 100
GROUPS = (
    "experiment", "model", "head", "task", "decoding", "fabric", "logger", "sweep", "sweeper",
    "study",
)  # fmt: skip
"""Groups of conf/, sorted by how often they are used."""

PROGRAM = "python train.py"
"""Words that start a run in a checkout."""

USAGE = """\
Train a main LLM together with its eavesdropping head.

  python train.py                              the default experiment, into runs/default
  python train.py experiment=NAME              another experiment, into runs/ and its name
  python train.py dry_run=true                 a few steps of each stage, an export, an estimate
  python train.py resume=true                  continue from the last checkpoint
  python train.py -m seed=1,2,3                a sweep, into runs/default_sweep/seed=1 ...
  python train.py -m sweep=submitit_slurm hydra.launcher.partition=gpu seed=1,2,3
  python train.py -m study=NAME                all runs of a study, one after the other
"""

KEYS = """\
Keys that are often set, by key=value, with example values:
  name=mine                       folder of the run in runs/
  seed=2
  resume=true                     or auto: continue if there is a checkpoint, else start
  overwrite=true                  replace a run of the same name
  stages.rl.steps=250             steps of a stage; 0 leaves it out
  stages.rl.optimizers.main.lr=2e-4  rate of main in a stage, and of the head:
  stages.rl.optimizers.head.lr=4e-4
  stages.rl.channel_gradient=1.0  scale of the head's gradient on main
  head.num_slots=5                tokens that the head adds to each pass
  head.taps=[1,2]                 layers of main whose hidden states the head reads
  decoding.max_new_tokens=40
  evaluation.num_problems=512
  fabric.precision=bf16-mixed     or 32-true, bf16-true

All keys with their values: python train.py --cfg job
Hydra's own options: python train.py --hydra-help
Meaning of a key: the field of the same name in mtp/config.py and the files it imports.
"""


def help_text(conf: Path, program: str = PROGRAM) -> str:
    """The whole help, in lines of at most `WIDTH` columns, for the words that start a run."""
    usage, keys = (text.replace(PROGRAM, program) for text in (USAGE, KEYS))
    return f"{usage}\nChoices, set by group=choice:\n{choices(conf)}\n\n{keys}"


def choices(conf: Path) -> str:
    """Every group of conf/ with its options, each with its file's description."""
    found = {path.name for path in conf.iterdir() if path.is_dir()}
    groups = [group for group in GROUPS if group in found] + sorted(found - set(GROUPS))
    options = {group: described(conf / group) for group in groups}
    column = 4 + max(len(name) for group in options.values() for name in group) + 2
    lines = []
    for group, names in options.items():
        lines.append(f"  {group}")
        for name, text in names.items():
            lines += textwrap.wrap(
                text or "-",
                WIDTH,
                initial_indent=f"    {name}".ljust(column),
                subsequent_indent=" " * column,
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def described(folder: Path) -> dict[str, str]:
    """The options of a group with their descriptions, those in folders of their own last."""
    return {name: about(folder / f"{name}.yaml") for name in options_of(folder)}


def about(path: Path) -> str:
    """The comment at the top of a file of conf/, as one line without Hydra's directives."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line[1:].strip())
    return " ".join(lines)
