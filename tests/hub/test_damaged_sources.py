"""Base models that are damaged or do not fit: one line that names them, before anything trains."""

import json
import re
import shutil

import pytest
import torch
from helpers import opens_gguf
from safetensors.torch import load_file, save_file
from toy import build_toy, save_toy, toy_tokenizer
from transformers import LlamaForCausalLM

from mtp.common.errors import one_line
from mtp.hub.build import load_model, save_model
from mtp.modeling.saving import HEAD_FILE, INDEX


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint in several files, and the same in one."""
    folder = tmp_path_factory.mktemp("base")
    save_toy(folder / "one")
    shutil.copytree(folder / "one", folder / "shards")
    (folder / "shards" / "model.safetensors").unlink()
    stock = LlamaForCausalLM.from_pretrained(folder / "one")
    stock.save_pretrained(folder / "shards", max_shard_size="20KB")
    return folder


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder, change, file="model.safetensors"):
    path = folder / file
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def add_bias(weights):
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)


NORM = "model.norm.weight"
DAMAGE = {
    "weights cut": (
        "one",
        lambda f: cut(f / "model.safetensors"),
        "the weights of {what} could not be read: SafetensorError: .*; give a hub id",
    ),
    "weights empty": (
        "one",
        lambda f: (f / "model.safetensors").write_bytes(b""),
        "the weights of {what} could not be read: SafetensorError",
    ),
    "weights gone": (
        "one",
        lambda f: (f / "model.safetensors").unlink(),
        "the weights of {what} could not be read: .*no file named model.safetensors",
    ),
    "shard gone": (
        "shards",
        lambda f: sorted(f.glob("model-*"))[0].unlink(),
        "the weights of {what} could not be read: .*model-00001-of-",
    ),
    "index cut": (
        "shards",
        lambda f: cut(f / "model.safetensors.index.json"),
        "the weights of {what} could not be read: ",
    ),
    "config cut": ("one", lambda f: cut(f / "config.json"), "{what} could not be read: .*config"),
    "config empty": (
        "one",
        lambda f: (f / "config.json").write_text("{}"),
        "{what} could not be read: Unrecognized model .*model_type",
    ),
    "type unknown to transformers": (
        "one",
        lambda f: edit_config(f, model_type="llamma"),
        "{what} could not be read: .*llamma",
    ),
    "type of another family": (
        "one",
        lambda f: edit_config(f, model_type="gpt2"),
        "{what} must hold all weights of GPT2MTPLMHeadModel, but transformer.h.0.attn",
    ),
    "type without a causal LM": (
        "one",
        lambda f: edit_config(f, model_type="vit"),
        "{what} cannot get a head: .* has a causal LM of, got 'vit'; choose",
    ),
    "size is a word": (
        "one",
        lambda f: edit_config(f, hidden_size="wide"),
        "{what} could not be read: .*got str",
    ),
    "no key heads": (
        "one",
        lambda f: edit_config(f, num_key_value_heads=0),
        "the weights of {what} could not be read: ZeroDivisionError",
    ),
    "other width": (
        "one",
        lambda f: edit_config(f, intermediate_size=64),
        r"do not fit its config.json: model.layers.0.mlp.down_proj.weight must have shape "
        r"\[32, 64\], got \[32, 48\] \(and 5 more\)",
    ),
    "deeper": (
        "one",
        lambda f: edit_config(f, num_hidden_layers=3),
        r"{what} must hold all weights .*model.layers.2.input_layernorm.weight is missing \(and 8",
    ),
    "shallower": (
        "one",
        lambda f: edit_config(f, num_hidden_layers=1),
        r"weights that its config.json has no place for: model.layers.1.input_layernorm.weight",
    ),
    "a norm missing": (
        "one",
        lambda f: edit_weights(f, lambda w: w.pop(NORM)),
        r"{what} must hold all weights of LlamaMTPForCausalLM, but model.norm.weight is missing;",
    ),
    "an output matrix missing": (
        "one",
        lambda f: edit_weights(f, lambda w: w.pop("lm_head.weight")),
        "but lm_head.weight is missing",
    ),
    "a bias that would be dropped": (
        "one",
        lambda f: edit_weights(f, add_bias),
        "no place for: model.layers.0.self_attn.q_proj.bias;",
    ),
    "a weight is not a number": (
        "one",
        lambda f: edit_weights(f, lambda w: w[NORM].fill_(torch.nan)),
        "{what} must give finite logits",
    ),
    "tokenizer cut": (
        "one",
        lambda f: cut(f / "tokenizer.json"),
        "the tokenizer of {what} could not be read: ",
    ),
    "tokenizer of another kind": (
        "one",
        lambda f: (f / "tokenizer.json").write_text('{"a": 1}'),
        "the tokenizer of {what} could not be read: ",
    ),
    "tokenizer gone": (
        "one",
        lambda f: (f / "tokenizer.json").unlink(),
        "the tokenizer of {what} could not be read: ",
    ),
}


def test_a_source_that_is_whole_opens_in_one_file_or_several(whole):
    one, shards = (build_toy(whole / name)[0].model.layers for name in ("one", "shards"))
    expected = one.state_dict()
    assert all(torch.equal(weight, expected[n]) for n, weight in shards.state_dict().items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_source_is_one_line_that_names_it(whole, tmp_path, damage):
    which, break_it, message = DAMAGE[damage]
    folder = tmp_path / "base"
    shutil.copytree(whole / which, folder)
    break_it(folder)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        build_toy(folder)
    line = one_line(caught.value)
    assert line is not None
    assert "\n" not in line
    what = re.escape(f"model.source={str(folder)!r}")
    assert re.search(message.replace("{what}", what), line), line


def test_what_is_no_part_of_main_is_left_aside(whole, tmp_path):
    shutil.copytree(whole / "one", tmp_path / "base")
    expected, _ = build_toy(tmp_path / "base")

    def add(weights):
        weights["v_head.weight"] = torch.zeros(3)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    edit_weights(tmp_path / "base", add)
    model, _ = build_toy(tmp_path / "base")
    ids = torch.tensor([[5, 6, 7]])
    known = len(toy_tokenizer())  # the rows of added tokens are random
    assert torch.equal(model(ids).logits[..., :known], expected(ids).logits[..., :known])


@opens_gguf
@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(range(256)) * 9, b"nothing"])
def test_a_gguf_file_that_is_none_is_one_line(whole, tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="model.source=.* model.gguf_file='model.gguf' could") as e:
        build_toy(tmp_path, gguf_file="model.gguf")
    assert "\n" not in str(one_line(e.value))


@opens_gguf
def test_a_gguf_file_that_is_not_in_the_folder_names_the_remedy(whole):
    with pytest.raises(ValueError, match="gguf_file must be a file in .*; model.gguf_file=null"):
        build_toy(whole / "one", gguf_file="model.gguf")


def test_a_source_that_is_nowhere_is_one_line(tmp_path):
    with pytest.raises(
        ValueError, match="model.source=.*nowhere' must be a folder, .* none of this name"
    ) as caught:
        build_toy(tmp_path / "nowhere")
    assert "\n" not in str(one_line(caught.value))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: cut(f / "model.safetensors"), "the weights of {folder} could not be read"),
        (
            lambda f: edit_weights(f, lambda w: w.pop("mtp_head.norm.weight"), HEAD_FILE),
            "{folder} must hold all weights .* mtp_head.norm.weight is missing",
        ),
        (lambda f: cut(f / HEAD_FILE), "the weights of {folder} could not be read"),
        (lambda f: (f / HEAD_FILE).unlink(), "the weights of {folder} could not be read"),
        (
            lambda f: (f / INDEX).unlink(),
            "{folder} must hold all weights .* mtp_head.* is missing",
        ),
        (lambda f: edit_config(f, mtp=None), "{folder} holds no model that mtp saved"),
        (lambda f: cut(f / "generation_config.json"), "{folder} holds no phases"),
        (lambda f: cut(f / "tokenizer.json"), "the tokenizer of {folder} could not be read"),
    ],
)
def test_a_damaged_folder_of_mtps_own_is_one_line_that_names_it(whole, tmp_path, break_it, message):
    model, text = build_toy(whole / "one")
    save_model(model, text, tmp_path / "saved")
    load_model(tmp_path / "saved")
    break_it(tmp_path / "saved")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_model(tmp_path / "saved")
    line = one_line(caught.value)
    assert line is not None
    assert re.search(message.replace("{folder}", re.escape(str(tmp_path / "saved"))), line), line
