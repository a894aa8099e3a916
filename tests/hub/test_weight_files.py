"""Files of main's and the head's weights, and folders that either loading path saves again."""

import json

import pytest
import torch
from helpers import run_alone, tiny_model
from safetensors.torch import load_file, save_file
from test_export import make
from transformers import AutoModelForCausalLM

from mtp.modeling.modeling_mtp import FAMILIES

IDS = torch.tensor([[2, 5, 6, 7, 8]])

AGAIN = """
import json, pathlib, torch
from transformers import AutoModelForCausalLM
out, ids = pathlib.Path({out!r}), torch.tensor({ids})
def fast(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return model, model.generate(ids, mtp_mode="fast", max_new_tokens=12).tolist()
model, found = fast(out / "export")
model.save_pretrained(out / "one")
model.save_pretrained(out / "shards", max_shard_size="8KB")
stock = AutoModelForCausalLM.from_pretrained(out / "export")
stock.save_pretrained(out / "stock")
print(json.dumps([found, fast(out / "one")[1], fast(out / "shards")[1]]))
"""


def test_what_re_saving_gives_through_either_door_where_mtp_is_not_importable(tmp_path):
    model, _ = make(tmp_path / "export")
    expected = model.generate(IDS, mtp_mode="fast", max_new_tokens=12).tolist()
    cache = tmp_path / "cache"
    cache.mkdir()
    script = AGAIN.format(out=str(tmp_path), ids=IDS.tolist())
    assert json.loads(run_alone(script, cache).splitlines()[-1]) == [expected] * 3
    logits = model(IDS).logits
    for name in ("one", "shards", "stock"):
        opened, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
        assert torch.equal(opened(IDS).logits, logits), name
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert "transformers_weights" not in config
        assert (tmp_path / name / "mtp_head").is_dir() == (name != "stock")
        assert (tmp_path / name / "modeling_mtp.py").is_file() == (name != "stock")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1


def test_an_export_of_one_file_as_earlier_versions_wrote_it_opens(tmp_path):
    model, _ = make(tmp_path / "out")
    head = tmp_path / "out" / "mtp_head"
    main = tmp_path / "out" / "model.safetensors"
    save_file(load_file(main) | load_file(head / "model.safetensors"), main)
    for path in head.iterdir():
        path.unlink()
    head.rmdir()
    opened = FAMILIES["llama"].from_pretrained(tmp_path / "out")
    saved = dict(opened.named_parameters())
    assert all(torch.equal(saved[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("given", [{}, {"dtype": torch.bfloat16}, {"dtype": "auto"}])
def test_the_class_opens_a_folder_without_a_config_given(tmp_path, given):
    model, _ = make(tmp_path / "out", "qwen3", tied=True)
    opened = FAMILIES["qwen3"].from_pretrained(
        tmp_path / "out", attn_implementation="eager", **given
    )
    assert opened.dtype == (torch.float32 if given in ({}, {"dtype": "auto"}) else torch.bfloat16)
    assert opened.config._attn_implementation == "eager"
    saved = dict(opened.named_parameters())
    assert all(torch.equal(saved[n], p.to(opened.dtype)) for n, p in model.named_parameters())


def test_the_index_names_every_weight_and_its_file(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "mtp_head" / "whole.safetensors.index.json").read_text())
    files = {name: load_file(tmp_path / name) for name in set(index["weight_map"].values())}
    assert set(files) == {"model.safetensors", "mtp_head/model.safetensors"}
    assert {n: f for f, weights in files.items() for n in weights} == index["weight_map"]
    assert index["weight_map"].keys() == model.state_dict().keys()


def test_saving_straight_to_the_hub_would_leave_the_head_behind(tmp_path):
    with pytest.raises(ValueError, match="push_to_hub must be False"):
        tiny_model().save_pretrained(tmp_path, push_to_hub=True)
