"""Segments in training: one advantage for all of a trajectory, solved examples, runs, commands."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import config, records, run_alone, tiny_model
from transformers import AutoTokenizer, LogitsProcessor

from mtp.cli.main import main
from mtp.evaluation.evaluate import accuracy, thought_tokens_per_pass
from mtp.hub.build import generation_config, load_model
from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.memory import ALPHABET, Memory
from mtp.modeling.phases import Phase
from mtp.modeling.records import FORCED, Decoded
from mtp.modeling.sampler import Sampler
from mtp.modeling.segments import SegmentSettings
from mtp.reports.tables import completions_rows
from mtp.rollouts.legibility import mean_nats_of_rollouts, step_metrics, thought_nats
from mtp.rollouts.new_tokenizers import character_tokenizer
from mtp.rollouts.prompt_format import PromptFormat
from mtp.rollouts.reward import RewardConfig, score
from mtp.rollouts.rollout import DecodingConfig, Rollouts, sample
from mtp.steps import micro_batches, segment_metrics
from mtp.tasks.base import Example
from mtp.tasks.running_sum import RunningSumConfig
from mtp.trainer import train
from mtp.training.collate import collate_main_rollouts, collate_rollouts
from mtp.training.objectives.policy import Policy
from mtp.training.objectives.scored import replay_batch
from mtp.training.objectives.stream import StreamInputs

PHASES = {
    "thought": Phase(mode="fast", opened_by="<think>", max_tokens=4),
    "summary": Phase(mode="slow", opened_by="<summary>", closed_by="</summary>", max_tokens=3),
    "answer": Phase(mode="slow", opened_by="</think>"),
}
MARKS = ["<think>", "<summary>", "</summary>", "</think>"]
SEGMENTS = SegmentSettings(max_segments=3, recent_tokens=3, memory_tokens=12)
TASK = RunningSumConfig().build()


def make_text(alphabet="1=;", phases=PHASES, segments=SEGMENTS):
    """A prompt format, by default with a tokenizer of the 23 tokens that `tiny_model` knows."""
    tokenizer = character_tokenizer(alphabet + ALPHABET, MARKS)
    return PromptFormat(tokenizer, phases, 4, segments=segments)


TEXT = make_text()
EXAMPLES = [Example("1=", "1", "1=1"), Example("1;1=", "11", "1=;1=")]


def rolled(seed=0, group_size=3):
    model = tiny_model()
    out = sample(
        model,
        TEXT,
        EXAMPLES,
        TEXT.plan("fast"),
        DecodeOptions(
            sampler=Sampler(), max_new_tokens=14, generator=torch.Generator().manual_seed(seed)
        ),
        group_size=group_size,
    )
    assert len(out) == 2 * group_size < len(out.prompts)
    return model, out


def test_all_segments_of_a_trajectory_share_its_advantage():
    _, out = rolled()
    advantages = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    rows = [4, 1, 3]
    segments = [segment for row in rows for segment in out.segments_of(row)]
    assert len(segments) > 3 and (out.out.slots[segments] > 0).any()
    batch = collate_rollouts(out.prompts, out.out, advantages, segments, 4, 0, out.owners)
    assert batch.num_rollouts == 3
    assert len(batch.main) == int((out.out.slots[segments] == 0).sum())
    assert len(batch.blocks(batch.main).unique()) == int(out.out.passes[segments].sum())
    for number, row in enumerate(rows):
        slots = out.out.slots[out.segments_of(row)]
        for given, rollouts, is_mine in (
            (batch.main.advantages, batch.main.rollouts, slots == 0),
            (batch.head.advantages, batch.head.rollouts, slots > 0),
        ):
            expected = [float(advantages[row])] * int(is_mine.sum())
            assert given[rollouts == number].tolist() == expected


@pytest.mark.parametrize("ratio", ["token", "block", "sequence", "rollout"])
@pytest.mark.parametrize("normalizer", ["tokens", "sequences", "rollouts"])
def test_a_policys_loss_is_that_of_trajectories_however_they_are_batched(ratio, normalizer):
    model, out = rolled()
    out.out.logprobs = out.out.logprobs - 0.02 * (out.out.slots >= 0)
    advantages = torch.tensor([1.0, -2.0, 3.0, -4.0, 0.5, 3.5])
    policy = Policy(weight=1.0, ratio=ratio, normalizer=normalizer, clip_low=9, clip_high=9)

    def loss_of(groups):
        total, counts = torch.zeros(()), {"policy_main": 0.0, "policy_head": 0.0}
        for segments in groups:
            batch = collate_rollouts(out.prompts, out.out, advantages, segments, 4, 0, out.owners)
            scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
            terms = policy.terms(StreamInputs(scored, batch))
            total = total + terms["policy_main"].total.detach()
            counts = {name: counts[name] + n for name, n in policy.counts(batch).items()}
        return float(total), counts

    whole, counts = loss_of([list(range(len(out.prompts)))])
    apart, counts_apart = loss_of([out.segments_of(row) for row in range(6)])
    assert counts == counts_apart
    assert whole == pytest.approx(apart, rel=1e-4)
    if normalizer == "tokens":
        by_hand = 0.0
        for row in range(6):
            slots = out.out.slots[out.segments_of(row)]
            num_main, num_all = int((slots == 0).sum()), int((slots >= 0).sum())
            level = {"token": 0.02, "sequence": 0.02, "rollout": 0.02 * num_all}.get(ratio)
            if level is not None:
                by_hand -= num_main * float(advantages[row]) * torch.tensor(level).exp().item()
        assert ratio == "block" or whole == pytest.approx(by_hand, rel=1e-3)
    if normalizer == "rollouts":
        assert counts["policy_main"] == 6


def test_equal_segments_of_one_trajectory_keep_blocks_of_their_own():
    _, out = rolled()
    twice = out.out.select([0, 0])
    prompts = [out.prompts[0]] * 2
    batch = collate_rollouts(prompts, twice, torch.ones(1), [0, 1], 4, 0, [0, 0])
    assert len(batch.tokens) == 2 and batch.num_rollouts == 1
    assert len(batch.blocks(batch.main).unique()) == 2 * int(twice.passes[0])
    apart = collate_rollouts(prompts, twice, torch.ones(2), [0, 1], 4, 0)
    assert len(apart.tokens) == 1 and apart.num_rollouts == 2


def test_micro_batches_hold_whole_trajectories():
    _, out = rolled()
    groups = SimpleNamespace(rollouts=out)
    for size in (0, 1, 4, 7):
        batches = micro_batches(groups, [0, 1], size)
        assert sorted(sum(batches, [])) == list(range(len(out.prompts)))
        owners = [{out.owners[i] for i in batch} for batch in batches]
        assert sum(map(len, owners)) == 6, "no trajectory is in two batches"
        for batch, held in zip(batches, owners, strict=True):
            assert not size or len(batch) <= size or len(held) == 1
    assert len(micro_batches(groups, [0, 1], 0)) == 1


def test_slow_rollouts_leave_forced_tokens_unscored():
    model = tiny_model()
    out = sample(
        model,
        TEXT,
        EXAMPLES,
        TEXT.plan("slow"),
        DecodeOptions(
            sampler=Sampler(), max_new_tokens=14, generator=torch.Generator().manual_seed(0)
        ),
        group_size=4,
    )
    rows = list(range(len(out.prompts)))
    batch = collate_main_rollouts(
        out.prompts, out.out, torch.ones(8), rows, TEXT.plan("fast"), 4, 0, out.owners
    )
    assert int((out.out.slots == FORCED).sum()) > 5
    assert len(batch.main) == int((out.out.slots == 0).sum())
    scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
    assert torch.allclose(scored.main.stats().logprob, batch.main.sampled, atol=1e-4)
    assert (batch.head.sampled < 0).all(), "main's log-probability, not the 0 of a forced token"


def by_hand(*segments, prompt="37+85+46=", memories=None):
    """One trajectory whose segments wrote these texts, a pass for each three tokens."""
    text = make_text(TASK.alphabet)
    written = [text.tokenizer.encode(part, add_special_tokens=False) for part in segments]
    lengths = torch.tensor([len(ids) for ids in written])
    tokens = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(ids) for ids in written], batch_first=True
    )
    at = torch.arange(tokens.shape[1])
    slots = torch.where(at < lengths[:, None], at % 3, -1)
    finished = torch.tensor([ids[-1] == text.eos_id for ids in written])
    passes = -(-lengths // 3)
    closed = torch.tensor([part.endswith("</summary>") for part in segments])
    out = Decoded(
        tokens, slots, torch.zeros(tokens.shape), lengths, passes, finished, closed=closed
    )
    rows = Rollouts(
        [Example(prompt, "168", "37+85=122;122+46=168")], 1,
        [text.prompt_ids(prompt)] * len(segments), out, [0] * len(segments), memories or [],
    )  # fmt: skip
    return text, rows


def test_the_answer_is_the_last_segments_and_costs_are_the_trajectorys():
    text, rows = by_hand(
        "37+85=1<summary>write done 1</summary>",
        "22;122+46<summary></summary>",
        "=168</think>168<eos>",
        memories=[Memory(), Memory(), Memory({"done": "1"}, 1, 4)],
    )
    costs = RewardConfig(pass_cost=0.1, token_cost=0.01, format_cost=0.5, overlong_buffer=4)
    rewards = score(TASK, text, rows, costs, max_new_tokens=22)
    assert rewards.outcomes.tolist() == [[1.0]]
    lengths = rows.out.lengths.tolist()
    assert lengths == [21, 11, 9]
    expected = {"passes": -1.4, "tokens": -0.41, "format": 0.0, "overlong": -0.75}
    assert {name: round(float(v), 4) for name, v in rewards.terms.items()} == expected
    assert accuracy([rows], TASK, text.answer_text) == 1.0
    steps = step_metrics([rows], TASK, text)
    assert steps == {"true_steps": 1.0, "steps_per_thought": 2.0}, "steps are read across segments"
    # up to and with their closing delimiters, 8 tokens in 3 passes, 10 in 4, 5 in 2
    assert thought_tokens_per_pass([rows], text) == 23 / 9
    assert segment_metrics(rows) == {
        "segments": 3.0,
        "completions/forced_tokens": 0.0,
        "memory/edits": 1.0,
        "memory/ignored": 4.0,
        "memory/characters": 7.0,
    }
    (row,) = completions_rows([rows], TASK, text, 1, "rl")
    assert row["right"] and row["passes"] == 14 and row["memory"] == "done: 1"
    assert row["completion"].splitlines()[2] == "=16|8</think>1|68<eos>"
    assert [part["ended_by"] for part in row["segments"]] == ["delimiter", "delimiter", "end"]
    assert row["segments"][0]["context"] == "37+85+46=<think>"


def test_thoughts_are_measured_without_their_summaries():
    text, rows = by_hand("1+2<summary>write a 1</summary>", "=3</think>3<eos>")
    reference = tiny_model()
    reference.resize_token_embeddings(len(text.tokenizer), mean_resizing=False)
    nats = thought_nats(rows, text, reference)
    assert len(nats.nats) == len("1+2") + 1 + len("=3") + 1
    assert nats.rollouts.unique().tolist() == [0]
    assert mean_nats_of_rollouts(rows, text, reference)[0] == pytest.approx(float(nats.nats.mean()))


def test_solved_examples_are_told_in_segments_whose_summaries_note_the_last_step():
    phases = PHASES | {
        "thought": Phase(mode="fast", opened_by="<think>", max_tokens=12),
        "summary": Phase(opened_by="<summary>", closed_by="</summary>", max_tokens=24),
    }
    segments = SegmentSettings(max_segments=3, recent_tokens=5, memory_tokens=32)
    text = make_text(TASK.alphabet, phases, segments)
    example = Example("37+85+46+10=", "178", "37+85=122;122+46=168;168+10=178")
    told = [tuple(text.tokenizer.decode(ids) for ids in s) for s in text.example_segments(example)]
    assert told == [
        ("37+85+46+10=<think>", "37+85=122;<summary>write done 37+85=122</summary>"),
        (
            "37+85+46+10=<think><summary>done: 37+85=122</summary><think>=122;",
            "122+46=168;<summary>write done 122+46=168</summary>",
        ),
        (
            "37+85+46+10=<think><summary>done: 122+46=168</summary><think>=168;",
            "168+10=178</think>178<eos>",
        ),
    ]
    short = Example("1+2=", "3", "1+2=3")
    assert text.example_segments(short) == [text.example_ids(short)]
    segments.max_segments = 2
    assert len(text.example_segments(example)) == 2, "the last segment holds the rest"
    phases["summary"].max_tokens = 19
    message = "decoding.phases.summary.max_tokens must be at least 20 .*'write done 37.85=122'"
    with pytest.raises(ValueError, match=message):
        text.example_segments(example)


class Script(LogitsProcessor):
    """Makes a model write a summary, whatever its logits are."""

    def __init__(self, text, summary):
        self.opener = text.delimiter_id("<summary>")
        self.summary = text.tokenizer.encode(summary, add_special_tokens=False)
        self.marks = sorted(text.plan().marks)

    def __call__(self, input_ids, scores):
        scores[:, self.marks] = -torch.inf
        for row, ids in enumerate(input_ids.tolist()):
            last = max((i for i, token in enumerate(ids) if token == self.opener), default=None)
            written = len(self.summary) if last is None else len(ids) - 1 - last
            if self.summary[:written] == ids[len(ids) - written :] and written < len(self.summary):
                scores[row] = -torch.inf
                scores[row, self.summary[written]] = 0.0
        return scores


def test_generate_segments_reads_its_settings_from_the_checkpoint():
    model, script = tiny_model(), "write it 11\nwrote\ndelete w</summary>"
    phases = PHASES | {
        "summary": Phase(mode="slow", opened_by="<summary>", closed_by="</summary>"),
    }
    text = make_text(phases=phases)
    model.generation_config = generation_config(text, phases)
    ids = torch.tensor([text.prompt_ids("1=")])
    out = model.generate_segments(
        ids, tokenizer=text.tokenizer, max_new_tokens=40, max_segments=2,
        logits_processor=[Script(text, script)],
    )  # fmt: skip
    assert len(out.prompts) == 2, "the model closes its summary in the first segment"
    memory = out.memories[0]
    assert (memory.text, memory.num_edits, memory.num_ignored) == ("it: 11", 1, 2)
    written = text.tokenizer.decode(out.out.completion(0))
    thought = written.split("<summary>")[0]
    assert written == f"{thought}<summary>{script}"
    context = text.tokenizer.decode(out.prompts[1])
    recent = text.tokenizer.decode(text.tokenizer.encode(thought)[-3:])
    assert context == f"1=<think><summary>it: 11</summary><think>{recent}"
    plain = model.generate(ids, mtp_mode="slow", max_new_tokens=12)
    assert text.tokenizer.decode(plain[0]).startswith("1=<think>")


def test_generate_segments_refuses_what_cannot_be_done_before_any_pass(monkeypatch):
    model, ids = tiny_model(), torch.tensor([TEXT.prompt_ids("1=")])
    monkeypatch.setattr(type(model), "main_states", None)
    model.generation_config = generation_config(TEXT, PHASES)
    given = {"tokenizer": TEXT.tokenizer, "max_new_tokens": 9}
    with pytest.raises(ValueError, match="mtp_segments.max_segments must be at least 1, got 0"):
        model.generate_segments(ids, max_segments=0, **given)
    with pytest.raises(ValueError, match="does not support streamer"):
        model.generate_segments(ids, streamer=object(), **given)
    no_summary = {name: PHASES[name] for name in ("thought", "answer")}
    model.generation_config = generation_config(
        make_text(phases=no_summary, segments=SegmentSettings()), no_summary
    )
    with pytest.raises(ValueError, match="needs closed_by in one phase of generation_config.mtp_p"):
        model.generate_segments(ids, max_segments=2, **given)


def test_texts_that_cannot_have_a_memory_are_refused():
    tokenizer = character_tokenizer("0123456789", MARKS)
    with pytest.raises(ValueError, match=r"knows the characters of memory commands, but not \['w'"):
        PromptFormat(tokenizer, PHASES, 4, segments=SEGMENTS)
    decoding = DecodingConfig(phases=PHASES, segments=SEGMENTS, max_new_tokens=8)
    with pytest.raises(ValueError, match="decoding.max_new_tokens must be at least 9.* got 8"):
        decoding.sampler()
    decoding.max_new_tokens = 9
    assert decoding.sampler() == Sampler()


def prompt_of_segments(folder):
    """A prompt that the final model answers in several segments."""
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    return next(r["prompt"] for r in rows[::-1] if r["stage"] == "rl" and len(r["segments"]) > 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps whose thoughts are written in segments."""
    folder = tmp_path_factory.mktemp("segments") / "run"
    overrides = [
        "decoding=segments",
        "decoding.max_new_tokens=44",
        "decoding.temperature=1",
        "stages.main.steps=2",
        "stages.head.steps=0",
        "stages.joint.steps=2",
        "stages.rl.steps=2",
        "stages.rl.micro_batch_size=5",
        "stages.rl.rollouts.num_solved=2",
        "stages.rl.objective.main_ce.weight=0.1",
        "stages.rl.reward.pass_cost=0.01",
    ]
    return folder, train(config(folder, *overrides))


def test_a_run_in_segments_is_replayed_exactly_and_keeps_its_memories(run):
    folder, summary = run
    steps = [r for r in records(folder) if r["stage"] == "rl" and "reward" in r]
    assert len(steps) == 2
    for record in steps:
        assert record["segments"] > 1.1
        assert record["completions/forced_tokens"] > 0.1
        assert record["main/sampling_logp_difference_max"] < 1e-3
        assert record["head/sampling_logp_difference_max"] < 1e-3
    assert summary["stages"][-1]["segments"] > 1.5
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    for row in rows:
        assert len(row["completion"].split("</summary>")) >= len(row["segments"])
        assert row["memory"] == row["segments"][-1]["memory"]
        assert {part["ended_by"] for part in row["segments"][:-1]} <= {"budget", "delimiter"}
        for part in row["segments"][1:]:
            assert part["context"].startswith(row["prompt"] + "<think><summary>")
    assert max(len(row["segments"]) for row in rows) == 3


def test_generate_shows_segments_and_the_memory_between_them(run, capsys):
    folder, _ = run
    prompt = prompt_of_segments(folder)
    assert main(["generate", str(folder), prompt, "--mode", "fast"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{prompt} ")
    number = sum(line.startswith("memory: ") for line in lines) + 1
    assert number > 1
    assert f" and {number} segments, " in lines[-1]
    assert main(["generate", str(folder), prompt, "--max-segments", "1"]) == 0
    assert "memory" not in capsys.readouterr().out
    assert main(["generate", str(folder), prompt, "--max-segments", "0"]) == 2
    assert "max-segments must be at least 1, got 0" in capsys.readouterr().err


def test_an_export_writes_segments_where_mtp_is_not_installed(run, tmp_path):
    folder, prompt = run[0] / "export", prompt_of_segments(run[0])
    assert {"memory.py", "segments.py"} <= {path.name for path in folder.iterdir()}
    code = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})
ids = tokenizer("{prompt}<think>", return_tensors="pt").input_ids
out = model.generate_segments(ids, tokenizer=tokenizer)
print(out.prompts)
"""
    printed = run_alone(code, tmp_path)
    model, text = load_model(folder)
    assert text.segments == SegmentSettings(max_segments=3, recent_tokens=8, memory_tokens=32)
    ids = torch.tensor([text.prompt_ids(prompt)])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    out = model.generate_segments(ids, tokenizer=tokenizer)
    assert str(out.prompts) == printed.strip().splitlines()[-1]
    assert len(out.prompts) > 1
