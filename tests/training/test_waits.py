"""An optimizer step makes the host wait for a GPU at most twice, whatever its micro-batches."""

from importlib import import_module

import pytest
import torch
from helpers import Waits, tiny_model
from lightning.fabric import Fabric
from rank_cases import CASES, batches_of

from mtp.modeling.sampler import Sampler
from mtp.training.objectives import ObjectiveConfig
from mtp.training.optimizers import split_parameters
from mtp.training.step_module import wrap
from mtp.training.update import update


def test_free_memory_is_given_back_after_every_micro_batch_but_the_last(monkeypatch):
    given_back = []
    monkeypatch.setattr("mtp.training.update.release", lambda: given_back.append(len(seen)))
    seen = []
    case = CASES["main_ce"]
    fabric = Fabric(accelerator="cpu", devices=1)
    model = tiny_model(tied=False, **case.head)
    batches = (batches_of(case, model, 0, 1) * 5)[:5]
    objective = ObjectiveConfig()
    objective.main_ce.weight = 1.0
    optimizer = torch.optim.SGD(split_parameters(model)["main"].values(), lr=1.0)
    model.mtp_head.requires_grad_(False)
    module = wrap(fabric, model.train())
    monkeypatch.setattr(fabric, "backward", lambda loss: (seen.append(1), loss.backward()))
    optimizers = {"main": fabric.setup_optimizers(optimizer)}
    update(fabric, module, optimizers, batches, objective, clip_norms={"main": 1.0})
    assert given_back == [1, 2, 3, 4]


@pytest.mark.parametrize("name", CASES)
def test_an_optimizer_step_is_awaited_at_most_twice(name, monkeypatch):
    """Two things are not counted: checks of ids, which are made on a CPU only, and transformers'
    own search for packed texts, one wait in each forward over whole texts.
    """
    for module in ("linear_logprob.reference", "linear_logprob.op"):
        found = import_module(f"mtp_kernels.{module}")
        monkeypatch.setattr(found, "check_ids", lambda *args, **kwargs: None)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    case = CASES[name]
    fabric = Fabric(accelerator="cpu", devices=1)
    model = tiny_model(tied=False, **case.head)
    batches = batches_of(case, model, 0, 1) * 2
    objective = ObjectiveConfig()
    for stream, settings in case.objective.items():
        for key, value in settings.items():
            setattr(getattr(objective, stream), key, value)
    model.mtp_head.requires_grad_(objective.uses_head)
    module = wrap(fabric, model.train())
    optimizers = {
        part: fabric.setup_optimizers(torch.optim.SGD(parameters.values(), lr=1.0))
        for part, parameters in split_parameters(model).items()
        if part == "main" or objective.uses_head
    }
    settings = {
        "clip_norms": {"main": 1.0, "head": 1.0},
        "sampler": Sampler(),
        "reference": tiny_model(seed=3).requires_grad_(False).eval(),
        # The reference implementation checks its arguments' values, as those for a GPU do not.
        "impl": "torch",
        **case.options,
    }
    with Waits() as waits:
        update(fabric, module, optimizers, batches, objective, **settings)
    assert waits.count <= 2


def test_reads_of_all_kinds_are_counted():
    x = torch.arange(4.0)
    with Waits() as waits:
        float(x[0]), bool(x[1] > 0), x.tolist(), x.numpy(), x.cpu()
        x.nonzero(), x[x > 1], x.unique(), x.masked_select(x > 1)
        x.repeat_interleave(x.long()), torch.equal(x, x)
        x[x > 2] = 0.0
        torch.multinomial(x + 1, 1)
        x[torch.tensor([1])], x + x, x.sum(), x.repeat_interleave(2)
    assert waits.count == 14
