"""EAGLE-3 draft models: what is written, and that the files alone give the head's logits."""

import importlib.util
import json

import pytest
import torch
from eagle import eagle_model, logits_of_head, plain_logits, states_of_main
from helpers import DRAFT, run_alone, tiny_model
from safetensors.torch import load_file
from test_export import PHASES, SUMMARY, tiny_config, tiny_text

from mtp.hub.build import generation_config
from mtp.hub.export import export
from mtp.hub.formats.speculators import verifier
from mtp.training.stage import StageConfig

LAYER_KEYS = {
    "input_layernorm", "hidden_norm", "post_attention_layernorm", "self_attn.q_proj",
    "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
}  # fmt: skip
TEXT, BLOCK = [5, 9, 14, 3, 8, 20], [4, 11, 6]


def write(folder, format, config=None, **settings):
    """Export a model with an EAGLE-3 head; returns the model and the content of config.json."""
    model, text = eagle_model(**{"taps": [1, 2, 3], **settings}), tiny_text()
    model.generation_config = generation_config(text, PHASES)
    export(model, text, folder, SUMMARY, config or tiny_config(), format)
    return model, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("settings", [{}, {"drafts": DRAFT}, {"drafts": DRAFT, "tied": True}])
@pytest.mark.parametrize("format", ["eagle3", "speculators"])
@torch.no_grad()
def test_the_files_alone_give_the_logits_of_the_head(tmp_path, format, settings):
    model, config = write(tmp_path / "draft", format, **settings)
    export(model, tiny_text(), tmp_path / "main", SUMMARY, tiny_config(), "main")
    if format == "eagle3":  # SGLang's layer i is the state after layer i
        layers = [i + 1 for i in config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]]
    else:
        layers = config["eagle_aux_hidden_state_layer_ids"]
    hidden, embed = states_of_main(tmp_path / "main", layers, TEXT)
    found = plain_logits(tmp_path / "draft", hidden, embed, TEXT, BLOCK)
    torch.testing.assert_close(found, logits_of_head(model, TEXT, BLOCK), atol=1e-5, rtol=1e-5)
    d2t = load_file(tmp_path / "draft" / "model.safetensors")["d2t"]
    expected = DRAFT if settings else list(range(23))
    assert (torch.arange(len(d2t)) + d2t).tolist() == expected


@torch.no_grad()
def test_a_head_with_embeddings_of_its_own_writes_them(tmp_path):
    settings = {"drafts": DRAFT, "shared_embeddings": False, "width": 16, "taps": [0, 2, 3]}
    model, config = write(tmp_path / "draft", "speculators", **settings)
    export(model, tiny_text(), tmp_path / "main", SUMMARY, tiny_config(), "main")
    assert config["target_hidden_size"] == 32
    hidden, _ = states_of_main(tmp_path / "main", [0, 2, 3], TEXT)
    own = load_file(tmp_path / "draft" / "model.safetensors")["embed_tokens.weight"]
    found = plain_logits(tmp_path / "draft", hidden, own, TEXT, BLOCK)
    torch.testing.assert_close(found, logits_of_head(model, TEXT, BLOCK), atol=1e-5, rtol=1e-5)


def test_names_shapes_and_dtypes_are_those_of_the_format(tmp_path):
    config = tiny_config()
    config.fabric.precision = "bf16-mixed"
    _, found = write(tmp_path / "speculators", "speculators", config, drafts=DRAFT)
    weights = load_file(tmp_path / "speculators" / "model.safetensors")
    names = {f"layers.0.{name}.weight" for name in LAYER_KEYS}
    assert weights.keys() == names | {
        "fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d",
    }  # fmt: skip
    assert weights["fc.weight"].shape == (32, 96)
    assert weights["layers.0.self_attn.q_proj.weight"].shape == (32, 64)
    assert weights["lm_head.weight"].shape == (11, 32)
    assert weights["d2t"].dtype == torch.int64 and weights["t2d"].dtype == torch.bool
    assert {w.dtype for n, w in weights.items() if n.endswith(".weight")} == {torch.bfloat16}
    layer = found.pop("transformer_layer_config")
    methods = found["speculators_config"]
    assert found == {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": found["speculators_version"],
        "draft_vocab_size": 11,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "speculators_config": methods,
    }
    assert methods["algorithm"] == "eagle3" and methods["default_proposal_method"] == "greedy"
    assert [m["speculative_tokens"] for m in methods["proposal_methods"]] == [3]
    assert methods["verifier"] == {"name_or_path": None, "architectures": ["LlamaForCausalLM"]}
    _, flat = write(tmp_path / "eagle3", "eagle3", config, drafts=DRAFT)
    assert flat == layer | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": 11,
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
        },
    }
    assert (layer["vocab_size"], layer["num_hidden_layers"], layer["head_dim"]) == (23, 1, 8)
    same = load_file(tmp_path / "eagle3" / "model.safetensors")
    assert {name.replace("midlayer.", "layers.0.") for name in same} == weights.keys()
    for name, weight in same.items():
        assert torch.equal(weight, weights[name.replace("midlayer.", "layers.0.")])


def test_main_is_named_where_the_run_left_it_as_it_was():
    config = tiny_config()
    config.model.source = "someone/a-model"
    config.stages = {"head": StageConfig(train_main=False)}
    assert verifier(config) == "someone/a-model"
    config.stages["joint"] = StageConfig()
    assert verifier(config) is None
    config.stages.pop("joint")
    config.model.add_tokens = ["<think>"]
    assert verifier(config) is None


def test_the_card_says_what_the_files_belong_to(tmp_path):
    write(tmp_path / "draft", "speculators", drafts=DRAFT)
    card = (tmp_path / "draft" / "README.md").read_text()
    assert "`mtp export --format main`" in card and "`hidden_states`" in card
    assert '"method": "eagle3"' in card and '"num_speculative_tokens": 3' in card


@pytest.mark.parametrize("format", ["eagle3", "speculators"])
def test_what_a_server_would_decode_otherwise_is_refused(tmp_path, format):
    model, text = tiny_model(), tiny_text()
    with pytest.raises(ValueError, match="must be given a model with head.type=eagle3, got eavesd"):
        export(model, text, tmp_path / "out", SUMMARY, tiny_config(), format)
    for taps in ([1, 2], [2, 3, 4]):
        with pytest.raises(ValueError, match=rf"3 head.taps below 4, .* got \[{taps[0]}, "):
            write(tmp_path / "out", format, taps=taps)
    with pytest.raises(ValueError, match="main's embedding .* must be a plain nn.Linear"):
        write(tmp_path / "out", format, family="gemma3_text")
    if format == "eagle3":
        with pytest.raises(ValueError, match="head.taps of at least 1, got"):
            write(tmp_path / "out", format, taps=[0, 2, 3])
        with pytest.raises(ValueError, match="head.shared_embeddings=true"):
            write(tmp_path / "out", format, shared_embeddings=False)
    assert not (tmp_path / "out").exists()


def test_an_export_of_the_whole_opens_by_both_doors_without_mtp(tmp_path):
    model, _ = write(tmp_path / "out", "huggingface", drafts=DRAFT)
    ids = torch.tensor([[2, 5, 6, 7, 8], [0, 0, 2, 9, 4]])
    given = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": 20}
    expected = {}
    for mode in ("fast", "slow", "verified"):
        out = model.generate(**given, mtp_mode=mode, return_dict_in_generate=True)
        expected[mode] = [out.sequences.tolist(), out.passes.tolist()]
    (tmp_path / "cache").mkdir()
    script = f"""
import json, torch
from transformers import AutoModelForCausalLM
folder = {str(tmp_path / "out")!r}
stock, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
assert type(stock).__name__ == "LlamaForCausalLM"
assert not info["unexpected_keys"] and not info["missing_keys"], info
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.tensor({ids.tolist()})
given = {{"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": 20}}
assert torch.equal(stock(ids[:1]).logits, model(ids[:1]).logits)
found = {{}}
for mode in ("fast", "slow", "verified"):
    out = model.generate(**given, mtp_mode=mode, return_dict_in_generate=True)
    found[mode] = [out.sequences.tolist(), out.passes.tolist()]
print(json.dumps([found, model.mtp_head.draft_tokens.tolist()]))
"""
    found = json.loads(run_alone(script, tmp_path / "cache").strip().splitlines()[-1])
    assert found == [expected, DRAFT]


@pytest.mark.skipif(
    importlib.util.find_spec("speculators") is None,
    reason="needs `pip install --no-deps speculators` and what it imports",
)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_the_speculators_library_opens_it_and_gives_the_same_logits(tmp_path):
    """Its own class and its own forward, which unrolls the slots of every position at once."""
    from speculators import SpeculatorModel

    model, _ = write(tmp_path / "draft", "speculators", drafts=DRAFT)
    export(model, tiny_text(), tmp_path / "main", SUMMARY, tiny_config(), "main")
    path = tmp_path / "draft" / "config.json"
    content = json.loads(path.read_text())
    content["speculators_config"]["verifier"]["name_or_path"] = str(tmp_path / "main")
    # Its own default, flex attention, compiles for a minute.
    content["transformer_layer_config"]["attn_implementation"] = "eager"
    path.write_text(json.dumps(content))
    theirs = SpeculatorModel.from_pretrained(tmp_path / "draft")
    assert type(theirs).__name__ == "Eagle3DraftModel"
    whole, captured = [*TEXT, *BLOCK], []
    hidden, _ = states_of_main(tmp_path / "main", [1, 2, 3], whole)
    theirs.lm_head.register_forward_hook(lambda module, given, out: captured.append(out))
    theirs(
        hidden_states=hidden[None],
        input_ids=torch.tensor([[*whole[1:], 0]]),
        document_ids=torch.zeros(1, len(whole), dtype=torch.int64),
        ttt_steps=len(BLOCK),
    )
    found = torch.stack([logits[0, len(TEXT) - 1] for logits in captured])
    torch.testing.assert_close(found, logits_of_head(model, TEXT, BLOCK), atol=1e-4, rtol=1e-4)
