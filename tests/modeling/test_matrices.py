"""Weights that are read past their modules: what else a module does is refused, never left out."""

import pytest
import torch
from helpers import CLOSE, PAD, run, tiny_model
from torch import nn
from torch.nn.utils import parametrize

from mtp.modeling.matrices import plain_matrix
from mtp.modeling.phases import PhasePlan
from mtp.training.collate import collate_text
from mtp.training.objectives.scored import replay_batch

PROMPT = torch.tensor([[5, 6, 7, 9]])
PHASES = [
    {"name": "thought", "mode": "fast", "opened_by": None},
    {"name": "answer", "mode": "slow", "opened_by": CLOSE},
]
MODES = ["fast", "slow", "verified"]


class Adapted(nn.Module):
    """A low-rank adapter around a layer, as peft's: it shows the weight of what it wraps."""

    def __init__(self, base_layer, rank=8):
        super().__init__()
        num_out, num_in = base_layer.weight.shape
        if isinstance(base_layer, nn.Embedding):
            num_in, num_out = num_out, num_in
        self.base_layer = base_layer
        self.lora_A = nn.Linear(num_in, rank, bias=False)
        self.lora_B = nn.Linear(rank, num_out, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        if isinstance(self.base_layer, nn.Embedding):
            return self.base_layer(x) + self.lora_A.weight.T[x] @ self.lora_B.weight.T
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Scaled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Other(torch.Tensor):
    """Numbers stored by other means, as those of a quantized weight."""


def make(**settings):
    model = tiny_model(**settings)
    model.generation_config.mtp_phases = PHASES
    return model


def hooked(layer):
    layer.register_forward_hook(lambda module, args, out: out + 1)


def prehooked(layer):
    layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def replaced(layer):
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)


def quantized(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Other))


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Scaled())


def offloaded(layer):
    layer.to("meta")


def integer(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)


CHANGES = [hooked, prehooked, replaced, quantized, parametrized, offloaded, integer]


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_of_the_output_layer_is_refused_before_any_pass(mode, monkeypatch):
    model = make()
    stock = model.generate(PROMPT, max_new_tokens=20)
    model.lm_head = Adapted(model.lm_head)
    nn.init.normal_(model.lm_head.lora_B.weight)
    assert not torch.equal(model.generate(PROMPT, max_new_tokens=20), stock)
    monkeypatch.setattr(type(model), "main_states", None)
    message = "the model's output layer must be a plain .* got a Adapted. Merge .*merge_and_unload"
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, mtp_mode=mode)
    with pytest.raises(ValueError, match=message):
        model.search(PROMPT, config={"n": 2}, mtp_mode=mode, do_sample=True)


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_layer_does_beside_its_weight_is_refused(change):
    model = make()
    change(model.lm_head)
    with pytest.raises(ValueError, match="the model's output layer must be a plain"):
        run(model, [[5, 6]], PhasePlan([1], [None]))
    layer = nn.Linear(4, 3, bias=False)
    assert plain_matrix(layer, "it") is layer.weight
    change(layer)
    with pytest.raises(ValueError, match="it must be a plain"):
        plain_matrix(layer, "it")


def test_only_what_is_read_has_to_be_plain():
    model, base = make(), make()
    model.model.embed_tokens = Adapted(model.model.embed_tokens)
    nn.init.normal_(model.model.embed_tokens.lora_B.weight)
    given = {"max_new_tokens": 20}
    stock = model.generate(PROMPT, **given)
    assert torch.equal(model.generate(PROMPT, mtp_mode="slow", **given), stock)
    assert not torch.equal(base.generate(PROMPT, **given), stock)
    # The head reads embeddings through their module, so an adapter there counts in every mode.
    adapter = model.model.embed_tokens
    with torch.no_grad():
        base.model.embed_tokens.weight += adapter.lora_A.weight.T @ adapter.lora_B.weight.T
    for mode in ("fast", "verified"):
        merged = base.generate(PROMPT, mtp_mode=mode, **given)
        assert torch.equal(model.generate(PROMPT, mtp_mode=mode, **given), merged)
    model = make(shared_embeddings=False)
    model.mtp_head.lm_head = Adapted(model.mtp_head.lm_head)
    with pytest.raises(ValueError, match="mtp_head.lm_head must be a plain"):
        model.generate(PROMPT, mtp_mode="fast", **given)
    model = make()
    model.mtp_head.slot_embed = Adapted(model.mtp_head.slot_embed)
    with pytest.raises(ValueError, match="mtp_head.slot_embed must be a plain"):
        model.generate(PROMPT, mtp_mode="fast", **given)
    # Asking for gradients of the input changes no number.
    model = make()
    expected = model.generate(PROMPT, mtp_mode="fast", **given)
    model.enable_input_require_grads()
    assert torch.equal(model.generate(PROMPT, mtp_mode="fast", **given), expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mode", ["slow", "verified"])
def test_adapters_of_other_layers_count(mode, tied):
    model = make(tied=tied)
    before = model.generate(PROMPT, max_new_tokens=24)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
        layer.mlp.down_proj = Adapted(layer.mlp.down_proj)
        nn.init.normal_(layer.self_attn.q_proj.lora_B.weight)
        nn.init.normal_(layer.mlp.down_proj.lora_B.weight)
    stock = model.generate(PROMPT, max_new_tokens=24)
    assert not torch.equal(stock, before)
    assert torch.equal(model.generate(PROMPT, mtp_mode=mode, max_new_tokens=24), stock)


@pytest.mark.parametrize("mode", MODES)
def test_an_output_layer_on_disk_is_refused_in_one_line(mode, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "model")
    places = {"model": "cpu", "lm_head": "disk", "mtp_head": "cpu"}
    opened = type(model).from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    opened.generation_config = model.generation_config
    stock = model.generate(PROMPT, max_new_tokens=8)
    assert torch.equal(opened.generate(PROMPT, max_new_tokens=8), stock)
    with pytest.raises(ValueError, match="the model's output layer must be .* without device_map"):
        opened.generate(PROMPT, mtp_mode=mode)


def test_losses_and_references_refuse_it_too():
    model = make()
    model.lm_head = Adapted(model.lm_head)
    plan = PhasePlan([4], [None])
    batch = collate_text([([5, 6], [7, 8, 9, 10])], plan, 4, PAD)
    for use_head in (False, True):
        with pytest.raises(ValueError, match="the model's output layer must be a plain"):
            replay_batch(model, batch, channel_gradient=1.0, use_head=use_head)
    with pytest.raises(ValueError, match="the model's output layer must be a plain"):
        model.replay(batch.tokens)


def test_a_bias_is_read_where_the_caller_says_so():
    layer = nn.Linear(4, 3)
    assert plain_matrix(layer, "it", with_bias=True) is layer.weight
    with pytest.raises(ValueError, match="it must be a plain .* got a Linear with a bias"):
        plain_matrix(layer, "it")
