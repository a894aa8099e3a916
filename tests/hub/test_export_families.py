"""Exports of several families open in both ways where mtp is not importable.

The families have fused experts, buffers that no file holds, learned positions, tied embeddings,
windows, softcaps, biases and recurrent states.
"""

import json

import pytest
import torch
from families import SUPPORTED, tiny_family
from family_checks import stock_of
from helpers import run_alone
from test_export import PHASES, SUMMARY, tiny_config, tiny_text
from transformers import AutoModelForCausalLM

from mtp.hub.build import generation_config
from mtp.hub.export import export
from mtp.hub.pretrained import read_model
from mtp.modeling.heads import HeadConfig
from mtp.modeling.modeling_mtp import family_class

FEW = ("gemma2", "gpt2", "mixtral", "gptj", "phi", "deepseek_v3", "falcon_h1")
MODES = ("fast", "slow", "verified")
SCRIPT = """
import json, torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
ids = torch.tensor(IDS)
given = dict(input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=20)
got = {}
for name in NAMES:
    folder = FOLDER + "/" + name
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    got[name] = dict(classes=[type(model).__name__, type(stock).__name__])
    for mode in MODES:
        got[name][mode] = model.generate(**given, mtp_mode=mode).tolist()
    with torch.no_grad():
        got[name]["logits"] = [m(ids[:1]).logits.tolist() for m in (model, stock)]
print(json.dumps(got))
"""


def check_exports(tmp_path, families):
    """Export each family, and compare what both ways of loading give with the model itself."""
    ids = torch.tensor([[2, 5, 6, 7, 8, 3, 4, 6, 9, 3, 5], [0, 0, 0, 0, 0, 0, 0, 0, 2, 9, 4]])
    given = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": 20}
    expected, text = {}, tiny_text()
    for family in families:
        model = tiny_family(family)
        model.generation_config = generation_config(text, PHASES)
        export(model, text, tmp_path / family, SUMMARY, tiny_config())
        expected[family] = {mode: model.generate(**given, mtp_mode=mode) for mode in MODES}
        with torch.no_grad():
            expected[family]["logits"] = model(ids[:1]).logits
        expected[family]["name"] = type(model).__name__
    script = SCRIPT.replace("IDS", str(ids.tolist())).replace("NAMES", str(list(families)))
    script = script.replace("FOLDER", repr(str(tmp_path))).replace("MODES", str(MODES))
    (tmp_path / "cache").mkdir()
    got = json.loads(run_alone(script, tmp_path / "cache"))
    for family, values in expected.items():
        name = values["name"]
        assert got[family]["classes"] == [name, name.replace("MTP", "", 1)]
        for logits in got[family]["logits"]:
            torch.testing.assert_close(torch.tensor(logits), values["logits"], msg=family)
        for mode in MODES:
            assert got[family][mode] == values[mode].tolist(), (family, mode)


def test_exports_of_families_open_in_both_ways_where_mtp_is_not_importable(tmp_path):
    check_exports(tmp_path, FEW)


@pytest.mark.slow
def test_exports_of_all_families_open_in_both_ways_where_mtp_is_not_importable(tmp_path):
    check_exports(tmp_path, SUPPORTED)


@pytest.mark.parametrize("family", FEW)
def test_a_stock_checkpoint_opens_with_all_its_weights(tmp_path, family):
    model = tiny_family(family)
    stock = stock_of(model, family)
    stock.save_pretrained(tmp_path)
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    config.mtp = HeadConfig(num_slots=3, hidden_size=16, intermediate_size=24).to_checkpoint()
    opened = read_model(
        family_class(family), tmp_path, "it", config, new_head=True, dtype=torch.float32
    ).eval()
    ids = torch.tensor([[2, 5, 6, 7, 8, 3, 4, 6, 9, 3, 5]])
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, stock(ids).logits)
