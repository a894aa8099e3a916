"""Every family with a head: its slow mode is `generate`, its training scores what it samples."""

import json
from pathlib import Path

import pytest
import torch
from families import EOS, FAMILIES, PAD, VOCABULARY, tiny_family
from family_contract import FAST, PHASES, PROMPTS, examine, rollout_batch, verdict
from family_table import read_table
from helpers import run_alone
from transformers import CONFIG_MAPPING, GenerationConfig

from mtp.hub.formats.huggingface import write_code
from mtp.modeling.branches import SearchConfig
from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.records import pad
from mtp.modeling.sampler import Sampler
from mtp.modeling.search import search
from mtp.training.collate import collate_text
from mtp.training.objectives import HeadCE, MainCE, StreamInputs
from mtp.training.objectives.scored import replay_batch
from mtp.training.optimizers import fixed_parameters

QUICK = ("llama", "qwen3", "gemma2", "gpt_oss", "llama4_text", "deepseek_v3", "phi", "qwen3_next")
"""Families of the fast suite: of each kind of mask, output layer and state there is one."""

TABLE = read_table()
"""`model_type` -> what docs/models.md says of it."""


@pytest.mark.parametrize("model_type", QUICK)
def test_a_family_keeps_the_contract(model_type):
    examine(model_type, 20, generate=False)


@pytest.mark.parametrize(
    "model_type", ["afmoe", "deepseek_v32", "ernie4_5_moe", "glm_moe_dsa", "qwen3"]
)
def test_every_parameter_that_a_stage_trains_gets_a_gradient(model_type):
    """The first four have parameters that are built frozen, or that only select tokens."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    model, fixed = tiny_family(model_type), fixed_parameters(tiny_family(model_type))
    assert bool(fixed) is (model_type != "qwen3")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in fixed)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(3, VOCABULARY, (6, 40), generator=generator).tolist()
    batch = collate_text([(text[:2], text[2:]) for text in texts], FAST, 4, PAD)
    inputs = StreamInputs(replay_batch(model, batch, channel_gradient=1.0, use_head=True), batch)
    terms = MainCE(weight=1.0).terms(inputs) | HeadCE(weight=1.0).terms(inputs)
    sum(term.total for term in terms.values()).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


@pytest.mark.parametrize("method", ["beam", "mcts"])
@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_next"])
@torch.no_grad()
def test_branches_of_a_search_keep_what_the_family_keeps(model_type, method):
    model = tiny_family(model_type, recall=True)
    tokens, lengths = pad(PROMPTS, PAD)
    generator = torch.Generator().manual_seed(0)
    options = DecodeOptions(sampler=Sampler(), max_new_tokens=12, pad_id=PAD, generator=generator)
    config = SearchConfig(method=method, n=4, expand=2)
    batch = rollout_batch(search(model, tokens, lengths, FAST, options, config).out)
    scored = replay_batch(model, batch, channel_gradient=1.0, use_head=True)
    for emitter, rows in (("main", scored.main), ("head", scored.head)):
        difference = rows.stats().logprob - getattr(batch, emitter).sampled
        assert float(difference.abs().max()) < 1e-4, emitter


def test_the_tables_of_the_documentation_are_of_the_families_here():
    assert set(QUICK) <= set(TABLE)
    assert set(TABLE) == set(FAMILIES)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("model_type", TABLE)
def test_a_family_is_what_the_documentation_says(model_type):
    assert verdict(model_type).status == TABLE[model_type]


def check_exports(folder: Path, names: list[str]) -> None:
    """Exports open in a process without mtp, as stock models and with their heads, and give the
    same numbers.
    """
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [PAD] * 8 + [16, 17, 18]])
    expected = {}
    for name in names:
        model = tiny_family(name)
        model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
        model.generation_config.mtp_phases = PHASES
        model.save_pretrained(folder / name)
        write_code(model, folder / name)
        given = {"attention_mask": ids != PAD, "max_new_tokens": 12, "pad_token_id": PAD}
        with torch.no_grad():
            logits = model(input_ids=ids[:1], use_cache=False).logits
        fast = model.generate(ids, mtp_mode="fast", **given)
        expected[name] = [logits.tolist(), logits.tolist(), fast.tolist()]
    cache = folder / "cache"
    cache.mkdir()
    script = f"""
import json, torch
from transformers import AutoModelForCausalLM
ids, got = torch.tensor({ids.tolist()}), {{}}
given = dict(attention_mask=ids != {PAD}, max_new_tokens=12, pad_token_id={PAD})
for name in {names}:
    path = {str(folder)!r} + "/" + name
    got[name] = []
    for trust in (False, True):
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust).eval()
        with torch.no_grad():
            got[name].append(model(input_ids=ids[:1], use_cache=False).logits.tolist())
    got[name].append(model.generate(ids, mtp_mode="fast", **given).tolist())
print(json.dumps(got))
"""
    got = json.loads(run_alone(script, cache))
    differ = {
        name
        for name, (stock, trusted, fast) in expected.items()
        for logits, wanted in zip(got[name][:2], (stock, trusted), strict=True)
        if got[name][2] != fast
        or not torch.allclose(*map(torch.tensor, (logits, wanted)), atol=1e-5)
    }
    assert not differ


def test_an_export_opens_where_mtp_is_not_importable(tmp_path):
    check_exports(tmp_path, ["gemma2", "gpt2", "qwen3_next"])


@pytest.mark.slow
@pytest.mark.long
def test_every_export_opens_where_mtp_is_not_importable(tmp_path):
    check_exports(tmp_path, [name for name, status in TABLE.items() if status != "refused"])
