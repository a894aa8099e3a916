"""An export where other tools open it: what they decode, load and save, in processes without mtp."""

import json

import pytest
import torch
from helpers import run_alone, tiny_model
from safetensors.torch import load_file, save_file
from test_export import PHASES, SUMMARY, make, tiny_config, tiny_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtp.hub.build import generation_config, load_model
from mtp.hub.export import export
from mtp.modeling.modeling_mtp import LlamaMTPForCausalLM
from mtp.modeling.saving import HEAD_FILE, INDEX

IDS = torch.tensor([[2, 5, 6, 7, 8]])


def test_a_tool_that_skips_special_tokens_shows_where_the_answer_begins(tmp_path):
    _, text = make(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = text.prompt_ids("1+2=") + text.completion_ids("1+2=3", "3")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "1+2=<think>1+2=3</think>3"


def test_delimiters_that_were_special_tokens_are_none_in_a_new_export(tmp_path):
    """Runs of earlier versions have them among the special tokens; they open, and export as new."""
    model, text = tiny_model(), tiny_text()
    text.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    for token in ("<think>", "</think>"):
        assert token in text.tokenizer.all_special_tokens
    model.generation_config = generation_config(text, PHASES)
    export(model, text, tmp_path / "out", SUMMARY, tiny_config())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert set(tokenizer.all_special_tokens) == {"<pad>", "<eos>"}
    ids = text.completion_ids("1+2=3", "3")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "1+2=3</think>3"
    assert tokenizer.encode("1</think>3") == text.tokenizer.encode("1</think>3")


def test_mains_files_hold_main_alone_and_the_heads_file_the_rest(tmp_path):
    model, _ = make(tmp_path / "out", tied=True)
    main, head = (load_file(tmp_path / "out" / f) for f in ("model.safetensors", HEAD_FILE))
    assert all(name.startswith("mtp_head.") for name in head)
    assert not any(name.startswith("mtp_head.") for name in main)
    saved = {**main, **head}
    for name, weight in model.named_parameters():
        assert torch.equal(saved[name], weight), name
    index = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert index == dict.fromkeys(main, "model.safetensors") | dict.fromkeys(head, HEAD_FILE)


def test_shards_open_with_the_head_and_without(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    opened = LlamaMTPForCausalLM.from_pretrained(tmp_path)
    state = opened.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))


def test_a_checkpoint_with_the_head_among_mains_weights_opens(tmp_path):
    """The layout of earlier versions."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    both = {**load_file(tmp_path / "model.safetensors"), **load_file(tmp_path / HEAD_FILE)}
    save_file(both, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / HEAD_FILE).unlink()
    (tmp_path / INDEX).unlink()
    state = LlamaMTPForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())


def test_a_head_that_is_missing_is_refused_not_initialised(tmp_path):
    make(tmp_path / "out")
    (tmp_path / "out" / INDEX).unlink()
    message = "must hold the head's weights, but mtp_head.* is missing"
    with pytest.raises(ValueError, match=message):
        LlamaMTPForCausalLM.from_pretrained(tmp_path / "out")
    LlamaMTPForCausalLM.from_pretrained(tmp_path / "out", new_head=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_each_loading_path_saves_a_folder_that_opens_as_it_was_opened(tmp_path):
    """Trusted: main, head and code. Stock: main, whose head is not found rather than made up."""
    model, _ = make(tmp_path / "out")
    expected = model.generate(IDS, mtp_mode="fast", max_new_tokens=12).tolist()
    script = f"""
import json, torch
from transformers import AutoModelForCausalLM
out = {str(tmp_path)!r} + "/"
ids = torch.tensor({IDS.tolist()})
AutoModelForCausalLM.from_pretrained(out + "out", trust_remote_code=True).save_pretrained(
    out + "trusted"
)
AutoModelForCausalLM.from_pretrained(out + "out").save_pretrained(out + "stock")
got = {{}}
for name in ("trusted", "stock"):
    stock = AutoModelForCausalLM.from_pretrained(out + name)
    got[name] = stock.generate(ids, max_new_tokens=12, do_sample=False).tolist()
trusted = AutoModelForCausalLM.from_pretrained(out + "trusted", trust_remote_code=True)
got["fast"] = trusted.generate(ids, mtp_mode="fast", max_new_tokens=12).tolist()
try:
    AutoModelForCausalLM.from_pretrained(out + "stock", trust_remote_code=True)
except OSError as error:
    got["error"] = str(error)
print(json.dumps(got))
"""
    cache = tmp_path / "cache"
    cache.mkdir()
    got = json.loads(run_alone(script, cache).splitlines()[-1])
    assert got["fast"] == expected
    slow = model.generate(IDS, max_new_tokens=12, do_sample=False).tolist()
    assert got["trusted"] == got["stock"] == slow
    assert "modeling_mtp.py" in got["error"]
    for name in ("trusted", "stock"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
    assert load_model(tmp_path / "out")[0].mtp_settings == model.mtp_settings
