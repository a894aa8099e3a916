"""Problems of a project that share a memory: contexts by definition, refusals, rewards to go."""

from types import SimpleNamespace

import pytest
import torch
from helpers import EOS, PAD, config, records, tiny_model
from transformers import LogitsProcessorList

from mtp.evaluation.evaluate import decode_all, place_metrics
from mtp.evaluation.spread import Spread
from mtp.hub.build import ModelConfig, build_model, generation_config
from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.heads import HeadConfig
from mtp.modeling.memory import Memory
from mtp.modeling.phases import Phase, PhasePlan
from mtp.modeling.sampler import Sampler
from mtp.modeling.segments import SegmentSettings, check_segments
from mtp.rollouts.advantage import GroupRewards, group_mean, informative
from mtp.rollouts.reward import reward_to_go
from mtp.rollouts.rollout import DecodingConfig, sample
from mtp.tasks.base import Example, training_index
from mtp.tasks.pointer_chasing import PointerChasingConfig
from mtp.tasks.projects import own_places, projects_of
from mtp.tasks.running_sum import RunningSumConfig
from mtp.trainer import check_projects, train
from mtp.training.collate import collate_rollouts
from mtp.training.examples import FittedTask
from mtp.training.objectives.scored import replay_batch

THINK, ANSWER, SUMMARY, CLOSE = 2, 3, 4, 5
PLAN = PhasePlan(
    keep=[4, 1, 1],
    opened_by=[THINK, SUMMARY, ANSWER],
    eos_ids=[EOS],
    max_tokens=[4, 3, None],
    closed_by=[None, CLOSE, None],
)


class Commands:
    """A tokenizer under which any text of a model is a list of commands."""

    def decode(self, ids):
        return "\n".join(f"write {('a', 'done', 'c')[i % 3]} {i}" for i in ids)

    def encode(self, text, add_special_tokens):
        return [6 + ord(character) % 17 for character in text]


ANY_TEXT = SimpleNamespace(
    segments=SegmentSettings(
        max_segments=2, recent_tokens=3, memory_tokens=30, memory_scope="shared"
    ),
    tokenizer=Commands(),
    pad_id=PAD,
    question_ids=lambda example: [*map(int, example.prompt.split()), THINK],
)
PROBLEMS = [
    Example(prompt, "", project=project, place=place)
    for project, prompts in (("x", ("9 6", "8", "7 7 7")), ("y", ("10 11 12", "9", "13")))
    for place, prompt in enumerate(prompts)
]
SEEDS = torch.arange(18) * 7919 + 5


def sampled(model, examples, seeds):
    options = DecodeOptions(sampler=Sampler(), max_new_tokens=14, pad_id=PAD, seeds=seeds)
    with torch.no_grad():
        return sample(model, ANY_TEXT, examples, PLAN, options, group_size=3)


def test_a_problem_begins_with_the_memory_that_its_own_trajectory_left_in_the_one_before():
    out = sampled(tiny_model(), PROBLEMS, SEEDS)
    assert out.examples == PROBLEMS and len(out) == 18
    assert sorted(set(out.owners)) == list(range(18))
    passed = []
    for row in range(18):
        prompt = ANY_TEXT.question_ids(out.example(row))
        first, *others = out.segments_of(row)
        known = Memory()
        if out.example(row).place:  # three trajectories earlier is the problem before
            left = out.memories[out.segments_of(row - 3)[-1]]
            known = Memory({key: text for key, text in left.entries.items() if key != "done"})
            passed.append((left.text, known.text))
        kept = Commands().encode(known.text, False)
        start = [*prompt, SUMMARY, *kept, CLOSE, THINK] if known.entries else prompt
        assert out.prompts[first] == start
        for before in [first, *others][:-1]:
            written = out.out.completion(before)
            cut = len(written) - written[::-1].index(SUMMARY)
            summary = Commands().decode(written[cut:-1])
            known = known.edited(summary, 30, lambda text: len(Commands().encode(text, False)))
            assert out.memories[before] == known
        assert out.memories[[first, *others][-1]] == known
    assert any("done" in left for left, _ in passed), "a progress line is dropped"
    assert len({known for _, known in passed}) > 3
    assert "" in {known for _, known in passed}, "some have no memory to pass on"


def test_the_rollouts_of_a_project_do_not_depend_on_the_others_in_its_batch():
    model = tiny_model()
    out = sampled(model, PROBLEMS, SEEDS)
    for numbers in ([0, 1, 2], [3, 4, 5]):
        rows = [3 * i + row for i in numbers for row in range(3)]
        alone = sampled(model, [PROBLEMS[i] for i in numbers], SEEDS[rows])
        for row, i in enumerate(rows):
            assert alone.completions(row) == out.completions(i)
            of_alone, of_out = alone.segments_of(row), out.segments_of(i)
            assert [alone.prompts[s] for s in of_alone] == [out.prompts[s] for s in of_out]
            assert [alone.memories[s] for s in of_alone] == [out.memories[s] for s in of_out]


def test_replay_of_a_project_gives_the_samplers_log_probabilities():
    model = tiny_model()
    out = sampled(model, PROBLEMS, SEEDS)
    rows = list(range(len(out.prompts)))
    batch = collate_rollouts(out.prompts, out.out, torch.zeros(18), rows, 4, PAD, out.owners)
    with torch.no_grad():
        scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
    for stream, given in ((scored.main, batch.main), (scored.head, batch.head)):
        assert torch.allclose(stream.stats(Sampler()).logprob, given.sampled, atol=1e-4)
    assert len(batch.main) > 100


@pytest.mark.parametrize(
    ("order", "error"),
    [
        ([1, 2, 3, 4, 5], "whole projects in order, got place 1 of project 'x' after nothing"),
        ([0, 2, 1], "got place 2 of project 'x' after place 0 of 'x'"),
        ([0, 4], "got place 1 of project 'y' after place 0 of 'x'"),
        ([0, 1, 2, 3, 4], "whole projects of one size, got 2 to 3 problems"),
    ],
)
def test_problems_without_their_predecessor_are_refused(order, error):
    examples = [PROBLEMS[i] for i in order]
    with pytest.raises(ValueError, match=error):
        projects_of(examples)
    with pytest.raises(ValueError, match=error):
        sampled(None, examples, None)


def test_problems_of_no_project_and_given_thoughts_are_refused_where_a_memory_is_shared():
    with pytest.raises(ValueError, match="got place 0 of project ''"):
        sampled(None, [Example("9", "")], None)
    options = DecodeOptions(max_new_tokens=14)
    with pytest.raises(ValueError, match="a thought that is given writes no memory"):
        sample(None, ANY_TEXT, PROBLEMS, PLAN, options, prefixes=[[]] * 6)
    assert projects_of([PROBLEMS[0], PROBLEMS[3]]) == 1, "first problems need no other"


TASK = PointerChasingConfig(num_nodes=8, hops=4, project_size=4).build()
PHASES = {
    "thought": Phase(mode="fast", opened_by="<think>", max_tokens=8),
    "summary": Phase(opened_by="<summary>", closed_by="</summary>", max_tokens=40),
    "answer": Phase(opened_by="</think>"),
}


def built(scope="shared", memory_tokens=32, summary=40):
    segments = SegmentSettings(
        max_segments=2, recent_tokens=0, memory_tokens=memory_tokens, memory_scope=scope
    )
    phases = PHASES | {
        "summary": Phase(opened_by="<summary>", closed_by="</summary>", max_tokens=summary)
    }
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    decoding = DecodingConfig(phases=phases, segments=segments, max_new_tokens=60)
    head = HeadConfig(num_slots=3, hidden_size=16, intermediate_size=24)
    return *build_model(ModelConfig(config=sizes), head, decoding, TASK), decoding


def shown(fmt, segments):
    return [tuple(fmt.tokenizer.decode(ids) for ids in pair) for pair in segments]


def test_solved_problems_note_the_table_once_and_read_it_later():
    _, fmt, _ = built()
    first, second = TASK.example("test", 0), TASK.example("test", 1)
    table, begun = first.columns["table"], second.prompt
    assert shown(fmt, fmt.example_segments(first)) == [
        (
            f"{first.prompt}<think>",
            f"{first.thought[:8]}<summary>write table {table}\n"
            f"write done {first.thought[4:7]}</summary>",
        ),
        (
            f"{first.prompt}<think><summary>table: {table}\ndone: {first.thought[4:7]}</summary>"
            "<think>",
            f"{first.thought[8:]}</think>{first.answer}<eos>",
        ),
    ]
    assert begun[0] == "?" and table not in begun
    assert shown(fmt, fmt.example_segments(second)) == [
        (
            f"{begun}<think><summary>table: {table}</summary><think>",
            f"{second.thought[:8]}<summary>write done {second.thought[4:7]}</summary>",
        ),
        (
            f"{begun}<think><summary>table: {table}\ndone: {second.thought[4:7]}</summary><think>",
            f"{second.thought[8:]}</think>{second.answer}<eos>",
        ),
    ]
    _, alone, _ = built("problem")
    told = shown(alone, alone.example_segments(second))
    assert told[0][0] == f"{begun}<think>" and "table" not in "".join(map(str, told))


def test_a_short_solved_thought_has_a_summary_if_there_is_something_to_note():
    _, fmt, _ = built()
    note = Example("ab?a1=", "b", "ab0", project="x", note="write table ab")
    assert shown(fmt, fmt.example_segments(note)) == [
        ("ab?a1=<think>", "ab0<summary>write table ab\nwrite done ab0</summary>"),
        (
            "ab?a1=<think><summary>table: ab\ndone: ab0</summary><think>",
            "</think>b<eos>",
        ),
    ]
    later = Example("?a1=", "b", "ab0", project="x", place=1, memory="table: ab")
    (only,) = shown(fmt, fmt.example_segments(later))
    assert only == ("?a1=<think><summary>table: ab</summary><think>", "ab0</think>b<eos>")


@torch.no_grad()
def test_decoding_makes_the_contexts_of_solved_text():
    """A model that writes solved text, whatever its logits are, reads exactly its contexts."""
    model, fmt, decoding = built()
    examples = [TASK.example("test", i) for i in range(8)]
    solved = [fmt.example_segments(example) for example in examples]
    script = {tuple(context): text for segments in solved for context, text in segments}

    def forced(ids, scores):
        for row, all_ids in enumerate(ids.tolist()):
            text = [token for token in all_ids if token != fmt.pad_id]
            cut = next(n for n in range(len(text), 0, -1) if tuple(text[:n]) in script)
            scores[row] = -torch.inf
            scores[row, script[tuple(text[:cut])][len(text) - cut]] = 0.0
        return scores

    options = DecodeOptions(
        sampler=Sampler(), max_new_tokens=60, process=LogitsProcessorList([forced])
    )
    out = sample(model, fmt, examples, fmt.plan("slow"), options, group_size=2)
    for row in range(16):
        segments = out.segments_of(row)
        found = [(out.prompts[s], out.out.completion(s)) for s in segments]
        assert found == solved[row // 2]
        assert out.memories[segments[-1]].entries["table"] == examples[row // 2].columns["table"]


def test_what_solved_examples_cannot_write_is_refused():
    example = TASK.example("train", 0)
    with pytest.raises(ValueError, match=r"summary.max_tokens must be at least 35 .*write table"):
        _, fmt, _ = built(summary=33)
        fmt.example_segments(example)
    with pytest.raises(ValueError, match="decoding.segments.memory_tokens must be large enough"):
        _, fmt, _ = built(memory_tokens=20)
        fmt.example_segments(example)


def test_a_reward_to_go_is_the_mean_of_a_problem_and_the_later_ones_of_its_project():
    examples = [*PROBLEMS[:3], *PROBLEMS[3:5]]
    totals = torch.tensor([[1.0, 0.5], [0.0, 0.5], [1.0, 0.5], [1.0, 0.0], [0.0, 0.0]])
    expected = [[2 / 3, 0.5], [0.5, 0.5], [1.0, 0.5], [0.5, 0.0], [0.0, 0.0]]
    assert torch.allclose(reward_to_go(totals, examples), torch.tensor(expected))


def test_a_first_problem_that_all_solve_learns_from_what_its_memory_leads_to():
    examples = PROBLEMS[:2]
    outcomes = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    total = reward_to_go(outcomes, examples)
    assert total.tolist() == [[1.0, 0.5], [1.0, 0.0]]
    assert informative(outcomes).tolist() == [False, True]
    assert informative(total).tolist() == [True, True]
    given = GroupRewards(total, total, total)
    assert group_mean(given).tolist() == [[0.25, -0.25], [0.5, -0.5]]


def test_shares_of_processes_and_orders_of_epochs_hold_whole_projects():
    assert own_places(8, 2, 0, 2) == [0, 1, 4, 5] and own_places(8, 2, 1, 2) == [2, 3, 6, 7]
    assert own_places(5, 1, 1, 2) == [1, 3]
    order = [training_index(position, 24, 1, 3) for position in range(48)]
    for epoch in (order[:24], order[24:]):
        assert sorted(epoch) == list(range(24))
        firsts = epoch[::3]
        assert epoch == [first + i for first in firsts for i in range(3)]
        assert firsts != sorted(firsts)
    assert order[:24] != order[24:]
    of_one = [Spread(SimpleNamespace(world_size=2, global_rank=r)).places(6, 2) for r in (0, 1)]
    assert of_one == [([0, 1, 2, 3], 4), ([4, 5, 4, 5], 2)]


def test_accuracy_by_place():
    right = [True, True, False, True, False, False]
    assert place_metrics(right, PROBLEMS, "fast_accuracy") == {
        "fast_accuracy_by_place": [1.0, 0.5, 0.0]
    }
    assert place_metrics(right[:2], [PROBLEMS[0], PROBLEMS[3]], "x") == {}


@torch.no_grad()
def test_an_evaluation_keeps_projects_whole_on_each_process(monkeypatch):
    model, fmt, decoding = built()
    examples = [TASK.example("test", i) for i in range(12)]
    seen = []

    def note(model, fmt, chosen, plan, options, **others):
        seen.append([example.place for example in chosen])
        raise KeyError

    monkeypatch.setattr("mtp.evaluation.evaluate.sample", note)
    for rank in (0, 1):
        spread = Spread(SimpleNamespace(world_size=2, global_rank=rank))
        with pytest.raises(KeyError):
            decode_all(model, fmt, examples, "slow", decoding, 8, spread=spread)
    assert seen == [[0, 1, 2, 3] * 2] * 2


def test_settings_that_cannot_share_a_memory_are_refused():
    with pytest.raises(ValueError, match="x.segments.memory_scope must be problem or shared, got"):
        check_segments(SegmentSettings(memory_scope="all"), {}, "x")
    with pytest.raises(ValueError, match="x.segments.max_segments must be above 1 with x.segme"):
        check_segments(SegmentSettings(memory_scope="shared"), {}, "x")


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["evaluation.num_problems=6"], "evaluation.num_problems must be a multiple of task.proj"),
        (["evaluation.batch_size=10"], "evaluation.batch_size must be a multiple of .*4, got 10"),
        (["stages.rl.rollouts.num_prompts=6"], "stages.rl.rollouts.num_prompts must be a multiple"),
        (["fabric.devices=2"], "times the 2 processes, got 4; the problems"),
    ],
)
def test_batches_that_cut_projects_are_refused(tmp_path, overrides, error):
    settings = config(tmp_path, "task=pointer_chasing", "task.project_size=4", *overrides)
    with pytest.raises(ValueError, match=error):
        check_projects(settings, TASK)


def test_a_shared_memory_needs_a_task_of_projects(tmp_path):
    shared = [
        "decoding=segments",
        "decoding.segments.memory_scope=shared",
        "decoding.max_new_tokens=40",
    ]
    with pytest.raises(ValueError, match="memory_scope=shared needs a task of projects, which"):
        check_projects(config(tmp_path, *shared), RunningSumConfig().build())


def test_a_problem_of_a_project_is_never_left_out_for_its_length():
    _, fmt, _ = built()
    fitted = FittedTask(TASK, fmt, prompt_limit=9)
    assert fitted.project_size == 4
    with pytest.raises(ValueError, match="test problem 0 of .* too long .* its project needs it"):
        fitted.example("test", 0)


def test_a_checkpoint_keeps_the_scope_where_it_is_not_the_usual_one():
    _, fmt, decoding = built()
    assert generation_config(fmt, decoding.phases).mtp_segments["memory_scope"] == "shared"
    _, alone, decoding = built("problem")
    assert generation_config(alone, decoding.phases).mtp_segments == {
        "max_segments": 2, "recent_tokens": 0, "memory_tokens": 32,
    }  # fmt: skip


@torch.no_grad()
def test_generate_segments_begins_with_given_memories():
    model, fmt, decoding = built()
    model.generation_config = generation_config(fmt, decoding.phases)
    ids = torch.tensor([fmt.prompt_ids("?a4=")])
    given = {"tokenizer": fmt.tokenizer, "max_new_tokens": 9}
    out = model.generate_segments(ids, memories=[Memory({"table": "bcde"})], **given)
    context = fmt.tokenizer.decode(out.prompts[0])
    assert context == "?a4=<think><summary>table: bcde</summary><think>"
    with pytest.raises(ValueError, match="memories must be one for each of the 1 trajectories"):
        model.generate_segments(ids, memories=[Memory()] * 2, **given)
    with pytest.raises(ValueError, match="memories must be given without memory_file"):
        model.generate_segments(ids, memories=[Memory()], memory_file="x", **given)


def test_rl_on_projects_is_replayed_exactly_and_evaluated_by_place(tmp_path):
    overrides = [
        "task=pointer_chasing",
        "task.num_nodes=8",
        "task.hops=4",
        "task.project_size=4",
        "decoding=segments",
        "decoding.phases.thought.max_tokens=8",
        "decoding.phases.summary.max_tokens=40",
        "decoding.segments.memory_scope=shared",
        "decoding.max_new_tokens=60",
        "decoding.temperature=1",
        "stages.main.steps=2",
        "stages.main.examples.batch_size=8",
        "stages.head.steps=0",
        "stages.joint.steps=2",
        "stages.joint.examples.batch_size=8",
        "stages.rl.steps=2",
        "stages.rl.rollouts.num_solved=4",
        "stages.rl.objective.main_ce.weight=0.1",
        "stages.rl.reward.pass_cost=0.01",
    ]
    summary = train(config(tmp_path / "run", *overrides))
    steps = [r for r in records(tmp_path / "run") if r["stage"] == "rl" and "reward" in r]
    assert len(steps) == 2
    for record in steps:
        assert record["main/sampling_logp_difference_max"] < 1e-3
        assert record["head/sampling_logp_difference_max"] < 1e-3
        assert record["segments"] > 1
    for stage in summary["stages"]:
        for mode in ("slow", "fast"):
            by_place = stage.get(f"{mode}_accuracy_by_place")
            if stage[f"{mode}_accuracy"] is not None:
                assert sum(by_place) / 4 == pytest.approx(stage[f"{mode}_accuracy"])
        assert stage["empty_thought_accuracy"] is None
