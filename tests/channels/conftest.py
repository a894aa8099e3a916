"""A random Llama of two layers on a small graph search."""

import pytest
import torch
from toy import PHASES, SIZES

from mtp.hub.build import ModelConfig, build_model
from mtp.modeling.heads import HeadConfig
from mtp.rollouts.rollout import DecodingConfig
from mtp.tasks.graph_search import GraphSearchConfig


@pytest.fixture
def task():
    return GraphSearchConfig(min_steps=2, max_steps=3).build()


@pytest.fixture
def built(task):
    torch.manual_seed(0)
    head = HeadConfig(num_slots=3, hidden_size=16, intermediate_size=24)
    return build_model(
        ModelConfig(config=SIZES | {"initializer_range": 0.3}),
        head,
        DecodingConfig(phases=PHASES),
        task,
    )
