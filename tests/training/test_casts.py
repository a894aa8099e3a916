"""Weights in bfloat16: what a cast leaves in float32, and that a run equals its export."""

import copy

import torch
from torch import nn
from toy import build_toy, save_toy
from transformers import AutoModelForCausalLM

from mtp.hub.build import load_model, save_model
from mtp.training.precision import cast_state, cast_weights


def test_a_model_in_bfloat16_is_the_one_that_its_checkpoint_opens_as(tmp_path):
    """With 1000 tokens: frequencies in bfloat16 turn late positions by other angles."""
    source = save_toy(tmp_path / "source", max_position_embeddings=2048, head_dim=32)
    model, fmt = build_toy(source, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {torch.float32}
    save_model(model, fmt, tmp_path / "saved")
    ids = torch.randint(200, (1, 1000), generator=torch.Generator().manual_seed(0))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    again, _ = load_model(tmp_path / "saved", torch.bfloat16)
    with torch.no_grad():
        logits = model.eval()(ids, use_cache=False).logits
        assert torch.equal(logits, stock.eval()(ids, use_cache=False).logits)
        assert torch.equal(logits, again.eval()(ids, use_cache=False).logits)


class Family(nn.Module):
    """A gate that the family keeps in float32, a buffer, and two names of one matrix."""

    _keep_in_fp32_modules_strict = ("gate",)

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.down.weight = self.up.weight
        self.register_buffer("correction", torch.tensor([14.0949]))


def test_a_cast_leaves_what_the_family_keeps_and_tied_weights_tied():
    model = Family()
    saved = cast_state(model, model.state_dict(), torch.bfloat16)
    assert saved["up.weight"].data_ptr() == saved["down.weight"].data_ptr()
    cast = copy.deepcopy(model)
    cast_weights(cast, torch.bfloat16)
    for state in (saved, cast.state_dict()):
        names = {name for name, weight in state.items() if weight.dtype == torch.bfloat16}
        assert names == {"up.weight", "down.weight"}
    assert cast.down.weight is cast.up.weight
