"""The contract that a family of causal LMs must meet, checked on a tiny random model of it.

Each check raises AssertionError. `check_family` runs them all; the table in docs/models.md comes
from the same function (`benchmarks/families.py`).
"""

import math
from typing import Any

import torch
from families import CLOSE, EOS, OWN_CACHE_DIFFERS, PAD, VOCABULARY, tiny_config, tiny_family
from helpers import SAMPLES, completions, head_rows, run
from lightning.fabric import Fabric
from transformers import GenerationConfig

from mtp.modeling.contract import check_slow_mode
from mtp.modeling.phases import PhasePlan
from mtp.modeling.sampler import Sampler
from mtp.training.collate import collate_rollouts, collate_text
from mtp.training.objectives import ObjectiveConfig
from mtp.training.objectives.head_ce import HeadCE
from mtp.training.objectives.main_ce import MainCE
from mtp.training.objectives.policy import Policy
from mtp.training.objectives.scored import replay_batch
from mtp.training.optimizers import OptimizerConfig, build_optimizer, split_parameters
from mtp.training.step_module import wrap
from mtp.training.update import update

PROMPTS = [[5, 6, 7, 9, 4], [8], [9, 10, 11, 12, 13, 14, 3, 5, 7, 6, 12], [4, 4, 17]]
"""Some longer than a window of 8."""
PHASES = [{"name": "thought", "mode": "fast", "opened_by": None}]
PLAN = PhasePlan(keep=[4], opened_by=[None], eos_ids=[])


def stock_of(model: Any, model_type: str) -> Any:
    """transformers' own model with the same weights."""
    stock = model.stock_class()(tiny_config(model_type)).eval()
    missing, unexpected = stock.load_state_dict(model.state_dict(), strict=False)
    assert not missing, missing
    assert all(name.startswith("mtp_head.") for name in unexpected), unexpected
    use_cache = model_type not in OWN_CACHE_DIFFERS
    stock.generation_config = GenerationConfig(pad_token_id=PAD, use_cache=use_cache)
    return stock


def check_slow(model: Any, stock: Any, num_new: int) -> None:
    """Slow and verified mode write what the stock `generate` writes for each prompt alone, whatever
    side a batch is padded on.
    """
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new)
        expected.append(out[0, len(prompt) :].tolist())
    assert all(len(text) == num_new for text in expected)
    width = max(map(len, PROMPTS))
    for side in ("left", "right"):
        padding = [[PAD] * (width - len(prompt)) for prompt in PROMPTS]
        pairs = list(zip(PROMPTS, padding, strict=True))
        ids = torch.tensor([[*p, *n] if side == "right" else [*n, *p] for p, n in pairs])
        holds = [[1] * len(p) for p in PROMPTS]
        empty = [[0] * len(n) for n in padding]
        pairs = list(zip(holds, empty, strict=True))
        mask = torch.tensor([[*h, *e] if side == "right" else [*e, *h] for h, e in pairs])
        for mode in ("slow", "verified"):
            out = model.generate(
                ids, attention_mask=mask, mtp_mode=mode, max_new_tokens=num_new, do_sample=False
            )
            found = out[:, width:].tolist()
            assert found == expected, f"{mode} mode, padded on the {side}: not stock generate"


def check_logprobs(model: Any, stock: Any, num_new: int) -> None:
    """Log-probabilities of sampled tokens are the stock forward's."""
    out = run(model, PROMPTS, PLAN.as_slow(), Sampler(), max_new_tokens=num_new)
    for prompt, text, logprobs in zip(PROMPTS, completions(out), out.logprobs, strict=True):
        logits = stock(input_ids=torch.tensor([[*prompt, *text]]), use_cache=False).logits[0]
        rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
        expected = rows.gather(1, torch.tensor(text)[:, None])[:, 0]
        torch.testing.assert_close(logprobs[: len(text)], expected, atol=1e-4, rtol=0)


def check_fast(model: Any, stock: Any, num_new: int) -> None:
    """Fast mode is its definition: no cache, one row, the head computed anew for every slot."""
    out = run(model, PROMPTS, PLAN, max_new_tokens=num_new)
    for prompt, text in zip(PROMPTS[:2], completions(out), strict=False):
        context = list(prompt)
        while len(context) < len(prompt) + num_new:
            _, taps = model.main_hidden(torch.tensor([context]), use_cache=False)
            logits = stock(input_ids=torch.tensor([context]), use_cache=False).logits[0, -1]
            block = [int(logits.argmax())]
            for slot in range(model.block_size - 1):
                rows = head_rows(model, taps, block)
                block.append(int(model.output_layers()[1].logits(rows[slot]).argmax()))
            context += block
        assert text == context[len(prompt) :][:num_new]


def check_replay(model: Any, stock: Any, num_new: int) -> None:
    """Replay gives the sampler's log-probabilities, of main and of the head."""
    sampler = Sampler(temperature=0.9)
    out = run(model, PROMPTS, PLAN, sampler, max_new_tokens=num_new)
    batch = collate_rollouts(PROMPTS, out, torch.ones(len(PROMPTS)), [0, 1, 2, 3], 4, PAD)
    scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
    for rows, given in ((scored.main, batch.main), (scored.head, batch.head)):
        found = rows.stats(sampler).logprob
        torch.testing.assert_close(found, given.sampled, atol=1e-4, rtol=0)


def check_loss(model: Any, stock: Any, num_new: int) -> None:
    """The cross-entropy of replayed rows is the stock loss."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=generator)
    expected = stock(input_ids=ids, labels=ids).loss
    rows = model.replay(ids)
    logits = rows.main_output.logits(rows.main_hidden[:, :-1]).flatten(0, 1)
    found = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def check_steps(model: Any, stock: Any, num_new: int) -> None:
    """A supervised step lowers the loss, and an RL step, whose ratios begin at 1, moves weights."""
    fabric = Fabric(accelerator="cpu", devices=1)
    model.train()
    module, parts = wrap(fabric, model), split_parameters(model)
    optimizers = {
        part: fabric.setup_optimizers(build_optimizer(parts[part], OptimizerConfig(lr=1e-3)))
        for part in parts
    }
    clip_norms = {"main": 1.0, "head": 1.0}
    plan = PhasePlan(keep=[4, 1], opened_by=[None, CLOSE], eos_ids=[EOS])
    text = collate_text(SAMPLES, plan, 4, PAD)
    supervised = ObjectiveConfig(main_ce=MainCE(weight=1.0), head_ce=HeadCE(weight=1.0))
    losses = [
        update(fabric, module, optimizers, [text], supervised, clip_norms=clip_norms)["loss"]
        for _ in range(2)
    ]
    assert losses[1] < losses[0], losses
    with torch.no_grad():
        out = run(model.eval(), PROMPTS, PLAN, Sampler(), max_new_tokens=num_new)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    batch = collate_rollouts(PROMPTS, out, advantages, [0, 1, 2, 3], 4, PAD)
    before = model.get_output_embeddings().weight.detach().clone()
    metrics = update(
        fabric, wrap(fabric, model.train()), optimizers, [batch],
        ObjectiveConfig(policy=Policy(weight=1.0)), clip_norms=clip_norms,
    )  # fmt: skip
    assert math.isfinite(metrics["loss"]) and metrics["main/grad_norm"] > 0
    assert not torch.equal(before, model.get_output_embeddings().weight)
    model.eval()


CHECKS = (check_slow, check_logprobs, check_fast, check_replay, check_loss)


def check_family(model_type: str, num_new: int = 60) -> Any:
    """Run all checks on a tiny random model; returns the model.

    Raises ValueError if it is refused at build, AssertionError if a check fails.
    """
    model = tiny_family(model_type)
    check_slow_mode(model)
    model.generation_config = GenerationConfig(pad_token_id=PAD)
    model.generation_config.mtp_phases = PHASES
    stock = stock_of(model, model_type)
    with torch.no_grad():
        for check in CHECKS:
            check(model, stock, num_new)
    check_steps(model, stock, num_new)
    return model
