"""An export format from outside of mtp: registered under a name, `mtp export --format` takes it."""

from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_model

from mtp.config import RunConfig
from mtp.hub.export import export
from mtp.hub.formats import FORMATS, Format, register_format
from mtp.hub.model_card import CARD
from mtp.modeling.phases import Phase
from mtp.rollouts.new_tokenizers import character_tokenizer
from mtp.rollouts.prompt_format import PromptFormat
from mtp.tasks.running_sum import RunningSumConfig

SUMMARY: dict[str, Any] = {"stages": [], "seed": 1}


def write(model: Any, text: PromptFormat, folder: Path, config: RunConfig) -> None:
    """The format: the names of the weights, a line each."""
    folder.mkdir()
    (folder / "names.list").write_text("\n".join(model.state_dict()))


@pytest.fixture
def text() -> PromptFormat:
    """Text of a model that thinks."""
    phases = {
        "thought": Phase(mode="fast", opened_by="<think>"),
        "answer": Phase(mode="slow", opened_by="</think>"),
    }
    tokenizer = character_tokenizer("0123456789+=;", ["<think>", "</think>"])
    return PromptFormat(tokenizer, phases, 4)


@pytest.fixture
def names():
    """The format, registered for one test."""
    register_format("names", Format(write, suffixes=(".list",)))
    yield
    del FORMATS["names"]


def test_it_writes_its_files_beside_a_card_and_replaces_an_export(tmp_path, text, names):
    model, out = tiny_model(), tmp_path / "out"
    for _ in range(2):
        export(
            model, text, out, SUMMARY, RunConfig(run_dir="run", task=RunningSumConfig()), "names"
        )
    assert sorted(path.name for path in out.iterdir()) == [CARD, "names.list"]
    assert "mtp_head." in (out / "names.list").read_text()


def test_a_name_is_registered_once_and_an_unknown_one_is_an_error(tmp_path, text, names):
    with pytest.raises(ValueError, match="a format must have a name of its own, got 'main'"):
        register_format("main", Format(write))
    with pytest.raises(ValueError, match="--format must be one of .*huggingface.*, got 'onnx'"):
        export(
            tiny_model(),
            text,
            tmp_path / "out",
            SUMMARY,
            RunConfig(run_dir="run", task=RunningSumConfig()),
            "onnx",
        )
