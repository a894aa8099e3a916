"""A run on streamed conversations: interrupted, resumed, and equal to one that was not."""

import gzip
import json

import pytest
from helpers import records
from toy_text import CHAT, save_toy, toy_tokenizer

import mtp.stages.loop as stage_loop
from mtp.config import RunConfig
from mtp.hub.build import ModelConfig
from mtp.modeling.heads import HeadConfig
from mtp.modeling.phases import Phase
from mtp.rollouts.rollout import DecodingConfig
from mtp.tasks.rows import RowsConfig
from mtp.tasks.streamed_rows import StreamedRows
from mtp.trainer import train
from mtp.training.objectives import ObjectiveConfig
from mtp.training.objectives.head_ce import HeadCE
from mtp.training.objectives.main_ce import MainCE
from mtp.training.runtime import FabricConfig
from mtp.training.stage import ExamplesConfig, StageConfig

PHASES = {
    "thought": Phase(mode="fast", opened_by="<think>"),
    "answer": Phase(mode="slow", opened_by="</think>"),
}


def talk(number):
    thought = f"{number} and one" + " and one" * (number % 5)
    return {
        "messages": [
            {"role": "system", "content": "Add."},
            {"role": "user", "content": f"{number}+1="},
            {"role": "assistant", "content": str(number + 1), "reasoning_content": thought},
            {"role": "user", "content": "and 1?"},
            {"role": "assistant", "content": f"<think>{thought}</think>{number + 2}"},
        ]
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    for number in range(2):
        with gzip.open(folder / f"{number}.jsonl.gz", "wt") as file:
            rows = map(talk, range(30 * number, 30 * number + 30))
            file.writelines(json.dumps(row) + "\n" for row in rows)
    save_toy(folder / "source", toy_tokenizer(chat_template=CHAT), eos_ids=[1, 3])
    return folder


def run(folder, run_dir, **given):
    task = RowsConfig(
        source=str(folder / "*.jsonl.gz"), stream=True, shuffle_rows=10, turns="all", num_test=3
    )
    objective = ObjectiveConfig(main_ce=MainCE(weight=1.0), head_ce=HeadCE(weight=1.0))
    examples = ExamplesConfig(batch_size=4, length_window=3)
    return RunConfig(
        run_dir=str(run_dir),
        task=task,
        model=ModelConfig(source=str(folder / "source")),
        head=HeadConfig(num_slots=3, hidden_size=16, intermediate_size=24, taps=[1, 2]),
        decoding=DecodingConfig(phases=PHASES, max_new_tokens=8),
        fabric=FabricConfig(accelerator="cpu", num_threads=1),
        stages={"joint": StageConfig(steps=7, objective=objective, examples=examples)},
        checkpoint_minutes=0,
        **given,
    )


def test_a_run_on_streamed_conversations_resumes_exactly(folder, tmp_path, monkeypatch):
    whole = run(folder, tmp_path / "whole")
    whole.logger.log_every = 1
    train(whole)
    calls, original = [], stage_loop.take_update

    def die(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(stage_loop, "take_update", die)
    first = run(folder, tmp_path / "parts")
    first.logger.log_every = 1
    with pytest.raises(KeyboardInterrupt):
        train(first)
    monkeypatch.setattr(stage_loop, "take_update", original)
    given, restore = [], StreamedRows.restore
    monkeypatch.setattr(
        StreamedRows, "restore", lambda self, mark: given.append(mark) or restore(self, mark)
    )
    second = run(folder, tmp_path / "parts", resume=True)
    second.logger.log_every = 1
    train(second)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    # Position 16 is in the second window of ten examples, which begins within a row.
    (mark,) = given
    assert [number for number, _ in mark["begins"]] == [0, 1]
    assert [name for name, _ in mark["files"]] == ["0.jsonl.gz", "1.jsonl.gz"]
