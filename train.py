"""Train a main LLM and its eavesdropping head: `python train.py [experiment=NAME] [key=value ...]`.

`python train.py --help` lists the options; conf/ holds the defaults and the experiments.
"""

import os
import sys
from pathlib import Path

from mtp.cli.help import help_text
from mtp.common.process import quiet_imports, run_command

if __name__ == "__main__":
    quiet_imports()
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.exit(run_command(lambda: print(help_text(Path(__file__).with_name("conf")))))

# A step's freed memory returns to the system and is fetched page by page in the next step. PyTorch
# reads this at its first allocation: blocks of 2 MB and more use large pages (Linux).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import hydra
from omegaconf import DictConfig

from mtp.cli.hydra import job_overrides, register_configs, run_job
from mtp.config import to_run_config

register_configs()


def run(config: DictConfig) -> float | None:
    """Run the configured stages. Returns the last fast accuracy, else the only one."""
    from mtp.trainer import Interrupted, train
    from mtp.training.runtime import hand_on

    try:
        summary = train(to_run_config(config))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        hand_on(stop.signal)
        # A launcher of several processes treats any other exit code as a crash and kills the first
        # process, which may still be writing the checkpoint.
        sys.exit(130 if os.environ.get("LOCAL_RANK", "0") == "0" else 0)
    last = summary["stages"][-1]
    found = (last.get(name) for name in ("fast_accuracy", "slow_accuracy", "accuracy"))
    return next((accuracy for accuracy in found if accuracy is not None), None)


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float | None:
    """Run once, or run a job of a sweep; a sweeper may maximise the accuracy that it returns."""
    overrides = job_overrides()
    if overrides is None:
        code = run_command(lambda: run(config))  # Hydra would print its own message
        return sys.exit(code) if code else None
    return run_job(lambda: run(config), Path(config.run_dir), overrides)


if __name__ == "__main__":
    # Hydra raises, and `run_command` chooses the message.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    sys.exit(run_command(main))
