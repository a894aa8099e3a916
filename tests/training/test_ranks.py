"""Every objective takes the same step on two processes as on one, by each strategy."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from rank_cases import CASES, take_step

from mtp.training.runtime import FabricConfig
from mtp.training.sharding import check_mean

HERE = Path(__file__).parent


def on_two(folder: Path, cases: dict[str, list[str]]) -> None:
    """Takes the steps of each strategy on two processes of this machine."""
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, str(HERE / "ranks_worker.py"), str(folder), json.dumps(cases)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout


SHARDED = ["main_ce", "k3", "gspo", "slow", "everything", "one_process_without_rollouts"]
SHARDED += ["head_of_its_own"]
"""Cases that are taken with sharded weights too, which is slow on a CPU."""
SUMS = Version(torch.__version__) < Version("2.11")
"""The mean of gradients on a CPU is a sum in torch 2.8; 2.9 and 2.10 have not been tried."""


@pytest.fixture(scope="module")
def steps_of_two(tmp_path_factory):
    """The folder of the steps that two processes took, and the cases by strategy."""
    cases = {"ddp": list(CASES)} if SUMS else {"ddp": list(CASES), "fsdp2": SHARDED}
    folder = tmp_path_factory.mktemp("ranks")
    on_two(folder, cases)
    return folder, cases


@pytest.fixture(scope="module")
def alone():
    return FabricConfig(accelerator="cpu").build()


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_same_step_as_one(alone, steps_of_two, name):
    one = take_step(CASES[name], alone)
    norm = max(one["metrics"].get(f"{part}/grad_norm", 0.0) for part in ("main", "head"))
    folder, cases = steps_of_two
    for strategy in [strategy for strategy, names in cases.items() if name in names]:
        two = torch.load(folder / f"{strategy} {name}.pt")
        for metric, value in one["metrics"].items():
            assert two["metrics"][metric] == pytest.approx(value, rel=1e-5, abs=1e-6), (
                strategy,
                metric,
            )
        for weight, value in one["weights"].items():
            error = float((two["weights"][weight] - value).abs().max())
            assert error <= 1e-6 * max(1.0, norm), (strategy, weight, error)


def test_gradients_that_would_be_summed_are_refused(monkeypatch):
    def mean_of(out, given, op, group):
        out.fill_(float(given[0]))

    def sum_of(out, given, op, group):
        out.fill_(float(given.sum()))

    mesh = SimpleNamespace(size=lambda: 2, device_type="cpu", get_group=lambda: None)
    monkeypatch.setattr(torch.distributed, "reduce_scatter_tensor", mean_of)
    check_mean(mesh)
    monkeypatch.setattr(torch.distributed, "reduce_scatter_tensor", sum_of)
    with pytest.raises(ValueError, match="fabric.strategy=fsdp2 on a cpu needs torch 2.11"):
        check_mean(mesh)


@pytest.mark.skipif(not SUMS, reason="this torch gives the mean")
def test_two_sharded_processes_are_refused(tmp_path):
    with pytest.raises(AssertionError, match="fabric.strategy=fsdp2 on a cpu needs torch 2.11"):
        on_two(tmp_path, {"fsdp2": ["main_ce"]})
