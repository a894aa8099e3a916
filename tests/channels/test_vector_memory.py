"""Vectors between segments, and the memory file's text: by hand, segment after segment."""

import pytest
import torch
from toy import SIZES

from mtp.channels import WriteOptions, Written, build_channel
from mtp.channels.measure import training_cost
from mtp.channels.segments import memory_ids
from mtp.hub.build import ModelConfig, build_model
from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.heads import HeadConfig
from mtp.modeling.phases import Phase
from mtp.modeling.sampler import Sampler
from mtp.modeling.segments import SegmentSettings
from mtp.rollouts.rollout import DecodingConfig, sample
from mtp.tasks.pointer_chasing import PointerChasingConfig

PHASES = {
    "thought": Phase(mode="fast", opened_by="<think>", max_tokens=8),
    "summary": Phase(opened_by="<summary>", closed_by="</summary>", max_tokens=24),
    "answer": Phase(opened_by="</think>"),
}
SEGMENTS = SegmentSettings(max_segments=4, recent_tokens=0, memory_tokens=32)
TASKS = {hops: PointerChasingConfig(num_nodes=8, hops=hops).build() for hops in (1, 4, 6)}
EXAMPLES = [TASKS[hops].example("train", hops) for hops in (6, 1, 4)]
"""Solved in 3, 1 and 2 segments."""


def build(phases=PHASES, segments=SEGMENTS):
    torch.manual_seed(0)
    return build_model(
        ModelConfig(config=SIZES | {"initializer_range": 0.3}),
        HeadConfig(num_slots=3, hidden_size=16, intermediate_size=24),
        DecodingConfig(phases=phases, segments=segments),
        TASKS[6],
    )


@pytest.fixture
def built():
    return build()


def hidden_after(model, vectors):
    """[T, D] of one ordinary forward over [T, D]."""
    return model.mtp_decoder(inputs_embeds=vectors[None]).last_hidden_state[0]


def context(model, fmt, example, memory):
    """Inputs of a segment before its text."""
    embed = model.get_input_embeddings()
    prompt = embed(torch.tensor(fmt.prompt_ids(example.prompt)))
    if memory is None:
        return prompt
    opener, *rest = (fmt.delimiter_id(name) for name in ("<summary>", "</summary>", "<think>"))
    return torch.cat([prompt, embed(torch.tensor([opener])), memory, embed(torch.tensor(rest))])


def memory_after(channel, model, vectors):
    """The vectors that are written after a segment's inputs."""
    hidden = hidden_after(model, torch.cat([vectors, channel.queries]))
    written = hidden[len(vectors) :]
    return written @ channel.projection.weight.T + channel.projection.bias


def by_hand(channel, model, fmt, example, texts, memory=None):
    """Sum of log p of the ids of each segment; the vectors pass from one to the next."""
    return chained(channel, model, fmt, example, texts, memory)[0]


def chained(channel, model, fmt, example, texts, memory):
    """That sum, and the memory that the last segment reads."""
    total, read = 0.0, memory
    for ids in texts:
        read = memory
        before = context(model, fmt, example, memory)
        inputs = torch.cat([before, model.get_input_embeddings()(torch.tensor(ids))])
        log_p = model.lm_head(hidden_after(model, inputs)).log_softmax(-1)
        total = total + sum(log_p[len(before) + t - 1, token] for t, token in enumerate(ids))
        memory = memory_after(channel, model, inputs)
    return total, read


def decode_by_hand(channel, model, fmt, example, limit=14, memory=None):
    """Greedy ids of each segment, the memory that the last one reads, and the passes."""
    opener, closer = fmt.delimiter_id("<summary>"), fmt.delimiter_id("</think>")
    embed = model.get_input_embeddings()
    texts, passes = [], -1
    for number in range(4):
        passes += 1  # that of the vectors, after the first segment
        inputs, ids = context(model, fmt, example, memory), []
        while len(ids) < limit:
            token = int(model.lm_head(hidden_after(model, inputs)[-1]).argmax())
            passes += 1
            if len(ids) == 8 and closer not in ids:  # the budget of a thought
                passes -= 1
                token = closer if number == 3 else opener
            ids.append(token)
            inputs = torch.cat([inputs, embed(torch.tensor([token]))])
            if token == fmt.eos_id or (token == opener and number < 3):
                break
        texts.append(ids)
        if ids[-1] != opener or number == 3:
            break
        memory = memory_after(channel, model, inputs)
    return texts, memory, passes


def solved(fmt, example):
    """Two hops, of eight characters, in a segment, then `<summary>`; at last the answer."""
    pieces = [example.thought[i : i + 8] for i in range(0, len(example.thought), 8)]
    encoded = [fmt.tokenizer.encode(piece) for piece in pieces]
    texts = [[*ids, fmt.delimiter_id("<summary>")] for ids in encoded[:-1]]
    return [*texts, [*encoded[-1], *fmt.completion_ids("", example.answer)]]


@pytest.mark.parametrize("number", [0, 1, 3])
def test_the_loss_is_that_of_all_segments_in_sequence(number, built):
    model, fmt = built
    channel = build_channel("vector_memory", {"num_vectors": number, "text_steps": 0}, model)
    texts = [solved(fmt, example) for example in EXAMPLES]
    assert [len(one) for one in texts] == [3, 1, 2]
    total = sum(
        by_hand(channel, model, fmt, example, one)
        for example, one in zip(EXAMPLES, texts, strict=True)
    )
    count = sum(len(ids) for one in texts for ids in one)
    loss = channel.supervised_loss(model, fmt, EXAMPLES, step=0, seed=0)
    assert float(loss.detach()) == pytest.approx(-float(total.detach()) / count, abs=1e-5)
    cost = training_cost(model, fmt, channel, EXAMPLES, step=0)
    assert cost.sequential_passes == 3  # that of the longest


def test_training_begins_with_the_last_tokens_of_the_memory_file_as_vectors(built):
    model, fmt = built
    channel = build_channel("vector_memory", {"num_vectors": 2, "text_steps": 5}, model)
    assert [step for step in range(20) if channel.begins_level(step)] == [5]
    log_probs, errors, sizes = [], [], []
    for example in EXAMPLES:
        own = None
        for number, ids in enumerate(solved(fmt, example)):
            memory = None
            if number:  # `done: bd4` -> `d4`
                last = fmt.tokenizer.encode(example.thought[8 * number - 3 : 8 * number - 1])
                memory = model.get_input_embeddings()(torch.tensor(last))
                errors.append((own - memory).square())
                sizes.append(memory.square())
            before = context(model, fmt, example, memory)
            text = model.get_input_embeddings()(torch.tensor(ids))
            log_p = model.lm_head(hidden_after(model, torch.cat([before, text]))).log_softmax(-1)
            log_probs += [log_p[len(before) + t - 1, token] for t, token in enumerate(ids)]
            own = memory_after(channel, model, torch.cat([before, text]))
    assert len(errors) == 3
    loss = channel.supervised_loss(model, fmt, EXAMPLES, step=4, seed=0)
    expected = torch.stack(errors).mean() / torch.stack(sizes).mean()
    expected = expected - torch.stack(log_probs).mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-4)


def test_the_gradient_passes_through_the_vectors(built):
    """It is that of forwards by hand, all of which are one graph."""
    model, fmt = built
    channel = build_channel("vector_memory", {"num_vectors": 2, "text_steps": 0}, model)
    weights = [channel.queries, channel.projection.weight, model.lm_head.weight]
    texts = [solved(fmt, example) for example in EXAMPLES]
    total = sum(
        by_hand(channel, model, fmt, example, one)
        for example, one in zip(EXAMPLES, texts, strict=True)
    )
    count = sum(len(ids) for one in texts for ids in one)
    expected = torch.autograd.grad(-total / count, weights)
    loss = channel.supervised_loss(model, fmt, EXAMPLES, step=0, seed=0)
    for found, wanted in zip(torch.autograd.grad(loss, weights), expected, strict=True):
        size = float(wanted.abs().max())
        assert size > 1e-3
        assert torch.allclose(found, wanted, atol=1e-3 * size)


@torch.no_grad()
def test_segments_are_written_one_after_the_other_and_only_vectors_pass(built):
    model, fmt = built
    model.lm_head.weight[fmt.delimiter_id("<summary>")] += 0.4
    model.lm_head.weight[fmt.eos_id] += 0.3
    channel = build_channel("vector_memory", {"num_vectors": 2}, model)
    examples = [TASKS[6].example("test", i) for i in range(16)]
    outputs = channel.write(model, fmt, examples, WriteOptions(max_new_tokens=14))
    numbers = set()
    closer = fmt.delimiter_id("</think>")
    zeros = []
    for example, output in zip(examples, outputs, strict=True):
        texts, memory, passes = decode_by_hand(channel, model, fmt, example)
        assert output.text == texts[-1]
        assert output.passes == passes
        thoughts = [ids.index(closer) + 1 if closer in ids else len(ids) for ids in texts]
        assert output.thought_passes <= sum(thoughts)
        assert output.answer == fmt.answer_text(texts[-1])
        numbers.add(len(texts))
        if memory is None:
            assert output.vectors is None
            continue
        assert torch.allclose(output.vectors, memory, atol=1e-4)
        zeros.append((example, output))
    assert len(numbers) > 1
    problems, found = zip(*zeros, strict=True)
    given = channel.answer_log_probs(model, fmt, problems, found, [0 * o.vectors for o in found])
    for example, output, one in zip(problems, found, given, strict=True):
        before = context(model, fmt, example, torch.zeros(2, 32))
        text = model.get_input_embeddings()(torch.tensor(output.text))
        log_p = model.lm_head(hidden_after(model, torch.cat([before, text]))).log_softmax(-1)
        expected = sum(log_p[len(before) + t - 1, i] for t, i in enumerate(output.text))
        assert float(one) == pytest.approx(float(expected), abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_passes_of_text_are_those_of_all_segments(temperature, built):
    model, fmt = built
    channel = build_channel("token", {}, model)
    examples = [TASKS[6].example("test", i) for i in range(4)]
    options = WriteOptions(sampler=Sampler(temperature=temperature), max_new_tokens=40)
    outputs = channel.write(model, fmt, examples, options)
    decoding = DecodeOptions(
        sampler=options.sampler, max_new_tokens=40, generator=torch.Generator().manual_seed(0)
    )
    batch = sample(model, fmt, examples, fmt.plan("slow"), decoding)
    assert max(len(batch.segments_of(row)) for row in range(4)) > 1
    for row, output in enumerate(outputs):
        segments = batch.segments_of(row)
        assert output.passes == sum(int(batch.out.passes[i]) for i in segments)
        assert (output.vectors is None) == (len(segments) == 1)


@torch.no_grad()
def test_between_segments_of_text_the_message_is_the_memory_file(built):
    model, fmt = built
    channel = build_channel("token", {}, model)
    example, embed = EXAMPLES[0], model.get_input_embeddings()
    (_, _), (_, _), (before, text) = fmt.example_segments(example)
    file = fmt.tokenizer.encode("done: " + example.thought[12:15])
    assert memory_ids(fmt, example, before) == file
    assert memory_ids(fmt, example, fmt.prompt_ids(example.prompt)) is None
    output = Written(example.answer, 9, 8, "", embed(torch.tensor(file)), text)
    (found,) = channel.answer_log_probs(model, fmt, [example], [output], [output.vectors])
    inputs = embed(torch.tensor(before + text))
    log_p = model.lm_head(hidden_after(model, inputs)).log_softmax(-1)
    expected = sum(log_p[len(before) + t - 1, i] for t, i in enumerate(text))
    assert float(found) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize(
    ("phases", "segments", "error"),
    [
        (PHASES, SegmentSettings(max_segments=1, recent_tokens=0), "max_segments must be above 1"),
        (PHASES, SegmentSettings(max_segments=2), "recent_tokens must be 0 .*, got 16"),
        (
            PHASES | {"thought": Phase(mode="fast", opened_by="<think>")},
            SEGMENTS,
            "decoding.phases.thought.max_tokens must be a number",
        ),
    ],
)
def test_settings_without_vectors_between_segments_are_refused(phases, segments, error):
    model, fmt = build(phases, segments)
    channel = build_channel("vector_memory", {}, model)
    with pytest.raises(ValueError, match=error):
        channel.check(fmt, TASKS[6])


PROJECTS = PointerChasingConfig(num_nodes=8, hops=4, project_size=3).build()
PROBLEMS = [PROJECTS.example("train", i) for i in range(6)]
LARGE = PHASES | {
    "summary": Phase(opened_by="<summary>", closed_by="</summary>", max_tokens=40),
}
SHARED = SegmentSettings(max_segments=4, recent_tokens=0, memory_tokens=32, memory_scope="shared")


def project_log_probs(channel, model, fmt, detach=False):
    """Sum of log p over two projects of three problems, by hand; `detach`: between problems."""
    total = 0.0
    for at in (0, 3):
        memory = None
        for example in PROBLEMS[at : at + 3]:
            texts = solved(fmt, example)
            assert len(texts) == 2
            found, memory = chained(channel, model, fmt, example, texts, memory)
            memory = memory.detach() if detach else memory
            total = total + found
    return total


def test_vectors_pass_from_a_problem_to_the_next_and_so_does_the_gradient():
    model, fmt = build(LARGE, SHARED)
    channel = build_channel("vector_memory", {"num_vectors": 2, "text_steps": 0}, model)
    count = sum(len(ids) for example in PROBLEMS for ids in solved(fmt, example))
    expected = -project_log_probs(channel, model, fmt) / count
    loss = channel.supervised_loss(model, fmt, PROBLEMS, step=0, seed=0)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    weights = [channel.queries, channel.projection.weight]
    cut = torch.autograd.grad(-project_log_probs(channel, model, fmt, True) / count, weights)
    wanted = torch.autograd.grad(expected, weights)
    found = torch.autograd.grad(loss, weights)
    for of_loss, by_all, within in zip(found, wanted, cut, strict=True):
        size = float(by_all.abs().max())
        assert torch.allclose(of_loss, by_all, atol=1e-3 * size)
        assert float((by_all - within).abs().max()) > 0.01 * size, "later problems' loss counts"
    assert training_cost(model, fmt, channel, PROBLEMS, step=0).sequential_passes == 6


def test_text_steps_of_a_project_pass_on_the_last_tokens_of_the_file():
    model, fmt = build(LARGE, SHARED)
    channel = build_channel("vector_memory", {"num_vectors": 18, "text_steps": 5}, model)
    embed = model.get_input_embeddings()
    log_probs, errors, sizes = [], [], []
    for at in (0, 3):
        memory = own = None
        for example in PROBLEMS[at : at + 3]:
            file = f"{example.columns['table']}\ndone: {example.thought[4:7]}"
            assert len(file) == 18
            for number, ids in enumerate(solved(fmt, example)):
                if number:
                    memory = embed(torch.tensor(fmt.tokenizer.encode(file)))
                    errors.append((own - memory).square())
                    sizes.append(memory.square())
                before = context(model, fmt, example, memory)
                inputs = torch.cat([before, embed(torch.tensor(ids))])
                log_p = model.lm_head(hidden_after(model, inputs)).log_softmax(-1)
                log_probs += [log_p[len(before) + t - 1, token] for t, token in enumerate(ids)]
                own = memory_after(channel, model, inputs)
    expected = torch.stack(errors).mean() / torch.stack(sizes).mean()
    expected = expected - torch.stack(log_probs).mean()
    loss = channel.supervised_loss(model, fmt, PROBLEMS, step=4, seed=0)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-4)


@torch.no_grad()
def test_a_problem_is_written_with_the_vectors_of_the_one_before():
    model, fmt = build(LARGE, SHARED)
    model.lm_head.weight[fmt.delimiter_id("<summary>")] += 0.4
    model.lm_head.weight[fmt.eos_id] += 0.3
    channel = build_channel("vector_memory", {"num_vectors": 2}, model)
    examples = [PROJECTS.example("test", i) for i in range(24)]
    outputs = channel.write(model, fmt, examples, WriteOptions(max_new_tokens=14))
    kinds, memory = set(), None
    for example, output in zip(examples, outputs, strict=True):
        begin = memory if example.place else None
        texts, memory, passes = decode_by_hand(channel, model, fmt, example, memory=begin)
        assert output.text == texts[-1] and output.passes == passes
        if memory is None:
            assert output.vectors is None
        else:
            assert torch.allclose(output.vectors, memory, atol=1e-4)
        kinds.add((begin is None, memory is None))
    assert {(True, False), (False, False)} <= kinds
