"""Train a main LLM and its eavesdropping head: `python train.py [experiment=NAME] [key=value ...]`.

`python train.py --help` lists the options; conf/ holds the defaults and the experiments.
"""

import sys

import hydra
from omegaconf import DictConfig

from mtp.config import register_configs, to_run_config

register_configs()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float | None:
    """Run the configured stages; the last fast accuracy is what a sweeper may maximise."""
    from mtp.trainer import Interrupted, train

    try:
        summary = train(to_run_config(config))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)
    last = summary["stages"][-1]
    return last["slow_accuracy"] if last["fast_accuracy"] is None else last["fast_accuracy"]


if __name__ == "__main__":
    main()
