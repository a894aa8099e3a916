"""Two models with a half of a problem each: text messages, and a fused cache by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from toy import PHASES, SIZES
from transformers import DynamicCache

from mtp.channels import WriteOptions, build_channel
from mtp.channels.kv import tensors_of
from mtp.channels.measure import training_cost
from mtp.hub.build import ModelConfig, build_model
from mtp.modeling.heads import HeadConfig
from mtp.rollouts.rollout import DecodingConfig
from mtp.tasks.graph_search import GraphSearchConfig
from mtp.tasks.pointer_chasing import PointerChasingConfig

TASK = PointerChasingConfig(num_nodes=8, split=True).build()
EXAMPLES = [TASK.example("train", i) for i in range(5)]


@pytest.fixture
def built():
    torch.manual_seed(0)
    return build_model(
        ModelConfig(config=SIZES | {"initializer_range": 0.3}),
        HeadConfig(num_slots=3, hidden_size=16, intermediate_size=24),
        DecodingConfig(phases=PHASES),
        TASK,
    )


def channel_of(name, model, **options):
    channel = build_channel(name, options, model).eval()
    for parameter in getattr(channel, "fusions", torch.nn.Module()).parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # also the output, which begins at zero
    return channel


def logits_after(model, ids):
    """[T, V] of one ordinary forward without a cache."""
    hidden = model.mtp_decoder(input_ids=torch.tensor([ids])).last_hidden_state
    return model.lm_head(hidden)[0]


def cache_of(model, ids):
    """Keys and values of all layers after an ordinary forward."""
    cache = DynamicCache(config=model.main_config)
    model.mtp_decoder(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
    return [tensor for layer in cache.layers for tensor in (layer.keys[0], layer.values[0])]


def end_often(fmt, *models):
    """Make thoughts and answers end after a few passes."""
    with torch.no_grad():
        for model in models:
            for token in (fmt.delimiter_id("</think>"), fmt.eos_id):
                model.lm_head.weight[token] += 0.5


@torch.no_grad()
def test_the_fused_cache_is_that_of_the_formula_by_hand(built):
    """Head by head and position by position: K + g sigmoid(A z) (P z), z = silu(W [K_s; K_r])."""
    model, fmt = built
    channel = channel_of("kv", model)
    example = EXAMPLES[0]
    half = fmt.prompt_ids(example.columns["shared"])
    reader, _, _ = channel.read(model, fmt, [example])
    source, target = cache_of(channel.sharer, half), cache_of(model, [fmt.pad_id] * len(half))
    fused = tensors_of(reader.cache)
    assert len(fused) == 4  # keys and values of two layers
    for number, fusion in enumerate(channel.fusions):
        heads, _, size = target[number].shape
        for t in range(len(half)):
            both = [source[number][h, t] for h in range(heads)]
            both += [target[number][h, t] for h in range(heads)]
            z = fusion.input.weight @ torch.cat(both) + fusion.input.bias
            z = z / (1 + torch.exp(-z))
            weights = 1 / (1 + torch.exp(-(fusion.weight.weight @ z + fusion.weight.bias)))
            change = fusion.output.weight @ z + fusion.output.bias
            gate = 1 / (1 + math.exp(-float(fusion.gate)))
            for h in range(heads):
                own = change[h * size : (h + 1) * size]
                expected = target[number][h, t] + gate * weights[h] * own
                assert torch.allclose(fused[number][0, h, t], expected, atol=1e-5)


@torch.no_grad()
def test_a_zeroed_message_gives_the_receiver_alone(built):
    """That is main after placeholders, in one ordinary forward. A new fuser's message is zero."""
    model, fmt = built
    new = build_channel("kv", {}, model).eval()
    outputs = new.write(model, fmt, EXAMPLES, WriteOptions(max_new_tokens=12))
    assert all(not output.vectors.any() for output in outputs)
    channel = channel_of("kv", model)
    outputs = channel.write(model, fmt, EXAMPLES, WriteOptions(max_new_tokens=12))
    assert all(output.vectors.abs().max() > 0.1 for output in outputs)
    own = [output.vectors for output in outputs]
    zeroed = channel.answer_log_probs(model, fmt, EXAMPLES, outputs, [0 * m for m in own])
    for example, output, found in zip(EXAMPLES, outputs, zeroed, strict=True):
        before = [fmt.pad_id] * len(output.vectors) + fmt.prompt_ids(example.prompt)
        log_p = logits_after(model, before + output.text).log_softmax(-1)
        alone = sum(log_p[len(before) + t - 1, token] for t, token in enumerate(output.text))
        assert float(found) == pytest.approx(float(alone), abs=1e-4)
    swapped = channel.answer_log_probs(model, fmt, EXAMPLES, outputs, own[1:] + own[:1])
    unswapped = channel.answer_log_probs(model, fmt, EXAMPLES, outputs, own)
    assert (unswapped - swapped).abs().min() > 1e-3


def test_the_gradient_reaches_the_fuser_only(built):
    model, fmt = built
    channel = channel_of("kv", model, text_steps=7)
    assert [step for step in range(20) if channel.begins_level(step)] == [7]
    channel.supervised_loss(model, fmt, EXAMPLES, step=7, seed=0).backward()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(p.grad is None and p.requires_grad for p in channel.sharer.parameters())
    assert all(p.grad.abs().max() > 0 for p in channel.fusions.parameters())
    channel.zero_grad(set_to_none=True)
    channel.supervised_loss(model, fmt, EXAMPLES, step=6, seed=0).backward()
    assert model.lm_head.weight.grad.any() and channel.sharer.lm_head.weight.grad.any()
    assert all(p.grad is None for p in channel.fusions.parameters())


def test_the_fusers_loss_is_that_of_the_receivers_text(built):
    model, fmt = built
    channel = channel_of("kv", model, text_steps=0)
    outputs = channel.write(model, fmt, EXAMPLES, WriteOptions(max_new_tokens=4))
    messages = [output.vectors for output in outputs]
    texts = [fmt.completion_ids(e.thought, e.answer) for e in EXAMPLES]
    solved = [replace(o, text=text) for o, text in zip(outputs, texts, strict=True)]
    found = channel.answer_log_probs(model, fmt, EXAMPLES, solved, messages)
    loss = channel.supervised_loss(model, fmt, EXAMPLES, step=0, seed=0)
    assert float(loss.detach()) == pytest.approx(
        -float(found.sum()) / sum(map(len, texts)), abs=1e-5
    )


@pytest.mark.parametrize("name", ["token_message", "block_message"])
def test_both_models_learn_from_text(name, built):
    """The sharer writes its half; the receiver continues message and prompt: ordinary forwards."""
    model, fmt = built
    channel = channel_of(name, model)
    sent, received = [], []
    for example in EXAMPLES:
        half, message = example.columns["shared"], fmt.thought_ids(example.columns["shared"])
        prompt = fmt.prompt_ids(half)
        ids = [*prompt, *message, fmt.eos_id]
        logits = logits_after(channel.sharer, ids)[len(prompt) - 1 : -1]
        sent.append(cross_entropy(logits, torch.tensor(ids[len(prompt) :]), reduction="none"))
        before = message + fmt.prompt_ids(example.prompt)
        text = fmt.completion_ids(example.thought, example.answer)
        logits = logits_after(model, before + text)[len(before) - 1 : -1]
        received.append(cross_entropy(logits, torch.tensor(text), reduction="none"))
    losses = torch.cat(sent).mean() + torch.cat(received).mean()
    found = channel.supervised_loss(model, fmt, EXAMPLES, step=0, seed=0)
    if name == "token_message":
        assert float(found.detach()) == pytest.approx(float(losses.detach()), abs=1e-5)
    else:  # and the head's tokens
        assert float(found.detach()) > float(losses.detach()) + 1
        found.backward()
        assert any(
            p.grad is not None and p.grad.any() for p in channel.sharer.mtp_head.parameters()
        )


@pytest.mark.parametrize(("name", "per_pass"), [("token_message", 1), ("block_message", 4)])
@torch.no_grad()
def test_the_receiver_continues_the_message_by_token_and_passes_add_up(name, per_pass, built):
    model, fmt = built
    channel = channel_of(name, model)
    end_often(fmt, model, channel.sharer)
    examples = [TASK.example("test", i) for i in range(24)]
    # Half of the tokens are the message's, so that the context of both is as long as of one text.
    outputs = channel.write(model, fmt, examples, WriteOptions(max_new_tokens=32))
    messages = channel.messages(fmt, examples, WriteOptions(max_new_tokens=16))
    closer = fmt.delimiter_id("</think>")
    ended = [ids[-1:] == [closer] for ids, _ in messages]
    assert sum(ended) >= 3
    for example, output, (ids, _), has_ended in zip(
        examples, outputs, messages, ended, strict=True
    ):
        assert (output.vectors is not None) == has_ended
        if not has_ended:
            assert output.answer is None and not output.text
            continue
        context = ids + fmt.prompt_ids(example.prompt)
        text = []
        while len(text) < 16 and text[-1:] != [fmt.eos_id]:
            text.append(int(logits_after(model, context + text)[-1].argmax()))
        assert output.text == text and len(ids) + len(text) <= 32
        sent = math.ceil(len(ids) / per_pass)
        body = text[:-1] if text[-1] == fmt.eos_id else text
        thought = body.index(closer) + 1 if closer in body else len(body)
        assert (output.passes, output.thought_passes) == (sent + len(text), sent + thought)


def test_a_fused_cache_needs_one_pass_before_the_receivers_own(built):
    model, fmt = built
    channel = channel_of("kv", model)
    end_often(fmt, model)
    outputs = channel.write(model, fmt, EXAMPLES, WriteOptions(max_new_tokens=16))
    assert all(output.passes == 1 + len(output.text) for output in outputs)
    for example, output in zip(EXAMPLES, outputs, strict=True):  # rows do not depend on each other
        assert channel.write(model, fmt, [example], WriteOptions(max_new_tokens=16)) == [output]
    for name, passes in (("kv", 2), ("token_message", 1)):
        channel = channel_of(name, model, **({"text_steps": 0} if name == "kv" else {}))
        cost = training_cost(model, fmt, channel, EXAMPLES, step=0)
        assert cost.sequential_passes == passes


@pytest.mark.parametrize("name", ["kv", "token_message", "block_message"])
def test_a_task_without_a_second_half_is_refused(name, built):
    model, fmt = built
    channel = build_channel(name, {}, model)
    with pytest.raises(ValueError, match="column 'shared'.*got the columns layers; use task="):
        channel.check(fmt, GraphSearchConfig().build())
    channel.check(fmt, TASK)
