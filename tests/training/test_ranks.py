"""Every objective takes the same step on two processes as on one, by each strategy."""

import os
import socket
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


def on_two(folder: Path, strategy: str, names: list[str]) -> None:
    """Takes the steps on two processes of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    jobs = []
    for rank in range(2):
        environment = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_PORT": port}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        command = [sys.executable, str(HERE / "ranks_worker.py"), str(folder), strategy, *names]
        jobs.append(
            subprocess.Popen(
                command,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [job.communicate(timeout=500)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(said)


SHARDED = ["main_ce", "k3", "gspo", "slow", "everything", "one_process_without_rollouts"]
SHARDED += ["head_of_its_own"]
"""Cases that are taken with sharded weights too, which is slow on a CPU."""
SUMS = Version(torch.__version__) < Version("2.11")
"""The mean of gradients on a CPU is a sum in torch 2.8; 2.9 and 2.10 have not been tried."""


@pytest.fixture(scope="module")
def steps_of_two(tmp_path_factory):
    """Folders of what two processes did, by strategy."""
    folders = {}
    strategies = {"ddp": list(CASES)} if SUMS else {"ddp": list(CASES), "fsdp2": SHARDED}
    for strategy, names in strategies.items():
        folders[strategy] = tmp_path_factory.mktemp(strategy)
        on_two(folders[strategy], strategy, names)
    return folders


@pytest.fixture(scope="module")
def alone():
    return FabricConfig(accelerator="cpu").build()


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_same_step_as_one(alone, steps_of_two, name):
    one = take_step(CASES[name], alone)
    norm = max(one["metrics"].get(f"{part}/grad_norm", 0.0) for part in ("main", "head"))
    for strategy, folder in steps_of_two.items():
        if strategy == "fsdp2" and name not in SHARDED:
            continue
        two = torch.load(folder / f"{name}.pt")
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
        on_two(tmp_path, "fsdp2", ["main_ce"])
