"""Transcripts of thoughts, and what a model that was trained on text makes of them."""

import pytest
import torch
from scripted import Scripted
from torch.nn import functional as F

from mtp.channels import build_channel
from mtp.channels.cells import plan
from mtp.channels.channel import WriteOptions, Written
from mtp.channels.latent import step_end
from mtp.channels.measure import measure_reader
from mtp.channels.vectors import Row, likely_tokens, written
from mtp.tasks.base import Example
from mtp.tasks.graph_search import GraphSearchConfig

NUM = 8
LIMITS = {"num_problems": NUM, "batch_size": 3, "max_new_tokens": 24}


def dictated(examples, transcripts):
    """A channel that writes these transcripts for these examples."""
    by_prompt = dict(zip((e.prompt for e in examples), transcripts, strict=True))
    return Scripted(lambda _, e, seed: Written(None, 1, 1, "", transcript=by_prompt[e.prompt]))


@pytest.fixture
def task():
    return GraphSearchConfig(min_steps=2, max_steps=3, thought="layers").build()


@pytest.fixture
def reader(built, task):
    """A model that knows the solved thoughts of the held-out problems by heart."""
    model, fmt = built
    channel = build_channel("token", {}, model)
    examples = [task.example("test", i) for i in range(NUM)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(200):
        optimizer.zero_grad()
        channel.supervised_loss(model, fmt, examples, step=step, seed=0).backward()
        optimizer.step()
    return model.eval(), fmt, examples


def test_a_reader_answers_from_the_transcript_and_one_that_is_missing_is_wrong(reader, task):
    model, fmt, examples = reader

    def accuracy(transcripts):
        given = dictated(examples, transcripts)
        return measure_reader(None, fmt, given, task, model, **LIMITS)["reader_accuracy"]

    solved = [e.thought for e in examples]
    assert accuracy(solved) == 1.0
    assert accuracy([*solved[:6], None, None]) == 0.75
    assert accuracy([None] * NUM) == 0.0
    assert accuracy([*solved[:6], *(thought + 9 * ";a" for thought in solved[6:])]) == 0.75, "long"


def test_the_readers_nats_are_those_of_one_forward_over_question_and_transcript(reader, task):
    model, fmt, examples = reader
    transcripts = [e.thought[::-1] for e in examples]
    given = dictated(examples, transcripts)
    found = measure_reader(None, fmt, given, task, model, **LIMITS)
    nats = []
    for example, transcript in zip(examples, transcripts, strict=True):
        prompt, thought = fmt.prompt_ids(example.prompt), fmt.thought_ids(transcript)
        ids = torch.tensor([prompt + thought])
        hidden = model.mtp_decoder(input_ids=ids).last_hidden_state[0]
        logits = model.lm_head(hidden)[len(prompt) - 1 : -1]
        nats += F.cross_entropy(logits, ids[0, len(prompt) :], reduction="none").tolist()
    assert found["reader_nats"] == pytest.approx(sum(nats) / len(nats), rel=1e-4)
    nothing = dictated(examples, [None] * NUM)
    assert measure_reader(None, fmt, nothing, task, model, **LIMITS)["reader_nats"] is None


def test_a_channel_of_text_reads_its_own_thoughts_as_well_as_it_answers(reader, task):
    model, fmt, examples = reader
    channel = build_channel("token", {}, model)
    outputs = channel.write(model, fmt, examples, WriteOptions(max_new_tokens=24))
    assert [output.transcript for output in outputs] == [e.thought for e in examples]
    found = measure_reader(model, fmt, channel, task, model, **LIMITS)
    assert found["reader_accuracy"] == 1.0 and found["reader_nats"] < 0.2


def test_the_transcript_of_vectors_has_the_form_of_a_solved_thought(built):
    """Each pass is a layer, with the tokens that name its vector once, or a token of the text."""
    _, fmt = built
    b, g, f = (fmt.thought_ids(letter)[0] for letter in "bgf")
    row = Row([], [[g, b, g], [f, f, f]], text=fmt.thought_ids(""))
    vectors = torch.zeros(2, 4)
    layers, text = (written(fmt, row, vectors, 3, 4, end) for end in (";", ""))
    assert (layers.transcript, text.transcript) == ("gb;f", "gbf")
    assert layers.trace == "bg|f"
    endless = written(fmt, Row([], [[g]]), vectors, 1, 1, ";")
    assert endless.transcript is None and endless.vectors is None


@pytest.mark.parametrize(
    ("name", "is_layered"), [("soft", True), ("multiplex", True), ("gated", False)]
)
def test_passes_are_layers_where_the_channel_follows_them(name, is_layered, built, task):
    model, fmt = built
    with torch.no_grad():
        model.lm_head.weight[fmt.delimiter_id("</think>")] += 0.3
    examples = [task.example("test", i) for i in range(32)]
    channel = build_channel(name, {}, model)
    outputs = channel.write(model, fmt, examples, WriteOptions(max_new_tokens=24))
    found = [o for o in outputs if o.transcript is not None and o.thought_passes > 2]
    assert found
    for output in found:
        trace = output.trace
        for special in fmt.tokenizer.all_special_tokens:
            trace = trace.replace(special, "")
        passes = trace.split("|")
        if is_layered:
            assert sorted(output.transcript) == sorted(";".join(passes))
        else:
            assert output.transcript == "".join(passes)


def test_likely_tokens_are_at_least_half_as_likely_as_the_first():
    """0.5, 0.3, 0.2: the third is less than half of the first; 0.4, 0.35, 0.25: all are named."""
    log_q = torch.tensor([[0.2, 0.5, 0.3, 0.0], [0.25, 0.4, 0.35, 0.0]]).log()
    assert likely_tokens(log_q).tolist() == [[1, 2, 1], [1, 2, 0]]
    assert likely_tokens(log_q[:, :2]).tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize(
    ("thought", "end"), [("ab;cd", ";"), ("a=1\nb=2", "\n"), ("37", ""), (None, "")]
)
def test_steps_of_a_thought_end_as_its_text_does(thought, end):
    assert step_end(Example("?", "1", thought)) == end


def test_the_reader_is_planned_first_where_a_task_has_one(tmp_path):
    cells = plan(["latent", "kv"], ["pointers", "two_models"], [2], tmp_path, [])
    assert [(cell.task, cell.row) for cell in cells] == [
        ("pointers", "token"),
        ("pointers", "latent"),
        ("two_models", "kv"),
    ]
    assert cells[1].reader == cells[0].folder == tmp_path / "pointers" / "token" / "2"
    assert cells[2].reader is None
