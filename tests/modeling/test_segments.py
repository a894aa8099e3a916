"""Segments: contexts by their definition, exact log-probabilities, budgets, memory."""

import pytest
import torch
from helpers import EOS, HEADS, PAD, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp.modeling.decode import decode
from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.phases import Phase, PhasePlan
from mtp.modeling.records import FORCED, pad
from mtp.modeling.sampler import Sampler
from mtp.modeling.segments import SegmentSettings, check_segments, decode_segments
from mtp.training.collate import collate_rollouts
from mtp.training.objectives.scored import replay_batch

THINK, ANSWER, SUMMARY, CLOSE = 2, 3, 4, 5
SETTINGS = SegmentSettings(max_segments=3, recent_tokens=3, memory_tokens=8)
PROMPTS = [[9, 6, THINK], [8, THINK], [9, 10, 11, 12, THINK]]


class Commands:
    """A tokenizer under which any text of a model is a list of commands."""

    def decode(self, ids):
        names = {True: "write {} {}", False: "delete {}"}
        return "\n".join(names[i % 5 != 0].format("abc"[i % 3], i) for i in ids) + "\n?"

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [2 + ord(character) % 21 for character in text]


def make_plan(mode="fast", thought=4, summary=3):
    """A fast thought and a slow summary with budgets, and a slow answer; K = 3."""
    plan = PhasePlan(
        keep=[4, 1, 1],
        opened_by=[THINK, SUMMARY, ANSWER],
        eos_ids=[EOS],
        max_tokens=[thought, summary, None],
        closed_by=[None, CLOSE, None],
    )
    return {"fast": plan, "slow": plan.as_slow(), "verified": plan.as_verified(4)}[mode]


def run(model, prompts, plan, sampler=None, seed=0, options=SETTINGS, **others):
    tokens, lengths = pad(prompts, PAD)
    return decode_segments(
        model,
        tokens,
        lengths,
        plan,
        DecodeOptions(
            sampler=sampler or Sampler(),
            max_new_tokens=14,
            pad_id=PAD,
            generator=torch.Generator().manual_seed(seed),
        ),
        options,
        Commands(),
        **others,
    )


MODELS = {head: tiny_model(type=head) for head in HEADS}


@settings(max_examples=40, deadline=None)
@given(
    head=st.sampled_from(sorted(MODELS)),
    prompts=st.lists(st.lists(st.integers(6, 22), max_size=6), min_size=1, max_size=5),
    mode=st.sampled_from(["fast", "slow", "verified"]),
    budgets=st.tuples(st.sampled_from([1, 4, 7, None]), st.sampled_from([1, 3, None])),
    sampler=st.sampled_from([Sampler(), Sampler(temperature=0.7, top_k=9), Sampler(temperature=0)]),
    options=st.builds(
        SegmentSettings,
        max_segments=st.integers(1, 4),
        recent_tokens=st.integers(0, 9),
        memory_tokens=st.integers(0, 30),
    ),
    copies=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
@torch.no_grad()
def test_replay_of_segments_gives_the_samplers_log_probabilities(
    head, prompts, mode, budgets, sampler, options, copies, seed
):
    model = MODELS[head]
    prompts = [[*prompt, THINK] for prompt in prompts]
    plan = make_plan(mode, *budgets)
    out = run(model, prompts, plan, sampler, seed, options, num_return_sequences=copies)
    check_contexts(out, prompts, plan, options, copies)
    advantages, rows = torch.zeros(len(out.prompts)), list(range(len(out.prompts)))
    batch = collate_rollouts(out.prompts, out.out, advantages, rows, 4, PAD)
    scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
    main, head_ = scored.main.stats(sampler).logprob, scored.head.stats(sampler).logprob
    assert torch.allclose(main, batch.main.sampled, atol=1e-4)
    assert torch.allclose(head_, batch.head.sampled, atol=1e-4)
    assert len(main) + len(head_) == int((out.out.slots >= 0).sum())
    total = out.out.logprobs.sum()
    assert torch.allclose(main.sum() + head_.sum(), total, atol=1e-3, rtol=1e-5)


def check_contexts(out, prompts, plan, options, copies):
    """Each context is prompt, memory and recent tokens, derived from the tokens alone."""
    tokenizer = Commands()
    assert sorted(set(out.owners)) == list(range(len(prompts) * copies))
    for trajectory in range(len(prompts) * copies):
        prompt = prompts[trajectory // copies]
        mine = out.of(trajectory)
        assert 1 <= len(mine) <= options.max_segments
        context, thought = prompt, []
        for number, segment in enumerate(mine):
            is_last = number + 1 == len(mine)
            assert out.prompts[segment] == context
            written = out.out.completion(segment)
            assert bool(out.out.closed[segment]) == (not is_last)
            assert (out.out.ended_by(segment) in ("end", "limit")) == is_last
            slots = out.out.slots[segment, : len(written)].tolist()
            before = plan.phase_after(torch.tensor([context + written]))[0, len(context) - 1 :]
            followed = plan if number + 1 < options.max_segments else plan.as_last_segment()
            for phase, token, slot in zip(before.tolist(), written, slots, strict=False):
                assert slot in (0, FORCED) or phase == 0, "only main writes slow phases"
                assert slot != FORCED or token == followed.forced[phase]
            forced = out.out.slots[segment] == FORCED
            assert (out.out.logprobs[segment][forced] == 0).all()
            if is_last:
                continue
            assert written[-1] == CLOSE
            cut = len(written) - written[::-1].index(SUMMARY)
            memory = out.memories[segment]
            known = out.memories[mine[number - 1]] if number else type(memory)()

            def size(text):
                return len([t for t in tokenizer.encode(text, False) if t not in plan.marks])

            assert memory == known.edited(
                tokenizer.decode(written[cut:-1]), options.memory_tokens, size
            )
            assert size(memory.text) <= options.memory_tokens
            thought += [t for t in written[: cut - 1] if t not in plan.marks]
            thought = thought[len(thought) - min(len(thought), options.recent_tokens) :]
            kept = [t for t in tokenizer.encode(memory.text, False) if t not in plan.marks]
            context = [*prompt, SUMMARY, *kept, CLOSE, THINK, *thought]


@pytest.mark.parametrize("mode", ["fast", "slow", "verified"])
def test_budgets_close_thoughts_and_summaries_and_lead_to_the_answer_in_the_end(mode):
    plan = make_plan(mode)
    out = run(tiny_model(), PROMPTS * 6, plan, seed=3)
    forced = {SUMMARY: 0, CLOSE: 0, ANSWER: 0}
    for segment, owner in enumerate(out.owners):
        written = out.out.completion(segment)
        phases = plan.phase_after(torch.tensor([out.prompts[segment] + written]))[0]
        before = phases[len(out.prompts[segment]) - 1 :].tolist()
        in_phase, is_third = 0, len(out.of(owner)) == 3 and segment == out.of(owner)[2]
        for at, token in enumerate(written):
            budget = plan.max_tokens[before[at]]
            if int(out.out.slots[segment, at]) == FORCED:
                assert in_phase == budget
                assert (token == ANSWER) == is_third
                forced[token] += 1
            in_phase = 0 if before[at + 1] != before[at] else in_phase + 1
            assert budget is None or in_phase <= budget or token == CLOSE
        of_summary = before[-2] == plan.opened_by.index(SUMMARY)
        if written[-1] == CLOSE and of_summary and not is_third:
            is_forced = int(out.out.slots[segment, len(written) - 1]) == FORCED
            assert out.out.ended_by(segment) == ("budget" if is_forced else "delimiter")
    assert min(forced.values()) > 3, forced


def test_a_closed_segment_is_not_finished_and_an_ended_trajectory_has_no_further_segment():
    out = run(tiny_model(), PROMPTS * 6, make_plan(), seed=1)
    assert not (out.out.closed & out.out.finished).any()
    several = [len(out.of(row)) for row in range(18)]
    assert max(several) == 3 and min(several) < 3


def test_one_segment_is_the_pass_loop_itself():
    plan = make_plan()
    one = run(tiny_model(), PROMPTS, plan, options=SegmentSettings(max_segments=1))
    tokens, lengths = pad(PROMPTS, PAD)
    out = decode(
        tiny_model(),
        tokens,
        lengths,
        plan.as_last_segment(),
        DecodeOptions(
            sampler=Sampler(),
            max_new_tokens=14,
            pad_id=PAD,
            generator=torch.Generator().manual_seed(0),
        ),
    )
    assert one.owners == [0, 1, 2] and one.prompts == PROMPTS
    for name, value in vars(out).items():
        assert torch.equal(value, getattr(one.out, name)), name


def test_blocks_name_trajectories_and_segments_are_announced():
    blocks, begun = [], []
    out = run(
        tiny_model(), PROMPTS * 2, make_plan(), seed=2, on_block=blocks.append,
        on_segment=lambda *given: begun.append(given),
    )  # fmt: skip
    told = {row: [] for row in range(6)}
    for block in blocks:
        for row, tokens, length in zip(block.rows, block.tokens, block.lengths, strict=True):
            told[int(row)] += tokens[:length].tolist()
    for row in range(6):
        assert told[row] == sum((out.out.completion(i) for i in out.of(row)), [])
        mine = out.of(row)
        expected = [(row, out.prompts[i + 1], out.memories[i]) for i in mine[:-1]]
        assert [given for given in begun if given[0] == row] == expected


@pytest.mark.parametrize(
    ("options", "phases", "message"),
    [
        ({"max_segments": 0}, {}, "x.segments.max_segments must be at least 1, got 0"),
        ({"recent_tokens": -1}, {}, "x.segments.recent_tokens must be 0 or above, got -1"),
        ({"memory_tokens": -1}, {}, "x.segments.memory_tokens must be 0 or above, got -1"),
        ({"max_segments": 2}, {}, "needs closed_by in one phase of x.phases, .* got it in none"),
        (
            {"max_segments": 2},
            {"answer": Phase(opened_by="</think>", closed_by="</summary>")},
            "neither the first nor the last, got it in answer",
        ),
        (
            {"max_segments": 2},
            {"thought": Phase(), "summary": Phase(opened_by="<s>", closed_by="</s>")},
            "x.phases.thought.opened_by must name a token",
        ),
    ],
)
def test_impossible_settings_name_their_key(options, phases, message):
    known = {
        "thought": Phase(opened_by="<think>"),
        "summary": Phase(opened_by="<s>"),
        "answer": Phase(opened_by="</think>"),
    }
    with pytest.raises(ValueError, match=message):
        check_segments(SegmentSettings(**options), known | phases, "x")


def test_a_closing_token_that_opens_a_phase_is_refused_before_any_pass(monkeypatch):
    model, plan = tiny_model(), make_plan()
    monkeypatch.setattr(type(model), "main_states", None)
    plan.closed_by[1] = ANSWER
    with pytest.raises(ValueError, match="token 3 closes a segment .* and opens a phase"):
        run(model, PROMPTS, plan)
