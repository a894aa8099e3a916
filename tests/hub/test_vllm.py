"""vLLM's own loader, run on an export's files: its choice of files, its names, its shapes.

vLLM itself is not needed, only its source (`pip download --no-deps --no-binary :all: vllm`),
unpacked to the folder that `VLLM_SOURCE` names. What is run are the classes and functions below,
cut out of it. The modules that they load into have vLLM's names for a Llama.
"""

import ast
import glob
import json
import os
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import regex
import torch
from safetensors.torch import load_file
from test_export import make
from torch import nn

SOURCE = Path(os.environ.get("VLLM_SOURCE", "nowhere")) / "vllm" / "model_executor"
pytestmark = pytest.mark.skipif(not SOURCE.is_dir(), reason="VLLM_SOURCE is not set")


def cut_out(file, names, known):
    """Run some definitions of a file of vLLM, which find what they use in `known`."""
    body = [
        node
        for node in ast.parse((SOURCE / file).read_text()).body
        if getattr(node, "name", None) in names
    ]
    assert {node.name for node in body} == set(names)
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module(future + body, []), file, "exec"), known)


@pytest.fixture(scope="module")
def vllm():
    import dataclasses
    import itertools
    from collections.abc import Iterable, Mapping
    from typing import Any

    known: dict[str, Any] = {
        "nn": nn, "torch": torch, "re": regex, "json": json, "os": os, "itertools": itertools,
        "Iterable": Iterable, "Mapping": Mapping, "Any": Any, "logger": MagicMock(),
        "dataclass": dataclasses.dataclass, "field": dataclasses.field,
        "replace": dataclasses.replace, "default_weight_loader": load,
        "VocabParallelEmbedding": nn.Embedding, "StageMissingLayer": (), "PPMissingLayer": (),
        "support_quantized_model_reload_from_hp_weights": lambda function: function,
    }  # fmt: skip
    cut_out(
        "models/utils.py",
        ["WeightsMapper", "AutoWeightsLoader", "_get_tied_embedding_params", "maybe_prefix"],
        known,
    )
    cut_out("model_loader/weight_utils.py", ["filter_duplicate_safetensors_files"], known)
    tree = ast.parse((SOURCE / "models/llama.py").read_text())
    llama = next(node for node in tree.body if getattr(node, "name", None) == "LlamaModel")
    mapper = next(n for n in llama.body if isinstance(n, ast.Assign))
    exec(compile(ast.Module([mapper], []), "llama.py", "exec"), known)
    return SimpleNamespace(**{name: known[name] for name in known if name.isidentifier()})


def load(parameter, weight):
    assert parameter.shape == weight.shape
    parameter.data.copy_(weight)


class Stacked(nn.Module):
    """A matrix of vLLM that is made of several of the checkpoint."""

    def __init__(self, width, parts):
        super().__init__()
        self.weight = nn.Parameter(torch.full((sum(parts.values()), width), torch.nan))
        self.weight.weight_loader = self.load
        self.parts = parts

    def load(self, parameter, weight):
        before = 0
        for part, size in self.parts.items():
            if part == weight.shard_id:
                load(parameter.data[before : before + size], weight)
            before += size


def matrix(rows, columns):
    module = nn.Module()
    module.weight = nn.Parameter(torch.full((rows, columns), torch.nan))
    return module


def norm(width):
    module = nn.Module()
    module.weight = nn.Parameter(torch.full((width,), torch.nan))
    return module


def vllm_llama(config):
    """Modules with the names and shapes that vLLM's Llama has."""
    width, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, shared = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    layers = nn.ModuleList()
    for _ in range(config["num_hidden_layers"]):
        layer = nn.Module()
        layer.self_attn, layer.mlp = nn.Module(), nn.Module()
        layer.self_attn.qkv_proj = Stacked(width, {"q": heads, "k": shared, "v": shared})
        layer.self_attn.o_proj = matrix(width, heads)
        layer.mlp.gate_up_proj = Stacked(width, {0: inner, 1: inner})
        layer.mlp.down_proj = matrix(width, inner)
        layer.input_layernorm, layer.post_attention_layernorm = norm(width), norm(width)
        layers.append(layer)
    whole = nn.Module()
    whole.model = nn.Module()
    whole.model.embed_tokens, whole.model.layers = matrix(config["vocab_size"], width), layers
    whole.model.norm, whole.lm_head = norm(width), matrix(config["vocab_size"], width)
    return whole


def test_vllms_loader_takes_mains_weights_and_all_of_them(tmp_path, vllm):
    model, _ = make(tmp_path / "out")
    folder = str(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    files = glob.glob(os.path.join(folder, "*.safetensors"))  # as `_prepare_weights` does
    index = "model.safetensors.index.json"
    files = vllm.filter_duplicate_safetensors_files(files, folder, index)
    weights = [pair for file in sorted(files) for pair in load_file(file).items()]
    target = vllm_llama(config)
    mapped = vllm.hf_to_vllm_mapper.apply(weights)
    loaded = vllm.AutoWeightsLoader(target).load_weights(mapped)
    assert set(loaded) == {name for name, _ in target.named_parameters()}
    assert not any(parameter.isnan().any() for parameter in target.parameters())
    main = model.model.layers[1]
    parts = [getattr(main.self_attn, f"{name}_proj").weight for name in "qkv"]
    assert torch.equal(target.model.layers[1].self_attn.qkv_proj.weight, torch.cat(parts))
    assert torch.equal(target.lm_head.weight, model.lm_head.weight)


def test_vllms_loader_refuses_weights_that_it_has_no_place_for(tmp_path, vllm):
    """The earlier layout, which this test would show if it came back."""
    model, _ = make(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    weights = vllm.hf_to_vllm_mapper.apply(model.state_dict().items())
    with pytest.raises(ValueError, match="no module or parameter named .mtp_head."):
        vllm.AutoWeightsLoader(vllm_llama(config)).load_weights(weights)
