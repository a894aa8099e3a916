"""Latent thoughts: the curriculum, and passes that equal those of a forward over the vectors."""

import pytest
import torch

from mtp.channels import WriteOptions, build_channel
from mtp.channels.measure import training_cost


def test_the_curriculum_replaces_one_step_of_the_text_after_the_other(built):
    model, _ = built
    channel = build_channel("latent", {"levels": 3, "text_steps": 20, "level_steps": 10}, model)
    thought = "ab;bc;cd"
    assert [channel.level(step) for step in (0, 19, 20, 39, 40, 99)] == [0, 0, 1, 2, 3, 3]
    assert [channel.remaining_text(thought, level) for level in range(4)] == [
        "ab;bc;cd", "bc;cd", "cd", "",
    ]  # fmt: skip
    assert [step for step in range(60) if channel.begins_level(step)] == [20, 30, 40]
    short = build_channel("latent", {"levels": 2}, model)
    assert short.remaining_text(thought, 2) == ""  # all of the text at the last level


def test_the_loss_is_that_of_the_answer_after_main_has_read_its_own_vectors(built, task):
    """Hand-worked for one example: each vector is the last hidden row of a forward over all
    inputs before it, without a cache.
    """
    model, fmt = built
    channel = build_channel("latent", {"levels": 2, "text_steps": 1, "level_steps": 1}, model)
    example = task.example("train", 0)
    inputs = model.get_input_embeddings()(torch.tensor([fmt.prompt_ids(example.prompt)]))
    for _ in range(2):
        hidden = model.mtp_decoder(inputs_embeds=inputs).last_hidden_state
        inputs = torch.cat([inputs, hidden[:, -1:]], 1)
    rest = torch.tensor([fmt.completion_ids("", example.answer)])
    inputs = torch.cat([inputs, model.get_input_embeddings()(rest[:, :-1])], 1)
    logits = model.lm_head(model.mtp_decoder(inputs_embeds=inputs).last_hidden_state)
    expected = torch.nn.functional.cross_entropy(logits[0, -rest.shape[1] :], rest[0])
    found = channel.supervised_loss(model, fmt, [example], step=99, seed=0)
    assert torch.allclose(found, expected, atol=1e-5)
    several = [task.example("train", i) for i in range(5)]  # of different lengths: padding
    alone = [channel.supervised_loss(model, fmt, [e], step=99, seed=0) for e in several]
    together = channel.supervised_loss(model, fmt, several, step=99, seed=0)
    assert torch.allclose(together, torch.stack(alone).mean(), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "passes"),
    [
        ("latent", {"levels": 3}, 4),
        ("latent", {"levels": 0}, 1),
        ("soft", {}, 1),
        ("multiplex", {}, 1),
        ("gated", {}, 1),
        ("token", {}, 1),
        ("block", {}, 1),
    ],
)
def test_passes_in_sequence_of_a_training_example(name, options, passes, built, task):
    model, fmt = built
    channel = build_channel(name, options, model)
    examples = [task.example("train", i) for i in range(3)]
    cost = training_cost(model, fmt, channel, examples, step=10**6)
    assert cost.sequential_passes == passes
    assert cost.bytes_per_example > 0 and cost.seconds_per_example > 0


@pytest.mark.parametrize("levels", [0, 1, 3])
def test_a_thought_has_one_pass_for_each_vector_and_does_not_depend_on_the_seed(
    levels,
    built,
    task,
):
    model, fmt = built
    channel = build_channel("latent", {"levels": levels}, model)
    examples = [task.example("train", i) for i in range(6)]
    outputs = channel.write(model, fmt, examples, WriteOptions(max_new_tokens=8))
    for example, output in zip(examples, outputs, strict=True):
        assert output.thought_passes == levels
        assert len(output.trace.split("|")) == max(1, levels)
        alone = channel.write(model, fmt, [example], WriteOptions(max_new_tokens=8, seed=5))
        assert alone == [output]  # padding on the left changes nothing
