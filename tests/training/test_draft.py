"""A drafter: the head learns what a frozen main writes; verified mode says what that is worth."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import EOS, GREEDY, HEADS, PAD, completions, config, records, run, tiny_model
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import mtp.stages.loop as stage_loop
from mtp.evaluation.evaluate import acceptance_by_slot
from mtp.evaluation.evaluate_search import evaluate_search
from mtp.hub.build import load_model, start_from_main
from mtp.modeling.branches import SearchConfig
from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.phases import Phase, PhasePlan
from mtp.modeling.sampler import Sampler
from mtp.reports.metrics import METRICS, measured
from mtp.reports.tables import print_table
from mtp.rollouts.new_tokenizers import character_tokenizer
from mtp.rollouts.prompt_format import PromptFormat
from mtp.rollouts.rollout import DecodingConfig
from mtp.tasks.continuation import ContinuationConfig
from mtp.tasks.running_sum import RunningSum
from mtp.trainer import train
from mtp.training.collate import collate_main_rollouts
from mtp.training.objectives.head_ce import HeadCE
from mtp.training.objectives.head_tv import HeadTV
from mtp.training.objectives.scored import replay_batch
from mtp.training.objectives.stream import StreamInputs

PLAN = PhasePlan(keep=[4], opened_by=[None], eos_ids=[EOS])
DRAFT = [
    "decoding=plain",
    "decoding.temperature=0",
    "decoding.max_new_tokens=12",
    "evaluation.verified=true",
    "head.type=parallel",
    "head.hidden_size=32",
    "model.config.tie_word_embeddings=true",
    "stages.main.steps=2",
    "stages.head.steps=0",
    "stages.joint.steps=0",
    "stages.rl.steps=2",
    "stages.rl.rollouts.mode=slow",
    "stages.rl.rollouts.group_size=1",
    "stages.rl.rollouts.num_minibatches=2",
    "stages.rl.rollouts.num_epochs=3",
    "stages.rl.rollouts.num_anchors=4",
    "stages.rl.train_main=false",
    "stages.rl.channel_gradient=0",
    "stages.rl.reward.pass_cost=0",
    "stages.rl.objective.policy.weight=0",
    "stages.rl.objective.reference_kl.weight=0",
    "stages.rl.objective.preserve.weight=0",
    "stages.rl.objective.head_ce.weight=1",
    "stages.rl.objective.head_ce.on_rollouts=true",
]


def test_acceptance_by_slot_by_hand():
    first = SimpleNamespace(accepted=torch.tensor([[0, 1, 2, 0], [0, 1, 0, 0]]))
    first.passes = torch.tensor([2, 3])
    second = SimpleNamespace(accepted=torch.tensor([[0, 1, 2, 3]]), passes=torch.tensor([5]))
    assert acceptance_by_slot([first, second], 4) == pytest.approx([0.3, 0.2, 0.1, 0.0])
    assert acceptance_by_slot([first], 1) == pytest.approx([0.4])


def test_a_head_that_learns_what_main_wrote_is_accepted_more_often():
    model = tiny_model(type="parallel", hidden_size=32)
    start_from_main(model)
    prompts = [[3 + i % 19, 3 + i * 7 % 19] for i in range(24)]
    slow = run(model, prompts, PLAN.as_slow(), GREEDY)
    before = run(model, prompts, PLAN.as_verified(4), GREEDY)
    optimizer = torch.optim.AdamW(model.mtp_head.parameters(), lr=3e-3)
    objective = HeadCE(weight=1.0, on_rollouts=True)
    advantages, rows = torch.zeros(len(prompts)), list(range(len(prompts)))
    for step in range(80):
        batch = collate_main_rollouts(
            prompts, slow, advantages, rows, PLAN, 4, PAD, num_anchors=8,
            anchor_seed=step,
        )  # fmt: skip
        scored = replay_batch(model, batch, channel_gradient=0.0, use_head=True)
        loss = objective.terms(StreamInputs(scored, batch))["head_ce"].total / len(batch.head)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = run(model, prompts, PLAN.as_verified(4), GREEDY)
    assert completions(after) == completions(before) == completions(slow), "no text changes"
    assert float(after.passes.sum()) < 0.8 * float(before.passes.sum())
    learned, fresh = acceptance_by_slot([after], 3), acceptance_by_slot([before], 3)
    assert all(a > b for a, b in zip(learned, fresh, strict=True))
    assert learned[0] > 0.4


@pytest.mark.parametrize("stream", [HeadCE(weight=1.0, on_rollouts=True), HeadTV(weight=1.0)])
def test_a_head_that_learns_from_verified_rollouts_makes_them_shorter(stream):
    """Sampled at temperature 1; main stays as it is, so texts keep their distribution."""
    model = tiny_model(type="parallel", hidden_size=32)
    start_from_main(model)
    with torch.no_grad():
        model.lm_head.weight *= 2  # main is surer, so that there is something to learn
    prompts = [[3 + i % 19, 3 + i * 7 % 19] for i in range(64)]
    plan, sampler = PLAN.as_verified(4), Sampler()
    optimizer = torch.optim.AdamW(model.mtp_head.parameters(), lr=3e-3)
    advantages, rows, speed = torch.zeros(len(prompts)), list(range(len(prompts))), []
    for step in range(40):
        out = run(model, prompts, plan, sampler, seed=step)
        speed.append(float(out.lengths.sum() / out.passes.sum()))
        batch = collate_main_rollouts(
            prompts, out, advantages, rows, plan, 4, PAD, num_anchors=8, anchor_seed=step
        )
        scored = replay_batch(model, batch, channel_gradient=0.0, use_head=True)
        term = next(iter(stream.terms(StreamInputs(scored, batch, sampler)).values()))
        optimizer.zero_grad()
        (term.total / len(batch.head)).backward()
        optimizer.step()
    assert sum(speed[-8:]) > 1.05 * sum(speed[:8])


def test_anchors_of_slow_rollouts_are_drawn_or_begin_blocks():
    model = tiny_model()
    prompts = [[5, 6, 7], [8]]
    out = run(model, prompts, PLAN.as_slow(), GREEDY, max_new_tokens=12)
    given = (prompts, out, torch.zeros(2), [0, 1], PLAN, 4, PAD)
    every = collate_main_rollouts(*given)
    drawn = collate_main_rollouts(*given, num_anchors=3)
    blocks = collate_main_rollouts(*given, block_anchors=True)
    time = every.tokens.shape[1]
    assert (drawn.anchors // time).bincount().tolist() == [3, 3]
    assert set(drawn.anchors.tolist()) < set(every.anchors.tolist())
    assert torch.equal(drawn.main.positions, every.main.positions)
    longest = int(out.lengths[0])
    assert blocks.anchors[blocks.anchors < time].tolist() == list(range(2, 1 + longest, 4))


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_is_added_to_a_pretrained_main_is_drawn_at_random(tmp_path, head):
    expected = tiny_model(type=head)
    stock = LlamaForCausalLM(LlamaConfig(**expected.config.to_dict()))
    stock.save_pretrained(tmp_path)
    model = type(expected).from_pretrained(tmp_path, config=expected.config, new_head=True)
    for name, weight in expected.mtp_head.named_parameters():
        mine = model.mtp_head.get_parameter(name)
        if weight.ndim == 1:
            assert torch.equal(mine, weight), name
        else:
            assert 0.5 < float((mine.std() / weight.std()).detach()) < 2, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_head_of_mains_width_proposes_mains_own_token_in_every_slot(dtype):
    model = tiny_model(type="parallel", hidden_size=32, tied=True)
    with torch.no_grad():
        model.model.norm.weight.mul_(3.0)
    start_from_main(model)
    model = model.to(dtype)
    ids = torch.tensor([[5, 9, 14, 7, 3]])
    rows = model.replay(ids, torch.arange(5), torch.zeros(5, 3, dtype=torch.long))
    output = rows.head_output
    main, head = output.logits(rows.main_hidden[0]), output.logits(rows.head_hidden)
    assert torch.equal(head.argmax(-1), main.argmax(-1)[:, None].expand(5, 3))
    size = float(head.detach().float().std() / main.detach().float().std())
    assert 0.5 < size < 2, "as sure as main is"


@pytest.mark.parametrize(
    "head",
    [
        {"type": "eavesdrop", "hidden_size": 32, "tied": True},
        {"type": "parallel", "hidden_size": 16},
        {"type": "parallel", "hidden_size": 32, "shared_embeddings": False},
        {"type": "parallel", "hidden_size": 32, "taps": [1, 2]},
    ],
    ids=["eavesdrop", "narrow", "own matrices", "last layer unheard"],
)
def test_other_heads_stay_as_they_were_drawn(head):
    model, same = tiny_model(**head), tiny_model(**head)
    start_from_main(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, same.state_dict()[name]), name


def plain_text(**given) -> PromptFormat:
    tokenizer = character_tokenizer("ab", [])
    tokenizer.chat_template = "{% for message in messages %}b{{ message['content'] }}b{% endfor %}"
    return PromptFormat(tokenizer, {"text": Phase(mode="verified")}, 4, **given)


def test_prompts_are_given_as_they_are_without_the_template():
    def said(text):
        return text.tokenizer.decode(text.prompt_ids("aa"))

    assert said(plain_text()) == "baab"
    raw = plain_text(chat_template=False)
    assert said(raw) == "aa"
    assert raw.conversation_ids([{"content": "b"}, {"content": "a"}]) == raw.prompt_ids("a")


def test_a_system_prompt_needs_the_template():
    phases = {"text": Phase(mode="verified")}
    with pytest.raises(ValueError, match="decoding.system_prompt needs decoding.chat_template=tr"):
        DecodingConfig(phases=phases, system_prompt="", chat_template=False).sampler()


@pytest.fixture
def unverified(monkeypatch):
    """The task of the tiny run without right and wrong."""
    monkeypatch.setattr(RunningSum, "has_verifier", False)


def test_a_run_trains_a_drafter_and_reports_verified_mode(
    tmp_path, unverified, monkeypatch, capsys
):
    updates = []

    def counted(fabric, model, optimizers, batches, *rest, **named):
        updates.append((sorted(optimizers), sum(len(batch.anchors) for batch in batches)))
        return original(fabric, model, optimizers, batches, *rest, **named)

    original = stage_loop.update
    monkeypatch.setattr(stage_loop, "update", counted)
    summary = train(config(tmp_path, *DRAFT))
    first, last = summary["stages"]
    assert [names for names, _ in updates[:2]] == [["main"]] * 2
    assert len(updates) == 2 + 2 * 3 * 2, "steps, epochs and minibatches"
    assert all(names == ["head"] and 0 < number <= 2 * 4 for names, number in updates[2:])
    assert first["acceptance_by_slot"] is None and first["verified_passes"] is None
    assert len(last["acceptance_by_slot"]) == 5
    # The last pass of a row may end at a draft, without a token of main's after it.
    most, of_last = 1 + sum(last["acceptance_by_slot"]), 1 / last["verified_passes"]
    assert most - of_last - 1e-6 <= last["verified_tokens_per_pass"] <= most + 1e-6
    assert last["verified_passes"] <= last["slow_passes"]
    assert last["slow_accuracy"] is last["fast_accuracy"] is last["empty_thought_accuracy"] is None
    assert json.loads((tmp_path / "summary.json").read_text()) == summary

    found = records(tmp_path)
    assert found[-1]["eval/acceptance_by_slot"] == last["acceptance_by_slot"]
    assert "loss/head_ce" in found[-2] and "completions/clipped_ratio" in found[-2]
    assert not any("reward" in record for record in found)
    shown = capsys.readouterr().out
    assert "accepted by slot" in shown
    assert not [word for word in ("warning", "right", "wrong", " acc.") if word in shown]

    card = (tmp_path / "export" / "README.md").read_text()
    assert "Accepted by slot: share of the passes" in card and "slow acc." not in card
    _, text = load_model(tmp_path / "export")
    assert not text.chat_template and text.phases["text"].mode == "verified"


def test_a_run_learns_by_rl_from_verified_rollouts(tmp_path):
    changes = {
        "stages.rl.rollouts.mode": "verified",
        "stages.rl.rollouts.group_size": "4",
        "stages.rl.train_main": "true",
        "stages.rl.objective.policy.weight": "1",
        "stages.rl.objective.head_ce.weight": "0",
        "decoding.temperature": "1",
    }
    kept = [one for one in DRAFT if one.partition("=")[0] not in changes]
    given = [f"{name}={value}" for name, value in changes.items()]
    train(
        config(
            tmp_path,
            *kept,
            *given,
            "stages.rl.rollouts.num_minibatches=1",
            "stages.rl.rollouts.num_epochs=1",
            "stages.rl.objective.policy.head_weight=0",
            "stages.rl.objective.head_tv.weight=1",
        )
    )
    steps = [one for one in records(tmp_path) if "loss/head_tv" in one]
    assert len(steps) == 2
    for step in steps:
        # The sampler's log-probability of each token, drafts included, is main's in replay.
        assert step["main/sampling_logp_difference_max"] < 1e-4
        assert 0 < step["head/acceptance"] < 1
        assert step["loss/head_tv"] == pytest.approx(1 - step["head/acceptance"], abs=1e-5)
        assert step["passes"] < step["completions/mean_length"]


def test_outcomes_that_nobody_verifies_are_no_reward(tmp_path, unverified):
    for setting in ("objective.policy.weight=1", "rollouts.drop_uninformative=true"):
        with pytest.raises(ValueError, match=rf"stages.rl.{setting.partition('=')[0]} needs answ"):
            more = ["stages.rl.rollouts.group_size=2", "decoding.temperature=1"]
            train(config(tmp_path, *DRAFT, *more, f"stages.rl.{setting}"))


def test_a_search_cannot_be_measured_without_right_answers():
    task, text, model = ContinuationConfig().build(), plain_text(), tiny_model()
    given = {"mode": "fast", "scorer": "logprob", "num_problems": 1}
    with pytest.raises(ValueError, match="task continuation has none; evaluate without --search"):
        evaluate_search(
            model,
            text,
            task,
            SearchConfig(),
            DecodeOptions(max_new_tokens=4),
            batch_size=1,
            **given,
        )


def test_a_table_has_the_metrics_that_were_measured():
    stage = {"name": "a", "num_problems": 2, "seconds": 1.0, "slow_passes": 3.0}
    stage |= {name: None for name in METRICS if name not in stage}
    assert [metric.name for metric in measured("run", [stage])] == ["slow_passes", "seconds"]
    with_verified = stage | {
        "verified_passes": 40.0,
        "verified_tokens_per_pass": 2.345,
        "acceptance_by_slot": [0.5, 0.25],
    }
    assert METRICS["acceptance_by_slot"] in measured("run", [stage, with_verified])
    console = Console(file=io.StringIO(), width=100)
    print_table(
        console, {"stages": [stage, with_verified], "seed": 1, "seconds": 2.0, "export": "out"}
    )
    shown = console.file.getvalue()
    assert "0.50 0.25" in shown and "2.35" in shown and "40.0" in shown
    assert "…" not in shown and METRICS["acceptance_by_slot"].cell(None) == "-"
