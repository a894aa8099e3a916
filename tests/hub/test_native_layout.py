"""`--format native_mtp`: transformers decodes with the head, without mtp."""

import json

import pytest
import torch
from families import FAMILIES, SIZES
from helpers import run_alone
from safetensors.torch import load_file
from test_export import PHASES, SUMMARY, tiny_config, tiny_model, tiny_text
from transformers import CONFIG_MAPPING

from mtp.hub.build import ModelConfig, build_model, generation_config
from mtp.hub.export import export
from mtp.modeling.heads import HeadConfig
from mtp.modeling.modeling_mtp import family_class
from mtp.modeling.versions import MtpLayer
from mtp.rollouts.rollout import DecodingConfig
from mtp.tasks.running_sum import RunningSumConfig

pytestmark = pytest.mark.skipif(
    MtpLayer is None, reason="transformers before 5.14 has no MTP layers"
)

PROMPT, NUM_TOKENS = [5, 6, 7, 8, 9, 10], 24
HEAD = HeadConfig(type="native_mtp", num_slots=3, hidden_size=32)


def native_model(family, depth):
    """A random model of a depth, with the vocabulary of `tiny_text`."""
    torch.manual_seed(0)
    fields = SIZES | FAMILIES[family]
    fields |= {"vocab_size": len(tiny_text().tokenizer), "num_hidden_layers": depth}
    config = CONFIG_MAPPING[family](**fields)
    config.mtp = HEAD.to_checkpoint()
    model = family_class(family)(config).eval()
    model.generation_config = generation_config(tiny_text(), PHASES)
    return model


def teach_greedy(model, steps):
    """Train the head to write what main writes after the prompt, so that drafts are accepted."""
    with torch.no_grad():
        text = list(PROMPT)
        for _ in range(NUM_TOKENS):
            hidden, _ = model.main_hidden(torch.tensor([text]))
            text.append(int(model.output_layers()[0].logits(hidden[0, -1]).argmax()))
    tokens, anchors = torch.tensor([text]), torch.arange(len(PROMPT) - 1, len(text) - 3)
    blocks = tokens[0].unfold(0, 3, 1)[anchors + 1]
    model.requires_grad_(False)
    model.mtp_head.requires_grad_(True)
    optimizer = torch.optim.Adam(model.mtp_head.parameters(), lr=1e-2)
    for _ in range(steps):
        rows = model.replay(tokens, anchors, blocks)
        logits = rows.head_output.logits(rows.head_hidden[:, 0])
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, anchors + 2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


SCRIPT = """
import json, torch
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel
model, info = AutoModelForCausalLM.from_pretrained({folder!r}, output_loading_info=True)
assert not info["unexpected_keys"] and not info["missing_keys"], info
calls, forward = [], MtpModel.forward
def recording(self, *args, **given):
    out = forward(self, *args, **given)
    calls.append([given["full_input_ids"][0].tolist(), out[1][0, 0].tolist()])
    return out
MtpModel.forward = recording
given = dict(max_new_tokens={number}, do_sample=False, eos_token_id=None)
ids = torch.tensor([{prompt}])
texts = [model.generate(ids, **given, **mtp)[0].tolist() for mtp in ({{}}, {{"use_mtp": True}})]
print(json.dumps([texts, calls]))
"""


@pytest.mark.parametrize(
    ("family", "depth"),
    [
        ("mellum", 3),
        pytest.param("glm4_moe", 46, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", 61, marks=pytest.mark.slow),
    ],
)
def test_transformers_decodes_with_the_head_and_gives_its_logits(tmp_path, family, depth):
    model = native_model(family, depth)
    teach_greedy(model, 40)
    folder, cache = tmp_path / "out", tmp_path / "cache"
    export(model, tiny_text(), folder, SUMMARY, tiny_config(), "native_mtp")
    cache.mkdir()
    script = SCRIPT.format(folder=str(folder), number=NUM_TOKENS, prompt=PROMPT)
    (plain, drafted), calls = json.loads(run_alone(script, cache).strip().splitlines()[-1])
    assert drafted == plain
    # One draft for each pass, and most are accepted.
    assert len(calls) < 0.7 * NUM_TOKENS
    for text, logits in calls:
        with torch.no_grad():
            anchor, block = torch.tensor([len(text) - 2]), torch.tensor([[text[-1]] * 3])
            rows = model.replay(torch.tensor([text[:-1]]), anchor, block)
            expected = rows.head_output.logits(rows.head_hidden[0, 0])
        torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-4, rtol=1e-4)


def built(folder):
    return build_model(
        ModelConfig(source=str(folder), add_tokens=["<think>", "</think>"]),
        HEAD,
        DecodingConfig(phases=PHASES),
        RunningSumConfig().build(),
    )[0]


def test_a_new_head_begins_as_the_layer_of_its_checkpoint(tmp_path):
    model = native_model("mellum", 3)
    weights = model.mtp_head.layer.state_dict()
    for format, has_layer in (("native_mtp", True), ("main", False)):
        export(model, tiny_text(), tmp_path / format, SUMMARY, tiny_config(), format)
        found = built(tmp_path / format).mtp_head.layer.state_dict()
        same = [torch.equal(found[n], w) for n, w in weights.items() if n.endswith("proj.weight")]
        assert set(same) == {has_layer}


def test_the_card_and_the_config_say_how_it_is_opened(tmp_path):
    export(native_model("mellum", 3), tiny_text(), tmp_path / "out", SUMMARY, tiny_config(),
           "native_mtp")  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    assert config["mtp_layer_types"] == ["sliding_attention"]
    assert config["architectures"] == ["MellumForCausalLM"] and "mtp" not in config
    assert "use_mtp=True" in (tmp_path / "out" / "README.md").read_text()


def test_what_transformers_would_not_open_is_refused(tmp_path):
    for model, message in (
        (tiny_model(), "must be given a model with head.type=native_mtp, got eavesdrop"),
        (
            native_model("deepseek_v3", 3),
            r"DeepseekV3ForCausalLM .*layers\\\.61.*, got model.layer",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            export(model, tiny_text(), tmp_path / "out", SUMMARY, tiny_config(), "native_mtp")
    assert not (tmp_path / "out").exists()


def test_the_layer_has_the_dtype_of_main(tmp_path):
    config = tiny_config()
    config.fabric.precision = "bf16-mixed"
    export(native_model("mellum", 3), tiny_text(), tmp_path / "out", SUMMARY, config, "native_mtp")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert any(name.startswith("mtp.") for name in state)
    assert {weight.dtype for weight in state.values()} == {torch.bfloat16}
