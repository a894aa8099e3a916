"""Bytes of a step on paper, beside what autograd and the modules hold."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from mtp.modeling.heads import HeadConfig
from mtp.modeling.modeling_mtp import family_class
from mtp.plan.memory import (
    PRECISIONS,
    Layout,
    Workload,
    cache_bytes,
    cache_positions,
    fits,
    head_activations,
    layer_activations,
    memory,
    most_rollouts,
)
from mtp.plan.shapes import MAINS, HeadShape, head_for, llama, main_of, main_of_config

MAIN = llama(64, 176, 3, 4, 2, 100, True)
HEAD = HeadShape("eavesdrop", 5, 32, 2, 80, 2, num_taps=2)


def model_of(main, head):
    config = LlamaConfig(
        **main.fields,
    )
    config.mtp = HeadConfig(
        type=head.kind,
        num_slots=head.num_slots,
        hidden_size=head.width,
        num_layers=head.num_layers,
        num_attention_heads=head.num_heads,
        intermediate_size=head.inner,
        taps=list(range(1, head.num_taps + 1)),
    ).to_checkpoint()
    torch.manual_seed(0)
    return family_class("llama")(config)


def kept_bytes(model, precision, forward):
    """Bytes that autograd keeps of a forward, without parameters and casts of them."""
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {p.shape for p in model.parameters() if p.ndim == 2}
    shapes |= {shape[::-1] for shape in shapes}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held and tensor.shape not in shapes:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    mixed = precision == "bf16-mixed"
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed),
    ):
        out = forward(model)
    assert out.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_activations_of_a_layer_are_what_autograd_keeps(precision):
    tokens = torch.randint(100, (3, 41))
    kept = []
    for num_layers in (2, 3):
        model = model_of(replace(MAIN, num_layers=num_layers), HEAD)
        if precision == "bf16-true":
            model = model.to(torch.bfloat16)

        def forward(model):
            return model.model(tokens, use_cache=False).last_hidden_state

        kept.append(kept_bytes(model, precision, forward))
    assert kept[1] - kept[0] == layer_activations(MAIN, precision) * tokens.numel()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["eavesdrop", "parallel"])
def test_activations_of_the_head_are_close_to_what_autograd_keeps(kind, precision):
    head = replace(HEAD, kind=kind)
    model, number = model_of(MAIN, head), 37
    taps = torch.randn(number, 2, 64, requires_grad=True)
    ids = torch.randint(100, (number, 5))

    def forward(model):
        message = model.mtp_head.message(taps * 1)
        return model.mtp_head([message], model.head_embed(ids))

    kept = kept_bytes(model, precision, forward)
    assert head_activations(MAIN, head, precision) * number == pytest.approx(kept, rel=0.15)


@pytest.mark.parametrize("kind", ["eavesdrop", "parallel"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_parameters_are_those_of_the_modules(kind, is_tied):
    main, head = replace(MAIN, is_tied=is_tied), replace(HEAD, kind=kind)
    model = model_of(main, head)
    in_head = sum(p.numel() for p in model.mtp_head.parameters())
    assert head.parameters(main) == in_head
    assert main.parameters == sum(p.numel() for p in model.parameters()) - in_head


def test_parameters_of_known_models():
    known = {"135m": 134_515_008, "1b": 1_235_814_400, "8b": 8_030_261_248, "70b": 70_553_706_496}
    assert {name: MAINS[name].parameters for name in known} == known


def test_a_cache_doubles_up_to_what_a_text_may_take():
    assert cache_positions(10, 100) == 100
    assert cache_positions(64, 65) == 65
    assert cache_positions(64, 64) == 64
    # Llama 3.1 8B: 32 layers of 8 key heads of 128 numbers, keys and values, in bfloat16.
    load = Workload(MAINS["8b"], head_for(MAINS["8b"]))
    assert cache_bytes(load) == 32 * 8 * 128 * 2 * 2


def test_shards_divide_what_is_held_but_not_gradients_between_micro_batches():
    main = MAINS["8b"]
    load = Workload(main, head_for(main), rollouts=64, micro_batch=1)
    whole, shards = memory(load, Layout(8)), memory(load, Layout(8, "fsdp2"))
    for part in ("main", "head", "optimizer", "reference"):
        assert shards.replay[part] == whole.replay[part] / 8
    assert whole.update["gradients"] == 0 and whole.rollouts["buckets"] == whole.replay["gradients"]
    assert shards.update["gradients"] == whole.update["buckets"] / 8
    assert shards.replay["gradients"] == whole.replay["gradients"]
    reduced = memory(load, Layout(8, "fsdp2", reduce_each=True))
    assert reduced.replay["gradients"] == whole.replay["gradients"] / 8
    once = memory(replace(load, micro_batch=8), Layout(8, "fsdp2"))
    assert once.replay["gradients"] == 0


def test_a_load_that_does_not_fit_takes_smaller_micro_batches_and_then_checkpoints():
    main = MAINS["1b"]
    load = Workload(main, head_for(main), rollouts=64, micro_batch=16, new_tokens=1024)
    small = fits(load, Layout(), 60e9)
    assert small is not None and 1 <= small.micro_batch < 16 and not small.gradient_checkpointing
    tight = fits(load, Layout(), 37e9)
    assert tight is not None and tight.gradient_checkpointing
    assert fits(load, Layout(), 20e9) is None
    most = most_rollouts(load, Layout(), 60e9)
    assert fits(replace(load, rollouts=most), Layout(), 60e9)
    assert not fits(replace(load, rollouts=2 * most), Layout(), 60e9)


def test_sizes_come_from_a_config(tmp_path):
    model_of(MAIN, HEAD).config.save_pretrained(tmp_path)
    assert main_of(str(tmp_path)) == MAIN
    with pytest.raises(ValueError, match="--main must be one of 135m"):
        main_of("9b")
    with pytest.raises(ValueError, match="mixture of experts"):
        main_of_config({"num_local_experts": 8})
    with pytest.raises(ValueError, match="head must be eavesdrop or parallel"):
        HeadShape("eagle3")
    with pytest.raises(ValueError, match="tokens_per_pass must be between 1 and 6"):
        Workload(MAIN, HEAD, tokens_per_pass=7)
