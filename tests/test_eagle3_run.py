"""A run with the EAGLE-3 head: all stages, resuming, and its draft models."""

import json
import math
import os
import signal

import pytest
import torch
from eagle import logits_of_head, plain_logits, states_of_main
from helpers import config, records

from mtp.cli.opening import open_run
from mtp.hub.export import export
from mtp.trainer import Interrupted, train

NUM_DRAFTS = 13
"""Size of the draft vocabulary: delimiters, the end token, then what solutions use most."""
SETTINGS = [
    "head=tiny_eagle3",
    "head.hidden_size=32",
    "head.intermediate_size=48",
    f"head.options.draft_vocab_size={NUM_DRAFTS}",
    "task.num_terms=2",
    "decoding.max_new_tokens=24",
    "evaluation.verified=true",
    "evaluation.num_problems=16",
    "stages.main.steps=30",
    "stages.main.optimizers.main.lr=1e-2",
    "stages.main.examples.batch_size=32",
    "stages.head.steps=40",
    "stages.head.optimizers.head.lr=1e-2",
    "stages.head.examples.batch_size=16",
    "stages.joint.steps=15",
    "stages.joint.stop_accuracy=0",
    "stages.joint.examples.batch_size=16",
    "stages.rl.steps=3",
    *(f"stages.{stage}.evaluate_every=0" for stage in ("main", "head", "joint", "rl")),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the summary of a run that was interrupted in RL and resumed."""
    import mtp.stages.loop as stage_loop

    folder = tmp_path_factory.mktemp("eagle3") / "run"
    original = stage_loop.step_batches

    def stop_after_one_step(run, stage_run, step):
        if stage_run.name == "rl" and step == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return original(run, stage_run, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_loop, "step_batches", stop_after_one_step)
        with pytest.raises(Interrupted, match="stage rl after step 1 of 3"):
            train(config(folder, *SETTINGS))
    return folder, train(config(folder, "resume=true", *SETTINGS))


def losses(folder, stage, name):
    return [r[name] for r in records(folder) if r["stage"] == stage and name in r]


def test_the_head_learns_what_it_can_write(finished):
    folder, summary = finished
    found = losses(folder, "head", "loss/head_ce")
    assert math.isclose(found[0], math.log(NUM_DRAFTS), rel_tol=0.5)
    assert sum(found[-5:]) / 5 < 0.75 * found[0]
    joint = losses(folder, "joint", "loss/head_ce")
    assert sum(joint[-5:]) / 5 < 0.7 * found[0]
    # Main accepts the first draft more often than a guess among the drafts would be.
    for stage in summary["stages"][1:]:
        assert stage["acceptance_by_slot"][0] > 2 / NUM_DRAFTS, stage["name"]
    outside = losses(folder, "head", "num_tokens/outside_draft_vocabulary")
    assert all(number > 0 for number in outside)


def test_rollouts_and_replay_agree_in_rl(finished):
    folder, _ = finished
    steps = [r for r in records(folder) if r["stage"] == "rl" and "policy_head" in str(r)]
    assert [r["step"] for r in steps] == [1, 2, 3]
    for record in steps:
        assert record["num_tokens/policy_head"] > 0
        assert record["num_tokens/reference_kl_head"] == record["num_tokens/policy_head"]
        for emitter in ("main", "head"):
            assert record[f"{emitter}/sampling_logp_difference_max"] < 1e-4


@pytest.mark.parametrize("format", ["speculators", "eagle3"])
@torch.no_grad()
def test_the_draft_model_of_the_run_gives_the_logits_of_its_head(finished, tmp_path, format):
    folder, summary = finished
    opened = open_run(folder, None)
    model, fmt = opened.load("cpu")
    drafts = model.mtp_head.draft_tokens.tolist()
    assert len(drafts) == NUM_DRAFTS and fmt.plan().marks <= set(drafts)
    for name in (format, "main"):
        export(model, fmt, tmp_path / name, summary, opened.config, name)
    written = json.loads((tmp_path / format / "config.json").read_text())
    assert written["draft_vocab_size"] == NUM_DRAFTS
    ids = fmt.tokenizer.encode("12+34=12;46", add_special_tokens=False)
    text, block = ids[:6], ids[6:11]
    hidden, embed = states_of_main(tmp_path / "main", model.mtp_taps, text)
    found = plain_logits(tmp_path / format, hidden, embed, text, block)
    expected = logits_of_head(model, text, block)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
