"""A head from a file outside the package: registered, trained, decoded, saved and opened again."""

import runpy

import pytest
import torch
from attending_head import AttendingHead
from helpers import CLOSE, EOS, PAD, PLAN, completions, run, run_alone, tiny_model
from torch.nn import functional as F
from transformers import GenerationConfig

from mtp.hub.formats.huggingface import write_code
from mtp.hub.outside_head import outside_head
from mtp.modeling.heads import HEADS, HeadConfig, register_head
from mtp.modeling.sampler import Sampler
from mtp.training.collate import collate_rollouts
from mtp.training.objectives.scored import replay_batch

PHASES = [{"name": "text", "mode": "fast", "opened_by": None}]
PROMPTS = [[5, 9, 14], [7], [3, 8, 5, 11, 6]]


@pytest.fixture(autouse=True)
def registered():
    register_head("attending", AttendingHead)
    yield
    del HEADS["attending"]


def model_with(**settings):
    return tiny_model(type="attending", **settings)


def losses(model, steps):
    """The head's cross-entropy in a few steps on texts that count upwards, main trained along."""
    texts = (torch.arange(4)[:, None] * 5 + torch.arange(16)) % 20 + 3
    width = model.block_size
    windows = texts[:, 1:].unfold(1, width, 1)  # [B, T - width, K + 1]: t_0..t_K of each anchor
    anchors = (torch.arange(4)[:, None] * 16 + torch.arange(16 - width)).flatten()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    found = []
    for _ in range(steps):
        rows = model.replay(texts, anchors, windows[..., :-1].flatten(0, 1))
        main = rows.main_output.logits(rows.main_hidden[:, :-1])
        head = rows.head_output.logits(rows.head_hidden)
        head_loss = F.cross_entropy(head.flatten(0, 1), windows[..., 1:].flatten())
        optimizer.zero_grad()
        (head_loss + F.cross_entropy(main.flatten(0, 1), texts[:, 1:].flatten())).backward()
        optimizer.step()
        found.append(float(head_loss.detach()))
    return found


def block_by_definition(model, context, keep):
    """One greedy block without a cache: one row, the head recomputed at every slot."""
    text, anchor = torch.tensor([context]), torch.tensor([len(context) - 1])
    hidden, taps = model.main_hidden(text)
    main, head = model.output_layers()
    block = [int(main.logits(hidden[0, -1]).argmax())]
    for slot in range(model.block_size - 1):
        remembered = model.head_context(taps, text, anchor)
        rows = model.mtp_head(remembered, model.head_embed(torch.tensor([block])))
        block.append(int(head.logits(rows[0, slot]).argmax()))
    ends = [at + 1 for at, token in enumerate(block) if token in (CLOSE, EOS)]
    return block[: min([keep, *ends])]


def test_a_few_steps_teach_it():
    found = losses(model_with(), 60)
    assert found[-1] < found[0] / 4


@pytest.mark.parametrize("steps", [0, 10])
def test_fast_mode_is_its_definition(steps):
    model = model_with()
    losses(model, steps)
    out = run(model, PROMPTS, PLAN, max_new_tokens=20)
    with torch.no_grad():
        for row, prompt in enumerate(PROMPTS):
            context, phase, passes = list(prompt), 0, 0
            while len(context) - len(prompt) < 20 and context[-1] != EOS:
                context += block_by_definition(model, context, PLAN.keep[phase])
                passes += 1
                phase = 1 if context[-1] == CLOSE else phase
            assert completions(out)[row] == context[len(prompt) :][:20]
            assert int(out.passes[row]) == passes


@pytest.mark.parametrize("steps", [0, 10])
@pytest.mark.parametrize("mode", ["fast", "verified"])
def test_sampler_and_replay_of_a_head_that_remembers_agree(mode, steps):
    model = model_with()
    losses(model, steps)
    plan = PLAN if mode == "fast" else PLAN.as_verified(4)
    out = run(model, PROMPTS * 3, plan, Sampler(), max_new_tokens=20)
    batch = collate_rollouts(
        PROMPTS * 3, out, torch.zeros(len(out.tokens)), list(range(len(out.tokens))), 4, PAD
    )
    scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
    stats = scored.stats(Sampler())
    torch.testing.assert_close(stats["main"].logprob, batch.main.sampled, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(stats["head"].logprob, batch.head.sampled, atol=1e-4, rtol=1e-4)
    assert (len(batch.head) > 5) == (mode == "fast")


def test_rejected_drafts_are_forgotten():
    """Greedy verified text is slow text, whatever the head remembers of drafts."""
    model = model_with()
    slow = run(model, PROMPTS, PLAN.as_slow(), max_new_tokens=20)
    verified = run(model, PROMPTS, PLAN.as_verified(4), max_new_tokens=20)
    assert completions(slow) == completions(verified)


def test_the_context_does_not_depend_on_passes():
    model = model_with()
    tokens = torch.randint(3, 20, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, taps = model.main_hidden(tokens)
        expected = model.head_context(taps, tokens, torch.tensor([6, 9 + 6]))[0]
        kept = []

        def remember(layer, keys, values):
            kept.append((keys, values))
            return tuple(torch.cat(parts, 2) for parts in zip(*kept, strict=True))

        for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
            observed = model.mtp_head.observe(
                list(taps[:, part].unbind(2)),
                tokens[:, part],
                torch.full((2,), part.start),
                model.head_embed,
                remember,
            )
        found = model.mtp_head.context(observed, torch.tensor([1, 1]), torch.tensor([6, 6]))[0]
    torch.testing.assert_close(found, expected)


def test_it_is_saved_and_opened_with_its_options(tmp_path):
    model = model_with(options={"num_heads": 4})
    assert model.mtp_head.num_heads == 4
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path)
    assert opened.config.mtp["options"] == {"num_heads": 4}
    assert completions(run(opened, PROMPTS, PLAN, max_new_tokens=12)) == completions(
        run(model, PROMPTS, PLAN, max_new_tokens=12)
    )


def test_an_export_carries_its_file(tmp_path):
    """It opens with its head where mtp is not installed, and so does what is saved from there."""
    model = model_with()
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    model.generation_config.mtp_phases = PHASES
    model.save_pretrained(tmp_path / "export")
    write_code(model, tmp_path / "export")
    fast = model.generate(torch.tensor([PROMPTS[0]]), mtp_mode="fast", max_new_tokens=12)
    script = f"""
import torch
from transformers import AutoModelForCausalLM
folder = {str(tmp_path)!r}
for name in ("export", "again"):
    model = AutoModelForCausalLM.from_pretrained(f"{{folder}}/{{name}}", trust_remote_code=True)
    ids = torch.tensor([{PROMPTS[0]}])
    print(type(model.mtp_head).__name__, model.generate(ids, mtp_mode="fast", max_new_tokens=12))
    model.save_pretrained(f"{{folder}}/again")
"""
    (tmp_path / "cache").mkdir()
    got = run_alone(script, tmp_path / "cache").strip().splitlines()
    assert got == [f"AttendingHead {fast}"] * 2


def test_a_file_that_an_export_cannot_carry_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "wide_head.py"
    head = "from mtp.modeling.heads import ParallelHead\nclass WideHead(ParallelHead): pass\n"
    for line in ("import mtp.run", "from mtp import run", "from .near import x"):
        file.write_text(f"{head}def later():\n    {line}\n")
        wide = runpy.run_path(str(file), run_name="wide_head")["WideHead"]
        monkeypatch.setitem(HEADS, "wide", wide)
        monkeypatch.setattr("inspect.getsourcefile", lambda _: str(file))
        with pytest.raises(ValueError, match=f"head.type=wide: .* got '{line}' in"):
            outside_head("wide")
    file.unlink()
    with pytest.raises(ValueError, match="head.type=wide: .* define the class in a file"):
        outside_head("wide")
    assert outside_head("parallel") is None


def test_mistakes_are_named():
    HeadConfig(type="attending", options={"num_heads": 1}).validate()
    with pytest.raises(ValueError, match=r"head.options .* \(num_heads\), got colour; remove"):
        HeadConfig(type="attending", options={"colour": 1}).validate()
    with pytest.raises(ValueError, match=r"head.type=eavesdrop \(it has none\), got num_heads"):
        HeadConfig(options={"num_heads": 1}).validate()
    with pytest.raises(ValueError, match="'parallel' is ParallelHead already"):
        register_head("parallel", AttendingHead)
    assert "options" not in HeadConfig().to_checkpoint()
