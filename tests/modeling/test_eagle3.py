"""The EAGLE-3 head: decoding, replay, draft vocabulary, training, files."""

import pytest
import torch
from eagle import eagle_model
from helpers import CLOSE, DRAFT, EOS, PAD, PLAN, VOCABULARY, completions, run
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaForCausalLM

from mtp.modeling.cache import BlockCache
from mtp.modeling.heads import HeadConfig
from mtp.modeling.modeling_mtp import family_class
from mtp.modeling.output_layer import OutputLayer
from mtp.modeling.records import pad
from mtp.modeling.sampler import Sampler
from mtp.training.batch import within_draft_vocabulary
from mtp.training.collate import collate_rollouts, collate_text
from mtp.training.objectives.head_ce import HeadCE
from mtp.training.objectives.head_kl import HeadKL
from mtp.training.objectives.scored import replay_batch
from mtp.training.objectives.stream import StreamInputs

PROMPTS = [[5, 9, 14], [7], [3, 8, 5, 11, 6]]
KINDS = {
    "whole": {},
    "own matrices": {"shared_embeddings": False, "width": 16},
    "drafts": {"drafts": DRAFT},
    "drafts, own matrices": {"drafts": DRAFT, "shared_embeddings": False, "width": 16},
}


def trained(steps=25, **settings):
    """A model after a few steps on texts that count upwards, and the head's loss at each step."""
    model = eagle_model(**settings)
    texts = (torch.arange(4)[:, None] * 5 + torch.arange(16)) % 20 + 3
    batch = collate_text(
        [(row[:1], row[1:]) for row in texts.tolist()], PLAN_FAST, model.block_size, PAD
    )
    batch = within_draft_vocabulary(batch, model.mtp_head.draft_tokens)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    found = []
    for _ in range(steps):
        scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
        head = scored.head.cross_entropy().loss / len(batch.head)
        main = scored.main.cross_entropy().loss / len(batch.main)
        optimizer.zero_grad()
        (head + main).backward()
        optimizer.step()
        found.append(float(head.detach()))
    return model, found


PLAN_FAST = PLAN.__class__(keep=[4], opened_by=[None], eos_ids=[EOS])


def drafts_by_definition(model, context, first):
    """The head's greedy tokens after `first`: one row, no cache, all computed anew per slot."""
    text, anchor = torch.tensor([context]), torch.tensor([len(context) - 1])
    _, taps = model.main_hidden(text)
    head, block = model.output_layers()[1], [first]
    for slot in range(model.block_size - 1):
        rows = model.mtp_head(
            model.head_context(taps, text, anchor), model.head_embed(torch.tensor([block]))
        )
        block.append(int(head.logits(rows[0, slot]).argmax()))
    return block[1:]


def main_greedy(model, context):
    hidden, _ = model.main_hidden(torch.tensor([context]))
    return int(model.output_layers()[0].logits(hidden[0, -1]).argmax())


@pytest.mark.parametrize("kind", KINDS)
def test_training_unrolls_the_slots_and_lowers_the_loss(kind):
    model, found = trained(40, **KINDS[kind])
    assert found[-1] < found[0] / 3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_all_slots_at_once_are_the_slots_one_by_one(kind):
    """`forward` in training gives the rows of `step` in decoding, whatever texts anchors are of."""
    model = eagle_model(**KINDS[kind])
    tokens = torch.randint(3, 20, (3, 9), generator=torch.Generator().manual_seed(1))
    _, taps = model.main_hidden(tokens)
    anchors = torch.tensor([2, 20, 9, 3, 26, 0, 8])  # of texts 0, 2, 1, 0, 2, 0, 0
    block = torch.randint(3, 20, (7, 3), generator=torch.Generator().manual_seed(2))
    rows = model.mtp_head(model.head_context(taps, tokens, anchors), model.head_embed(block))
    for number, anchor in enumerate(anchors.tolist()):
        text = slice(anchor // 9, anchor // 9 + 1), slice(0, anchor % 9 + 1)
        context = model.head_context(taps[text], tokens[text], torch.tensor([anchor % 9]))
        state, own = None, context[:4]
        for slot in range(3):
            embeds = model.head_embed(block[number : number + 1, slot : slot + 1])
            one, state = model.mtp_head.step(own, embeds, slot, state)
            torch.testing.assert_close(one[0, 0], rows[number, slot], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 10])
def test_fast_mode_is_its_definition(kind, steps):
    model, _ = trained(steps, **KINDS[kind])
    out = run(model, PROMPTS, PLAN, max_new_tokens=20)
    with torch.no_grad():
        for row, prompt in enumerate(PROMPTS):
            context, phase, passes = list(prompt), 0, 0
            while len(context) - len(prompt) < 20 and context[-1] != EOS:
                first = main_greedy(model, context)
                block = [first, *drafts_by_definition(model, context, first)]
                ends = [at + 1 for at, token in enumerate(block) if token in (CLOSE, EOS)]
                context += block[: min([PLAN.keep[phase], *ends])]
                passes += 1
                phase = 1 if context[-1] == CLOSE else phase
            assert completions(out)[row] == context[len(prompt) :][:20]
            assert int(out.passes[row]) == passes


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=0.7, top_k=6, top_p=0.9)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["fast", "verified"])
def test_sampler_and_replay_agree(mode, kind, sampler):
    model, _ = trained(5, **KINDS[kind])
    plan = PLAN if mode == "fast" else PLAN.as_verified(4)
    is_static = sampler.top_k > 0  # either kind of cache
    out = run(model, PROMPTS * 3, plan, sampler, max_new_tokens=20, static_cache=is_static)
    batch = collate_rollouts(
        PROMPTS * 3, out, torch.zeros(len(out.tokens)), list(range(len(out.tokens))), 4, PAD
    )
    scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
    stats = scored.stats(sampler)
    for name, rows in (("main", batch.main), ("head", batch.head)):
        torch.testing.assert_close(stats[name].logprob, rows.sampled, atol=1e-4, rtol=1e-4)
        assert bool(stats[name].entropy.isfinite().all())
    assert (len(batch.head) > 5) == (mode == "fast")
    if "drafts" in kind:
        assert set(batch.head.targets.tolist()) <= set(DRAFT)


@pytest.mark.parametrize("impl", ["reference", None])
def test_tokens_of_the_kernel_are_ids_of_the_vocabulary(impl):
    model, _ = trained(5, drafts=DRAFT)
    plain = run(model, PROMPTS, PLAN, max_new_tokens=20)
    assert completions(run(model, PROMPTS, PLAN, max_new_tokens=20, impl=impl)) == completions(
        plain
    )
    out = run(model, PROMPTS * 4, PLAN, Sampler(), max_new_tokens=20, impl=impl)
    assert set(out.tokens[out.slots > 0].tolist()) <= set(DRAFT)
    verified = run(model, PROMPTS, PLAN.as_verified(4), max_new_tokens=20, impl=impl)
    slow = run(model, PROMPTS, PLAN.as_slow(), max_new_tokens=20)
    assert completions(verified) == completions(slow)


@pytest.mark.parametrize("kind", KINDS)
def test_rejected_drafts_leave_no_trace(kind):
    """Each pass of verified mode proposes what a head proposes that has never seen a draft."""
    model, _ = trained(12, **KINDS[kind])
    out = run(model, PROMPTS, PLAN_FAST.as_verified(4), max_new_tokens=24)
    some_are_rejected = some_are_accepted = False
    with torch.no_grad():
        for row, prompt in enumerate(PROMPTS):
            context, accepted, drafts, passes = list(prompt), [], [], 0
            while len(accepted) < 24 and (len(accepted) == 0 or context[-1] != EOS):
                passes += 1
                kept = 0
                while kept < len(drafts) and drafts[kept] == main_greedy(model, context):
                    context.append(drafts[kept])
                    kept += 1
                    accepted.append(kept)
                some_are_accepted |= kept > 0
                some_are_rejected |= kept < len(drafts)
                if len(accepted) >= 24 or context[-1] == EOS:
                    break
                anchor = list(context)
                context.append(main_greedy(model, context))
                accepted.append(0)
                drafts = drafts_by_definition(model, anchor, context[-1])
                drafts = drafts[: 24 - len(accepted)]
                if EOS in drafts:
                    drafts = drafts[: drafts.index(EOS) + 1]
            length = int(out.lengths[row])
            assert completions(out)[row] == context[len(prompt) :]
            assert out.accepted[row, :length].tolist() == accepted
            assert int(out.passes[row]) == passes
    assert some_are_accepted and some_are_rejected


@torch.no_grad()
def test_the_context_does_not_depend_on_passes_and_drafts():
    model = eagle_model(drafts=DRAFT)
    tokens = torch.randint(3, 20, (2, 9), generator=torch.Generator().manual_seed(1))
    _, taps = model.main_hidden(tokens)
    expected = model.head_context(taps, tokens, torch.tensor([6, 9 + 6]))
    cache, head = BlockCache(0, 2, 12, num_head_layers=2), model.mtp_head

    def remember(layer, keys, values):
        return cache.head_layers[layer].update(keys, values)

    drafts = torch.full((2, 2), 7)
    wrong = model.main_hidden(torch.cat([tokens[:, :4], drafts], 1))[1][:, 4:]
    for start, part, seen in (
        (0, tokens[:, :4], taps[:, :4]),
        (4, drafts, wrong),
        (4, tokens[:, 4:5], taps[:, 4:5]),
        (5, tokens[:, 5:], taps[:, 5:]),
    ):
        starts = torch.full((2,), start)
        cache.place(starts[:, None] + torch.arange(part.shape[1]), start + part.shape[1], True)
        observed = head.observe(list(seen.unbind(2)), part, starts, model.head_embed, remember)
    found = head.context(observed, torch.tensor([1, 1]), torch.tensor([6, 6]))
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(found[2:], expected[2:4], strict=True):
        torch.testing.assert_close(ours[:, :, 1:7], theirs[:, :, 1:7])


def test_a_closed_channel_gives_main_no_gradient():
    model = eagle_model()
    batch = collate_text([(PROMPTS[0], [4, 5, 6, 7, 8])], PLAN_FAST, 4, PAD)
    for scale in (0.0, 1.0):
        model.zero_grad()
        scored = replay_batch(model, batch, channel_gradient=scale, use_head=True)
        scored.head.cross_entropy().loss.backward()
        reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert {n for n, _ in model.mtp_head.named_parameters(prefix="mtp_head")} <= reached
        assert ("model.embed_tokens.weight" in reached) == (scale > 0)
        assert ("model.layers.0.mlp.up_proj.weight" in reached) == (scale > 0)
        assert ("lm_head.weight" in reached) == (scale > 0)


# The draft vocabulary.


def test_the_mapping_is_exact():
    model = eagle_model(drafts=DRAFT)
    head, output = model.mtp_head, model.output_layers()[1]
    assert head.draft_tokens.tolist() == DRAFT
    assert (head.d2t + torch.arange(len(DRAFT))).tolist() == DRAFT
    assert head.t2d.nonzero()[:, 0].tolist() == DRAFT
    assert head.d2t.dtype == torch.int64 and head.t2d.dtype == torch.bool
    ids = torch.arange(VOCABULARY)
    assert ids[output.has_row(ids)].tolist() == DRAFT
    assert output.rows_of(torch.tensor(DRAFT)).tolist() == list(range(len(DRAFT)))
    assert output.ids_of(torch.arange(len(DRAFT))).tolist() == DRAFT
    hidden = torch.randn(2, 32)
    logits = output.logits(hidden)
    assert torch.equal(logits[:, DRAFT], hidden @ head.lm_head.weight.T)
    assert bool((logits[:, ~head.t2d] == -torch.inf).all())


def test_losses_leave_out_tokens_that_the_head_cannot_write():
    model = eagle_model(drafts=DRAFT)
    samples = [([5, 6], [7, 8, 9, 10, CLOSE, 11, EOS]), ([3], [4, 5])]
    whole = collate_text(samples, PLAN, 4, PAD)
    batch = within_draft_vocabulary(whole, model.mtp_head.draft_tokens)
    targets = batch.head.targets.tolist()
    assert targets == [t for t in whole.head.targets.tolist() if t in DRAFT]
    assert 0 < len(targets) < len(whole.head.targets)
    scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
    inputs = StreamInputs(scored, batch)
    rows = [DRAFT.index(token) for token in targets]
    log_p = (scored.head.hidden @ model.mtp_head.lm_head.weight.T).log_softmax(-1)
    ce = HeadCE(weight=1.0)
    term = ce.terms(inputs)["head_ce"]
    torch.testing.assert_close(term.total, -log_p[range(len(rows)), rows].sum())
    assert ce.counts(batch) == {"head_ce": len(rows)}
    right = sum(DRAFT[i] == t for i, t in zip(log_p.argmax(-1).tolist(), targets, strict=True))
    assert float(term.metrics["head/accuracy"][0]) == right
    # The teacher is main, given that the token is one of the draft vocabulary.
    main = model.output_layers()[0]
    teacher = main.logits(scored.flat_hidden[batch.head.positions])[:, DRAFT].log_softmax(-1)
    kl = HeadKL(weight=1.0).terms(inputs)["head_kl"].total
    torch.testing.assert_close(kl, F.kl_div(log_p, teacher, log_target=True, reduction="sum"))
    (term.total + kl).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    outside = replay_batch(model, whole, channel_gradient=1.0, use_head=True)
    with pytest.raises(RuntimeError, match="not in the draft vocabulary"):
        outside.head.cross_entropy()
    logprob = outside.head.stats().logprob
    is_inside = torch.tensor([t in DRAFT for t in whole.head.targets.tolist()])
    assert torch.equal(logprob.isfinite(), is_inside)


def test_the_loss_of_other_trainers_leaves_them_out():
    """`forward(labels)` with `mtp_loss_weight`: the mean over tokens of the draft vocabulary."""
    model = eagle_model(drafts=DRAFT)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    stock = LlamaForCausalLM.forward(model, ids, labels=ids).loss
    model.config.mtp_loss_weight = 1.0
    found = model(ids, labels=ids).loss - stock
    batch = collate_text([(ids[0, :1].tolist(), ids[0, 1:].tolist())], PLAN_FAST, 4, PAD)
    batch = within_draft_vocabulary(batch, model.mtp_head.draft_tokens)
    scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
    torch.testing.assert_close(found, scored.head.cross_entropy().loss / len(batch.head))
    nothing = torch.tensor([[7, 7, 7, 7, 7]])  # a token that the head cannot write
    with torch.no_grad():
        assert model(nothing, labels=nothing).loss.isfinite()


def test_a_layer_given_some_tokens_is_the_conditional_distribution():
    layer = OutputLayer(torch.randn(9, 4), torch.randn(9), scale=0.5, softcap=3.0)
    hidden, tokens = torch.randn(5, 4), torch.tensor([0, 3, 8])
    expected = layer.logits(hidden).softmax(-1)[:, tokens]
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(layer.given(tokens).logits(hidden).softmax(-1), expected)
    assert layer.given(None) is layer


# Files.


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_and_opened(tmp_path, kind):
    model, _ = trained(3, **KINDS[kind])
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path)
    before, after = model.state_dict(), opened.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert completions(run(opened, PROMPTS, PLAN)) == completions(run(model, PROMPTS, PLAN))


def test_a_new_head_on_a_main_from_a_file_has_a_vocabulary(tmp_path):
    model = eagle_model(drafts=DRAFT)
    LlamaForCausalLM.save_pretrained(model, tmp_path)
    cls = family_class("llama")
    config = cls.config_class.from_pretrained(tmp_path)
    config.mtp = model.config.mtp
    stock = LlamaForCausalLM.from_pretrained(tmp_path)
    stock.save_pretrained(tmp_path / "main")
    opened = cls.from_pretrained(tmp_path / "main", config=config, new_head=True)
    assert opened.mtp_head.draft_tokens.tolist() == list(range(len(DRAFT)))
    assert opened.mtp_head.t2d.nonzero()[:, 0].tolist() == list(range(len(DRAFT)))


@pytest.mark.parametrize("mode", ["fast", "verified"])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("least", [0.0, 0.01])
def test_a_slot_for_which_the_head_has_no_token_ends_the_block(mode, sampled, least):
    model = eagle_model(drafts=DRAFT)
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    phase = {"name": "answer", "mode": "fast", "opened_by": None}
    phase["min_probability"] = least
    model.generation_config.mtp_phases = [phase]
    tokens, lengths = pad(PROMPTS, PAD)
    given = {"do_sample": sampled, "max_new_tokens": 12, "return_dict_in_generate": True}
    given |= {"attention_mask": torch.arange(tokens.shape[1]) < lengths[:, None]}

    def written(mode, forbidden):
        generator = torch.Generator().manual_seed(0)
        own = {"mtp_mode": mode, "suppress_tokens": forbidden, "generator": generator}
        return model.generate(tokens, **given, **own)

    out = written(mode, DRAFT)
    assert not set(out.sequences[:, tokens.shape[1] :].flatten().tolist()) & {*DRAFT} - {EOS, PAD}
    assert out.slots.max() == 0 and out.logprobs.isfinite().all()
    if not sampled:
        assert torch.equal(out.sequences, written("slow", DRAFT).sequences)
    # The head writes where a token of its vocabulary is left.
    assert written("fast", [t for t in DRAFT if t != 5]).slots.max() > 0 or least


def test_more_tokens_of_main_are_outside_the_draft_vocabulary():
    model = eagle_model(drafts=DRAFT)
    head, before = model.mtp_head, model.mtp_head.lm_head.weight.clone()
    model.resize_token_embeddings(VOCABULARY + 4)
    assert torch.equal(head.lm_head.weight, before) and head.draft_tokens.tolist() == DRAFT
    assert len(head.t2d) == VOCABULARY + 4 and int(head.t2d.sum()) == len(DRAFT)
    out = run(model, PROMPTS, PLAN, Sampler(), max_new_tokens=20)
    assert set(out.tokens[out.slots > 0].tolist()) <= set(DRAFT)
    with pytest.raises(ValueError, match="main must keep the 22 tokens that hold .*, got 20"):
        model.resize_token_embeddings(20)


def test_mistakes_are_named():
    for settings, message in (
        ({"num_layers": 2}, "head.num_layers must be 1 for head.type=eagle3, got 2"),
        ({"recall": True}, "head.recall must be false for head.type=eagle3"),
        ({"hidden_size": 20}, "head.hidden_size must be an even multiple of .*=4 .*, got 20"),
        ({"options": {"draft_vocab_size": -1}}, "head.options.draft_vocab_size must be .* got -1"),
        ({"options": {"rope_theta": 0}}, "head.options.rope_theta must be a number .* got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            HeadConfig(type="eagle3", **settings).validate()
    with pytest.raises(ValueError, match="head.hidden_size must be main's width 32 .*, got 16"):
        eagle_model(width=16)
    with pytest.raises(ValueError, match="head.options.draft_vocab_size must be at most main's 23"):
        eagle_model(options={"draft_vocab_size": 24})
    for tokens in (DRAFT[:-1], [*DRAFT[:-1], 23], [*DRAFT[:-1], DRAFT[0]]):
        with pytest.raises(ValueError, match="the draft vocabulary must be .*=11 different tokens"):
            eagle_model(drafts=DRAFT).mtp_head.set_draft_tokens(tokens)
