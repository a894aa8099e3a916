"""Which parameters each optimizer moves, how far, and what a checkpoint keeps of it."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_model

from mtp.training.muon import Muon
from mtp.training.optimizers import OptimizerConfig, build_optimizer, set_lr, split_parameters
from mtp.training.sharding import load_optimizer


def gradients(model: torch.nn.Module, seed: int) -> None:
    """A random gradient for every parameter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_moves_hidden_matrices_by_orthogonal_steps_and_adamw_the_rest():
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = OptimizerConfig(algorithm="muon", lr=1e-2, muon_lr_ratio=2.0)
    gradients(model, 0)
    for part in split_parameters(model).values():
        optimizer = build_optimizer(part, config)
        set_lr(optimizer, config.lr)
        optimizer.step()
    for name, parameter in model.named_parameters():
        step = before[name] - parameter.detach()
        if parameter.ndim == 2 and "embed" not in name and "lm_head" not in name:
            # An orthogonal matrix, scaled to 0.2 sqrt(max(rows, columns)) per unit of the rate.
            scale = 2e-2 * 0.2 * max(parameter.shape) ** 0.5
            singular = torch.linalg.svdvals(step / scale)
            assert singular.min() > 0.5 and singular.max() < 1.3, name
        else:
            # AdamW's first step is the rate times the sign of the gradient.
            assert torch.allclose(step, 1e-2 * parameter.grad.sign(), atol=1e-4), name


def test_a_restored_optimizer_goes_on_alike():
    config = OptimizerConfig(algorithm="muon", lr=1e-2)
    models = [tiny_model(), tiny_model()]
    optimizers = [build_optimizer(split_parameters(m)["main"], config) for m in models]
    for step in range(2):
        gradients(models[0], step)
        set_lr(optimizers[0], 1e-2 / (step + 1))
        optimizers[0].step()
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip(models, optimizers, strict=True):
        gradients(model, 2)
        set_lr(optimizer, 3e-3)
        optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_resumed_muon_follows_the_schedule():
    """The rate set after loading reaches the parts that step, as in `run_stage`."""
    config = OptimizerConfig(algorithm="muon", lr=1e-2, muon_lr_ratio=2.0)
    parameters = {
        "q_proj.weight": torch.nn.Parameter(torch.ones(4, 4)),
        "embed.weight": torch.nn.Parameter(torch.ones(4, 4)),
    }
    saved = build_optimizer(parameters, config).state_dict()
    resumed = build_optimizer(parameters, config)
    load_optimizer(resumed, saved)
    set_lr(resumed, 3e-3)
    rates = {name: part.param_groups[0]["lr"] for name, part in resumed.parts.items()}
    assert rates == {"muon": 6e-3, "adamw": 3e-3}


def test_muon_is_refused_where_a_layers_experts_are_one_parameter():
    experts = torch.nn.Parameter(torch.zeros(4, 16, 8))
    convolution = torch.nn.Parameter(torch.zeros(16, 1, 4))
    matrix = torch.nn.Parameter(torch.zeros(8, 8))
    muon = OptimizerConfig(algorithm="muon")
    build_optimizer({"conv.weight": convolution, "q_proj.weight": matrix}, muon)
    parameters = {"mlp.experts.down_proj": experts, "q_proj.weight": matrix}
    with pytest.raises(ValueError, match="must be adamw for a mixture of experts"):
        build_optimizer(parameters, muon)
    adamw = build_optimizer(parameters, OptimizerConfig(weight_decay=0.1))
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1]


def test_norms_biases_rates_and_the_output_matrix_are_no_hidden_matrices():
    """Their number of dimensions is that of matrices; names are those of transformers' families."""
    others = [
        "model.layers.0.self_attn.q_norm.weight",  # cohere, a norm by attention head
        "backbone.layers.0.mixer.A_log",  # mamba
        "rwkv.blocks.0.attention.time_mix_key",
        "model.layers.0.mlp.experts.down_proj_bias",  # gpt_oss
    ]
    names = [*others, "head.weight", "q_proj.weight"]  # head.weight: the output matrix of rwkv
    parameters = {name: torch.nn.Parameter(torch.zeros(4, 4)) for name in names}
    config = OptimizerConfig(algorithm="muon", weight_decay=0.1)
    optimizer = build_optimizer(parameters, config)
    (muon,), adamw = (optimizer.parts[name].param_groups for name in ("muon", "adamw"))
    assert [p is parameters["q_proj.weight"] for p in muon["params"]] == [True]
    kept = {id(p) for group in adamw if not group["weight_decay"] for p in group["params"]}
    assert kept == {id(parameters[name]) for name in others}


SPLIT_ROWS = """
import torch
from forks import exit_codes, fork_ranks
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from mtp.training.muon import Muon
from mtp.training.runtime import FabricConfig

def step(rows):
    FabricConfig(accelerator="cpu", devices=2, strategy="ddp", num_threads=1).build()
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    weight, gradient = torch.randn(rows, 8), torch.randn(rows, 8)
    whole = torch.nn.Parameter(weight.clone())
    shards = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    whole.grad, shards.grad = gradient, distribute_tensor(gradient, mesh, [Shard(0)])
    for parameter in (whole, shards):
        Muon([parameter], lr=0.1, weight_decay=0.1).step()
    torch.testing.assert_close(shards.full_tensor(), whole.detach())

for rows in (1, 3):
    assert exit_codes(fork_ranks(step, rows)) == [0, 0]
"""


def test_muon_steps_a_matrix_in_shards_with_fewer_rows_than_processes_too():
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", SPLIT_ROWS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize("shape", [(24, 7), (7, 24), (16, 16)])
def test_our_muon_takes_the_steps_of_torchs_in_bfloat16(shape):
    given = {"lr": 3e-2, "weight_decay": 0.1}
    theirs, ours = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    optimizers = [
        torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **given),
        Muon([ours], dtype=torch.bfloat16, **given),
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        theirs.grad = torch.randn(shape, generator=generator)
        ours.grad = theirs.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(ours, theirs)
    states = [optimizer.state_dict()["state"][0] for optimizer in optimizers]
    assert states[0].keys() == states[1].keys()
