"""Search: planted texts are found, log-probabilities are exact, what is shared is read once."""

import itertools
import math

import pytest
import torch
from helpers import CLOSE, EOS, HEADS, PAD, completions, tiny_model
from transformers import LogitsProcessorList

from mtp.modeling.branches import Branch, BranchLoop, SearchConfig, SearchRequest
from mtp.modeling.decode import decode
from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.phases import PhasePlan
from mtp.modeling.records import FORCED, pad
from mtp.modeling.sampler import Sampler
from mtp.modeling.search import choose, decoded, search
from mtp.training.collate import collate_rollouts
from mtp.training.objectives.scored import replay_batch

RAGGED = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [4, 4]]
METHODS = {
    "best_of_n": SearchConfig(n=5),
    "beam": SearchConfig(method="beam", n=3, expand=4),
    "mcts": SearchConfig(method="mcts", n=6, expand=3),
}
PHASES = [
    {"name": "thought", "mode": "fast", "opened_by": None},
    {"name": "answer", "mode": "slow", "opened_by": CLOSE},
]


def look(
    model,
    prompts,
    plan,
    config,
    sampler=None,
    seed=0,
    max_new_tokens=14,
    scorer=None,
    answer_of=None,
    **options,
):
    tokens, lengths = pad(prompts, PAD)
    generator = torch.Generator().manual_seed(seed)
    given = {"sampler": sampler or Sampler(), "max_new_tokens": max_new_tokens, "pad_id": PAD}
    given |= {"generator": generator, **options}
    return search(
        model,
        tokens,
        lengths,
        plan,
        DecodeOptions(**given),
        config,
        scorer=scorer,
        answer_of=answer_of,
    )


def plan_of(mode, plan):
    if mode in ("slow", "verified"):
        return plan.as_slow() if mode == "slow" else plan.as_verified(4)
    budget = [6 if mode == "closed" else None, None]
    return PhasePlan([4, 1], [None, CLOSE], [EOS], max_tokens=budget)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("mode", ["fast", "slow", "verified", "closed"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_every_text_has_the_log_probabilities_of_a_replay(method, mode, head, plan):
    model, sampler = tiny_model(type=head), Sampler(temperature=1.2, top_p=0.95)
    found = look(model, RAGGED, plan_of(mode, plan), METHODS[method], sampler)
    texts = [branch for of_prompt in found.texts for branch in of_prompt]
    assert len(texts) >= 2 * len(RAGGED)
    prompts = [RAGGED[branch.prompt] for branch in texts]
    out = decoded(texts, PAD, torch.device("cpu"))
    rows = list(range(len(texts)))
    batch = collate_rollouts(prompts, out, torch.zeros(len(texts)), rows, 4, PAD)
    scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
    main, head_stats = scored.main.stats(sampler), scored.head.stats(sampler)
    assert torch.allclose(main.logprob, batch.main.sampled, atol=1e-4)
    assert torch.allclose(head_stats.logprob, batch.head.sampled, atol=1e-4)
    for branch in texts:
        text, slots = branch.text(), branch.whole("slots")
        assert not branch.is_open and branch.finished == (text[-1] == EOS)
        assert branch.score == pytest.approx(
            sum(branch.whole("logprobs")) / sum(slot != FORCED for slot in slots)
        )
        assert len(text) <= 14 and (branch.finished or len(text) == 14)
        after = slots[text.index(CLOSE) + 1 :] if CLOSE in text else []
        assert set(after) <= {0}
        if mode == "closed":
            closers = [at for at, slot in enumerate(slots) if slot == FORCED]
            assert closers == ([6] if CLOSE not in text[:6] and len(text) > 6 else [])
    if head != "eagle3" or mode != "verified":  # whose drafts main happens to reject
        assert (mode == "slow") == (int(out.slots.max()) == 0 and not bool(out.accepted.any()))


@pytest.mark.parametrize("mode", ["fast", "slow", "verified", "closed"])
@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_is_searched_as_if_it_were_alone(method, mode, plan):
    """At so low a temperature that nothing is left to chance."""
    plan, sampler = plan_of(mode, plan), Sampler(temperature=1e-4)
    found = look(tiny_model(), RAGGED, plan, METHODS[method], sampler)
    alone = [look(tiny_model(), [prompt], plan, METHODS[method], sampler) for prompt in RAGGED]
    assert [texts[0].text() for texts in found.texts] == [one.texts[0][0].text() for one in alone]
    assert found.passes.tolist() == [int(one.passes[0]) for one in alone]


@pytest.mark.parametrize("mode", ["fast", "slow", "verified"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_without_logits_the_copies_of_a_branch_differ_and_are_scored_as_a_replay(
    method, mode, plan
):
    model, sampler = tiny_model(), Sampler(temperature=1.2)
    found = look(model, RAGGED, plan_of(mode, plan), METHODS[method], sampler, impl="torch")
    texts = [branch for of_prompt in found.texts for branch in of_prompt]
    for of_prompt in found.texts:
        assert len({tuple(branch.text()) for branch in of_prompt}) > 1
    out = decoded(texts, PAD, torch.device("cpu"))
    rows, prompts = list(range(len(texts))), [RAGGED[branch.prompt] for branch in texts]
    batch = collate_rollouts(prompts, out, torch.zeros(len(texts)), rows, 4, PAD)
    scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
    main, head_stats = scored.main.stats(sampler), scored.head.stats(sampler)
    assert torch.allclose(main.logprob, batch.main.sampled, atol=1e-4)
    assert torch.allclose(head_stats.logprob, batch.head.sampled, atol=1e-4)


@torch.no_grad()
def test_without_logits_the_branches_of_a_fork_follow_the_distribution(plan):
    """The second tokens of a beam that keeps everything are as likely as main says."""
    model, prompt, number = tiny_model(), [5, 6, 7], 4000
    tokens, lengths = pad([prompt], PAD)
    request = SearchRequest(
        model=model,
        prompts=tokens,
        prompt_lengths=lengths,
        plans=[plan.as_slow()],
        options=DecodeOptions(
            sampler=Sampler(),
            max_new_tokens=4,
            pad_id=PAD,
            generator=torch.Generator().manual_seed(0),
            impl="torch",
        ),
    )
    loop = BranchLoop(request, request.roots(), 1)
    (first,) = loop.step()
    loop.fork([first], number)
    counts = torch.zeros(model.config.vocab_size)
    for branch in loop.step():
        counts[branch.tokens[0]] += 1
    text = torch.tensor([[*prompt, *first.tokens]])
    expected = number * model(text).logits[0, -1].float().softmax(-1)
    deviation = (counts - expected) / expected.clamp(min=1).sqrt()
    assert counts.sum() == number and deviation.abs().max() < 5


def counted(model):
    """Make a model note the shape of what main is fed."""
    shapes, forward = [], type(model).main_states

    def main_states(fed, *given, **named):
        shapes.append(tuple(fed.shape))
        return forward(model, fed, *given, **named)

    model.main_states = main_states
    return shapes


def read_once(found, prompts):
    """Tokens of the prompts and of every branch that another grew from, each counted once."""
    grown_from = {b for texts in found.texts for text in texts for b in text.path()[:-1]}
    return [
        len(prompt) + sum(len(b.tokens) for b in grown_from if b.prompt == index)
        for index, prompt in enumerate(prompts)
    ], [sum(b.prompt == index for b in grown_from) for index in range(len(prompts))]


@pytest.mark.parametrize("mode", ["fast", "slow", "closed"])
@pytest.mark.parametrize("method", ["best_of_n", "mcts"])
def test_main_reads_shared_prefixes_once(method, mode, plan):
    found = look(tiny_model(), RAGGED, plan_of(mode, plan), METHODS[method])
    tokens, passes = read_once(found, RAGGED)
    assert found.tokens_read.tolist() == tokens
    assert found.passes.tolist() == passes
    alone = [
        sum(len(RAGGED[i]) + text.num_tokens - len(text.tokens) for text in texts)
        for i, texts in enumerate(found.texts)
    ]
    assert sum(tokens) < sum(alone)


def test_what_is_counted_is_what_main_is_fed(plan):
    prompt = [[9, 10, 11, 12]]
    for mode in ("fast", "slow", "verified"):
        model = tiny_model()
        shapes = counted(model)
        found = look(model, prompt, plan_of(mode, plan), METHODS["mcts"])
        assert int(found.tokens_read[0]) == sum(rows * width for rows, width in shapes)
        assert int(found.passes[0]) == len(shapes)
    model = tiny_model()
    shapes = counted(model)
    found = look(model, prompt, plan.as_slow(), METHODS["beam"])
    assert shapes[0] == (1, 4) and all(width == 1 for _, width in shapes[1:])
    assert max(rows for rows, _ in shapes) == 3  # n branches, and not the n * expand that they grow
    assert int(found.tokens_read[0]) == sum(rows * width for rows, width in shapes)
    assert int(found.passes[0]) == sum(rows for rows, _ in shapes)


@pytest.mark.parametrize("mode", ["fast", "slow", "verified", "closed"])
def test_the_best_of_n_is_among_what_decoding_gives(mode, plan):
    plan = plan_of(mode, plan)
    found = look(tiny_model(), RAGGED, plan, SearchConfig(n=5), seed=3)
    tokens, lengths = pad(RAGGED, PAD)
    out = decode(
        tiny_model(),
        tokens.repeat_interleave(5, 0),
        lengths.repeat_interleave(5),
        plan,
        DecodeOptions(
            sampler=Sampler(),
            max_new_tokens=14,
            pad_id=PAD,
            generator=torch.Generator().manual_seed(3),
        ),
    )
    rows = completions(out)
    for prompt, texts in enumerate(found.texts):
        written = rows[5 * prompt : 5 * prompt + 5]
        assert sorted(branch.text() for branch in texts) == sorted(written)
        mean = out.logprobs.sum(1) / ((out.slots >= 0).sum(1))
        best = 5 * prompt + int(mean[5 * prompt : 5 * prompt + 5].argmax())
        assert found.out.tokens[prompt, : out.lengths[best]].tolist() == rows[best]
        assert float(found.scores[prompt]) == pytest.approx(float(mean[best]), abs=1e-5)


def only(*tokens, bias=0.0):
    """A processor that leaves a few tokens, equally likely but for `bias` nats on the first."""

    def process(ids, scores):
        left = torch.full_like(scores, -torch.inf)
        left[:, list(tokens)] = 0.0
        left[:, tokens[0]] += bias
        return left

    return LogitsProcessorList([process])


PLANTED = [5, 6, 6, 5, 6, 5, 5, 6]


def planted_reward(branches):
    """Length of the correct beginning of a branch, less the tokens after its first mistake."""
    out = []
    for branch in branches:
        pairs = zip(branch.text(), PLANTED, strict=False)
        right = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        out.append((2 * right - branch.num_tokens) / len(PLANTED))
    return out


@pytest.mark.parametrize("mode", ["fast", "slow", "verified"])
@pytest.mark.parametrize(
    "config",
    [
        SearchConfig(n=1500),
        SearchConfig(method="beam", n=1, expand=60),
        SearchConfig(method="mcts", n=80, expand=80),
        SearchConfig(method="mcts", n=80, expand=80, rollouts=False),
    ],
    ids=["best_of_n", "beam", "rollouts", "values"],
)
def test_a_planted_text_is_found(config, mode, plan):
    options = {"process": only(5, 6), "scorer": planted_reward, "max_new_tokens": 8}
    found = look(tiny_model(), [[7], [8, 9]], plan_of(mode, plan), config, **options)
    for texts, score in zip(found.texts, found.scores.tolist(), strict=True):
        assert texts[0].text() == PLANTED and score == 1.0
    assert found.out.tokens.tolist() == [PLANTED] * 2
    if config.method != "best_of_n":
        nodes = 2**8 - 1  # passes of slow mode that see every text
        limit = {"beam": 8, "mcts": 0.7 * nodes if config.rollouts else 80}[config.method]
        assert found.passes.max() <= limit


def test_tree_search_needs_fewer_passes_than_sampling_for_the_same_text(plan):
    options = {"process": only(5, 6), "scorer": planted_reward, "max_new_tokens": 8}
    config = SearchConfig(method="mcts", n=40, expand=6)
    sampled = look(tiny_model(), [[7]] * 8, plan.as_slow(), SearchConfig(n=40), **options)
    tree = look(tiny_model(), [[7]] * 8, plan.as_slow(), config, **options)
    assert (tree.scores > sampled.scores).sum() > (tree.scores < sampled.scores).sum()
    assert tree.passes.sum() < sampled.passes.sum() / 2


@torch.no_grad()
def test_without_a_scorer_the_likeliest_text_is_found(plan):
    model, prompt, process = tiny_model(), [7, 8], only(5, 6)

    def sharp(ids, scores):
        return torch.where(process(ids, scores) == 0, scores, -torch.inf)

    best, likeliest = -math.inf, None
    for text in itertools.product([5, 6], repeat=6):
        hidden, _ = model.main_hidden(torch.tensor([[*prompt, *text]]))
        rows = sharp(None, hidden[0, 1:-1] @ model.lm_head.weight.T).log_softmax(-1)
        logprob = float(rows[range(6), list(text)].sum())
        if logprob > best:
            best, likeliest = logprob, list(text)
    for method, n in (("best_of_n", 600), ("beam", 6), ("mcts", 64)):
        config = SearchConfig(method=method, n=n, expand=24, length_penalty=0.0)
        found = look(
            model,
            [prompt],
            plan.as_slow(),
            config,
            process=LogitsProcessorList([sharp]),
            max_new_tokens=6,
        )
        assert found.texts[0][0].text() == likeliest
        assert float(found.scores[0]) == pytest.approx(best, abs=1e-4)


def test_a_tree_that_has_been_seen_whole_ends_the_search(plan):
    config = SearchConfig(method="mcts", n=100, expand=24)
    prompt = [7, 8, 9]
    found = look(
        tiny_model(), [prompt], plan.as_slow(), config, process=only(5, 6), max_new_tokens=3
    )
    texts = sorted(tuple(branch.text()) for branch in found.texts[0])
    assert texts == sorted(itertools.product([5, 6], repeat=3))
    assert int(found.passes[0]) == 1 + 2 + 4
    assert int(found.tokens_read[0]) == len(prompt) + 2 + 4


def test_a_beam_holds_no_text_twice(plan):
    config = SearchConfig(method="beam", n=8, expand=64)
    options = {"process": only(5, 6), "max_new_tokens": 3}
    for mode in ("fast", "slow"):
        found = look(tiny_model(), [[7]], plan_of(mode, plan), config, **options)
        texts = [tuple(branch.text()) for branch in found.texts[0]]
        assert len(set(texts)) == len(texts) == 8


def test_an_ended_text_keeps_its_place_until_a_better_one_takes_it(plan):
    def scorer(branches):
        return [9.0 if branch.text()[-1] == 1 else float(branch.num_tokens) for branch in branches]

    config = SearchConfig(method="beam", n=2, expand=24)
    options = {"process": only(5, 1), "scorer": scorer}
    found = look(tiny_model(), [[7]], plan.as_slow(), config, max_new_tokens=6, **options)
    assert [branch.text() for branch in found.texts[0]] == [[1], [5, 1]]
    found = look(tiny_model(), [[7]], plan.as_slow(), config, max_new_tokens=12, **options)
    assert found.scores.tolist() == [9.0]


def branch_saying(text, score, prompt=0):
    branch = Branch(prompt=prompt, tokens=text, slots=[0] * len(text), is_open=False)
    branch.score = score
    return branch


def test_the_majority_is_over_answers_and_ties_go_to_the_better_text():
    config = SearchConfig(choose="majority")

    def answer_of(text):
        return text[-1] if text[-1] > 2 else None

    texts = [branch_saying([*map(int, word)], -i) for i, word in enumerate(["51", "7", "38", "18"])]
    assert choose(texts, config, answer_of) is texts[2]
    assert choose(texts[:3], config, answer_of) is texts[1]
    assert choose(texts[:1], config, answer_of) is texts[0]
    assert choose(texts, SearchConfig(), None) is texts[0]


def test_a_vote_can_choose_another_text_than_the_score(plan):
    """Texts are 5 or 6 and then 7, 8 or 9; 5s are likelier, and the answers 7, 8 count as one."""
    options = {"max_new_tokens": 2, "process": only(5, 6, 7, 8, 9, bias=1.0)}

    def answer_of(text):
        return text[-1] > 5

    by_score = look(tiny_model(), [[7]], plan.as_slow(), SearchConfig(n=32), **options)
    config = SearchConfig(n=32, choose="majority")
    by_vote = look(tiny_model(), [[7]], plan.as_slow(), config, answer_of=answer_of, **options)
    assert [b.text() for b in by_score.texts[0]] == [b.text() for b in by_vote.texts[0]]
    assert by_score.out.tokens.tolist() == [[5, 5]]
    assert by_vote.out.tokens[0, 1] > 5
    assert by_vote.scores < by_score.scores


def test_a_scorer_of_open_branches_is_called_with_them_and_a_text_still_ends(plan):
    asked = []

    def scorer(branches):
        asked.extend(branches)
        return [0.0] * len(branches)

    config = SearchConfig(method="mcts", n=2, rollouts=False)
    found = look(tiny_model(), [[5, 6]], plan.as_slow(), config, scorer=scorer, max_new_tokens=9)
    assert [branch.num_tokens for branch in asked] == [1, 9]
    assert len(found.texts[0]) == 1


def test_a_scorer_is_not_called_without_branches():
    """Copies of a branch grow differently in verified mode and may all reach one ended text."""
    model, script, asked = tiny_model(), [5, 5, 5, EOS, 5, 5], []
    model.generation_config.mtp_phases = PHASES

    def grammar(ids, scores):
        only = torch.tensor([script[min(ids.shape[1] - 4, 5)]])
        return torch.full_like(scores, -torch.inf).index_fill(1, only, 0.0)

    def scorer(branches):
        asked.append(len(branches))
        return [branch.logprob for branch in branches]

    out = model.search(
        torch.tensor([[5, 6, 7, 9]]),
        config={"method": "beam", "n": 2, "expand": 3},
        mtp_mode="verified",
        do_sample=True,
        eos_token_id=EOS,
        max_new_tokens=8,
        logits_processor=[grammar],
        scorer=scorer,
    )
    assert out.texts[0][0].text() == script[:4]
    assert asked and min(asked) > 0


def test_search_takes_what_generate_takes():
    model = tiny_model()
    model.generation_config.mtp_phases = PHASES
    model.generation_config.update(pad_token_id=PAD, eos_token_id=EOS)
    width = max(map(len, RAGGED))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in RAGGED])

    def stop_at_five(ids, scores):
        return ids[:, -1] == 5

    for method in METHODS:
        out = model.search(
            ids,
            attention_mask=ids != PAD,
            config={"method": method, "n": 4},
            mtp_mode=["fast", "slow", "verified", "fast"],
            do_sample=True,
            temperature=1.1,
            max_new_tokens=12,
            stopping_criteria=[stop_at_five],
            generator=torch.Generator().manual_seed(1),
        )
        assert torch.equal(out.sequences[:, :width], ids)
        for row, texts in enumerate(out.texts):
            text = texts[0].text()
            assert out.sequences[row, width:][: len(text)].tolist() == text
            assert out.logprobs[row].sum() == pytest.approx(texts[0].logprob, abs=1e-4)
            assert [b.score for b in texts] == sorted([b.score for b in texts], reverse=True)
            for branch in texts:
                said = branch.text()
                assert 5 not in said[:-1] and branch.finished == (said[-1] in (5, EOS))
        assert out.slots[1].max() == 0 and out.slots[2].max() == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"method": "dfs"},
            "search.method must be one of .'best_of_n', 'beam', 'mcts'., got 'dfs'",
        ),
        ({"choose": "best"}, "search.choose must be one of"),
        ({"n": 0}, "search.n must be at least 1, got 0"),
        ({"method": "beam", "expand": 1}, "search.expand must be at least 2, got 1"),
        ({"method": "mcts", "exploration": -1.0}, "search.exploration must be 0 or above"),
        ({"method": "mcts", "rollouts": False}, "needs a scorer of open branches"),
        ({"method": "beam", "rollouts": False}, "requires search.method=mcts, got beam"),
        ({"choose": "majority"}, "needs answer_of"),
        ({"width": 3}, "must not hold .'width'."),
        ({"do_sample": False}, "sampling must be on; got temperature=0"),
        ({"top_k": 1}, "sampling must be on; got temperature=1, top_k=1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"num_return_sequences": 2}, "set n in its config"),
        ({"mtp_mode": "warp"}, "mtp_mode must be one of"),
        ({"mtp_mode": ["fast", "slow"]}, r"one per row \(1\), got 2"),
        ({"streamer": object()}, "does not support streamer"),
        ({"attention_mask": torch.zeros(1, 2)}, "row without a token"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_any_pass(given, message, monkeypatch):
    model = tiny_model()
    model.generation_config.mtp_phases = PHASES
    monkeypatch.setattr(type(model), "main_states", None)
    names = ("method", "choose", "n", "expand", "exploration", "rollouts", "width")
    config = {name: given[name] for name in given if name in names}
    rest = {name: given[name] for name in given if name not in names}
    with pytest.raises(ValueError, match=message):
        model.search(torch.tensor([[5, 6]]), config=config, **{"do_sample": True, **rest})


@pytest.mark.parametrize(
    ("scores", "message"),
    [([1.0], "for each of 2 branches, got 1"), ([1.0, math.nan], "finite scores, got nan for")],
)
def test_a_scorer_that_gives_no_finite_scores_is_an_error(scores, message, plan):
    with pytest.raises(ValueError, match=message):
        look(tiny_model(), [[5]], plan, SearchConfig(n=2), scorer=lambda branches: scores)
