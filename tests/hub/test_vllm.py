"""vLLM's weight loader opens an export as main.

vLLM needs no building for this: its source names the files that it reads, maps their names and
refuses unknown ones in plain Python. The functions are taken from an unpacked source release
(`pip download --no-deps --no-binary :all: vllm`), whose folder is in VLLM_SOURCE. The modules that
receive the weights have vLLM's names and shapes.
"""

import ast
import glob
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_export import make
from torch import nn

SOURCE = os.environ.get("VLLM_SOURCE")
pytestmark = pytest.mark.skipif(SOURCE is None, reason="VLLM_SOURCE names no source of vLLM")


class VocabParallelEmbedding(nn.Embedding):
    """vLLM's class of the embedding and of the output layer."""


def definitions(file: str, names: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """Functions and classes of one of vLLM's files, run with the `given` names."""
    path = Path(SOURCE or "") / "vllm" / "model_executor" / file
    found = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names
    ]
    assert {node.name for node in found} == set(names), file
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    module = ast.fix_missing_locations(ast.Module([future, *found], []))
    exec(compile(module, str(path), "exec"), given)  # noqa: S102
    return given


def vllm() -> SimpleNamespace:
    """vLLM's functions that choose the files of a folder and load their weights."""
    quiet = SimpleNamespace(debug=print, warning=print, error=print, warning_once=print)
    space: dict[str, Any] = {
        **{"torch": torch, "nn": nn, "os": os, "json": json, "glob": glob, "itertools": itertools},
        **{"re": re, "dataclass": dataclass, "field": field, "replace": replace, "Any": Any},
        **{"Iterable": Iterable, "Callable": Callable, "Mapping": Mapping, "logger": quiet},
        "ShardIds": Any,
        "VocabParallelEmbedding": VocabParallelEmbedding,
        "SAFE_WEIGHTS_INDEX_NAME": "model.safetensors.index.json",
        "maybe_download_from_modelscope": lambda *args: None,
        "list_filtered_repo_files": lambda model_name_or_path, allow_patterns, revision: [
            *Path(model_name_or_path).glob(allow_patterns[0])
        ],
        "support_quantized_model_reload_from_hp_weights": lambda function: function,
    }
    names = ["filter_duplicate_safetensors_files", "default_weight_loader"]
    definitions("model_loader/weight_utils.py", names, space)
    names = ["WeightsMapper", "_get_tied_embedding_params", "maybe_prefix", "AutoWeightsLoader"]
    definitions("models/utils.py", [*names, "StageMissingLayer", "PPMissingLayer"], space)
    definitions("model_loader/default_loader.py", ["_prepare_weights"], space)
    llama = ast.parse((Path(SOURCE or "") / "vllm/model_executor/models/llama.py").read_text())
    (mapper,) = (
        node.value
        for node in ast.walk(llama)
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "hf_to_vllm_mapper"
        and isinstance(node.value, ast.Call)
    )
    return SimpleNamespace(**space, mapper=eval(ast.unparse(mapper), space))  # noqa: S307


class Fused(nn.Module):
    """A matrix of several of the checkpoint's, as `qkv_proj` and `gate_up_proj` are."""

    def __init__(self, width: int, **rows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((sum(rows.values()), width), torch.nan))
        starts = dict(zip(rows, itertools.accumulate([0, *rows.values()]), strict=False))

        def load(parameter: nn.Parameter, loaded: torch.Tensor) -> None:
            shard = str(loaded.shard_id)  # type: ignore[attr-defined]
            start = starts[shard]
            assert len(loaded) == rows[shard]
            parameter.data[start : start + rows[shard]] = loaded

        self.weight.weight_loader = load  # type: ignore[attr-defined]


def modules(config: Any, vllm: SimpleNamespace) -> nn.Module:
    """A Llama's modules with vLLM's names and shapes, full of NaN."""
    width, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    query, shared = config.num_attention_heads * size, config.num_key_value_heads * size

    def linear(num_in: int, num_out: int) -> nn.Linear:
        return nn.Linear(num_in, num_out, bias=False)

    class Model(nn.Module):
        def load_weights(self, weights: Any) -> set[str]:
            return vllm.AutoWeightsLoader(self).load_weights(weights, mapper=vllm.mapper)

    def layer() -> nn.ModuleDict:
        qkv = Fused(width, q=query, k=shared, v=shared)
        mlp = {"gate_up_proj": Fused(width, **{"0": inner, "1": inner})}
        return nn.ModuleDict(
            {
                "self_attn": nn.ModuleDict({"qkv_proj": qkv, "o_proj": linear(query, width)}),
                "mlp": nn.ModuleDict(mlp | {"down_proj": linear(inner, width)}),
                "input_layernorm": nn.RMSNorm(width),
                "post_attention_layernorm": nn.RMSNorm(width),
            }
        )

    model = Model()
    model.embed_tokens = VocabParallelEmbedding(config.vocab_size, width)
    model.layers = nn.ModuleList([layer() for _ in range(config.num_hidden_layers)])
    model.norm = nn.RMSNorm(width)
    whole = nn.Module()
    whole.model, whole.lm_head = model, VocabParallelEmbedding(config.vocab_size, width)
    if config.tie_word_embeddings:
        whole.lm_head.weight = model.embed_tokens.weight
    for parameter in whole.parameters():
        parameter.data.fill_(torch.nan)
    return whole


@pytest.mark.parametrize("tied", [True, False])
def test_the_loader_reads_main_and_does_not_see_the_head(tmp_path, tied):
    ours, _ = make(tmp_path / "out", tied=tied)
    code = vllm()
    loader = SimpleNamespace(load_config=SimpleNamespace(load_format="auto"))
    _, files, use_safetensors, _ = code._prepare_weights(
        loader, str(tmp_path / "out"), None, None, True, None
    )
    assert use_safetensors and [Path(file).name for file in files] == ["model.safetensors"]
    with safe_open(files[0], "pt") as file:
        weights = [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118
    theirs = modules(ours.config, code)
    code.AutoWeightsLoader(theirs).load_weights(iter(weights))

    main = ours.state_dict()
    expected = {
        "model.embed_tokens.weight": main["model.embed_tokens.weight"],
        "model.norm.weight": main["model.norm.weight"],
        "lm_head.weight": main["lm_head.weight"],
    }
    for number in range(ours.config.num_hidden_layers):
        name = f"model.layers.{number}."
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            expected[f"{name}{part}.weight"] = main[f"{name}{part}.weight"]
        for part in ("input_layernorm", "post_attention_layernorm"):
            expected[f"{name}{part}.weight"] = main[f"{name}{part}.weight"]
        for whole, parts in (
            ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            rows = [main[f"{name}{part}.weight"] for part in parts]
            expected[f"{name}{whole}.weight"] = torch.cat(rows)
    got = theirs.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())


def test_the_loader_would_refuse_the_heads_weights(tmp_path):
    """The place of the head's weights alone keeps the export readable."""
    ours, _ = make(tmp_path / "out")
    code = vllm()
    with safe_open(tmp_path / "out" / "mtp_head" / "model.safetensors", "pt") as file:
        weights = [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118
    with pytest.raises(ValueError, match="no module or parameter named 'mtp_head'"):
        code.AutoWeightsLoader(modules(ours.config, code)).load_weights(iter(weights))
