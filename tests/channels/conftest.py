"""A random Llama of two layers on a small graph search."""

import pytest
import torch

from mtp.hub.build import ModelConfig, build_model
from mtp.modeling.heads import HeadConfig
from mtp.modeling.phases import Phase
from mtp.rollouts.rollout import DecodingConfig
from mtp.tasks.graph_search import GraphSearchConfig

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
PHASES = {
    "thought": Phase(mode="fast", opened_by="<think>"),
    "answer": Phase(mode="slow", opened_by="</think>"),
}


@pytest.fixture
def task():
    return GraphSearchConfig(min_steps=2, max_steps=3).build()


@pytest.fixture
def built(task):
    torch.manual_seed(0)
    head = HeadConfig(num_slots=3, hidden_size=16, intermediate_size=24)
    return build_model(ModelConfig(config=SIZES), head, DecodingConfig(phases=PHASES), task)
