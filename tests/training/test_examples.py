"""Problems that are too long are dropped and counted; what would be read wrongly is refused."""

import logging
from types import SimpleNamespace

import pytest
from toy_text import save_toy, toy_tokenizer, write_rows

from mtp.config import RunConfig
from mtp.hub.build import ModelConfig
from mtp.modeling.heads import HeadConfig
from mtp.modeling.phases import Phase
from mtp.modeling.segments import SegmentSettings
from mtp.reports.loggers import FilesConfig, LoggerConfig
from mtp.rollouts.new_tokenizers import character_tokenizer
from mtp.rollouts.prompt_format import PromptFormat
from mtp.rollouts.rollout import DecodingConfig
from mtp.tasks.base import Example, Task
from mtp.tasks.rows import RowsConfig
from mtp.trainer import train
from mtp.training import examples
from mtp.training.examples import FittedTask
from mtp.training.objectives import ObjectiveConfig
from mtp.training.objectives.head_ce import HeadCE
from mtp.training.objectives.main_ce import MainCE
from mtp.training.runtime import FabricConfig
from mtp.training.stage import ExamplesConfig, RolloutsConfig, StageConfig

PHASES = {
    "thought": Phase(mode="fast", opened_by="<think>"),
    "answer": Phase(mode="slow", opened_by="</think>"),
}
TEXT = PromptFormat(toy_tokenizer(), PHASES, 4)
MODEL = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=256))


def fit(task, config, model, text):
    return examples.fit_task(task, config.decoding, config.active_stages(), model, text)


def checked(task, config, model, text):
    return examples.checked_task(
        task,
        config.decoding,
        config.active_stages(),
        model,
        text,
        config.evaluation.num_problems,
    )


def stages(**given):
    main = ObjectiveConfig(main_ce=MainCE(weight=1.0))
    both = ObjectiveConfig(main_ce=MainCE(weight=1.0), head_ce=HeadCE(weight=1.0))
    only = ObjectiveConfig(head_ce=HeadCE(weight=1.0))
    given["examples"] = ExamplesConfig(batch_size=given.pop("batch_size", 4))
    return {
        "main": StageConfig(steps=2, train_head=False, objective=main, **given),
        "head": StageConfig(
            steps=2, train_main=False, channel_gradient=0.0, objective=only, **given
        ),
        "joint": StageConfig(steps=2, objective=both, **given),
    }


def run_config(**given):
    decoding = given.pop("decoding", DecodingConfig(phases=PHASES, max_new_tokens=16))
    return RunConfig(**{"run_dir": "", "decoding": decoding, "stages": stages(), **given})


def rows(number, **given):
    return [
        {"prompt": f"{i}+{i}=", "thought": f"{i} and {i}", "answer": 2 * i, **given}
        for i in range(number)
    ]


def rows_task(folder, content, **given):
    source = write_rows(folder / "rows.jsonl", content)
    return RowsConfig(source=source, num_test=999, **given).build()


class Counted(Task):
    """Problem i is `i` and as many letters; unlimited unless `number` is set."""

    name = "counted"

    def __init__(self, number=None, longest=10**6):
        self.number, self.longest = number, longest

    def size(self, split):
        return self.number

    def example(self, split, index):
        letters = "x" * (self.longest if split == "train" and index % 3 == 1 else index % 5)
        return Example(f"{split}{index}{letters}", "4", "2+2")


def test_what_fits_before_the_answer_is_the_limit_of_a_prompt():
    decoding = DecodingConfig(phases=PHASES, max_new_tokens=40)
    assert decoding.prompt_limit(256) == 216
    assert decoding.prompt_limit(None) is None
    decoding.max_prompt_tokens = 100
    assert decoding.prompt_limit(256) == decoding.prompt_limit(None) == 100
    decoding.max_prompt_tokens = 217
    with pytest.raises(ValueError, match="max_prompt_tokens must be at most 216, .* got 217"):
        decoding.prompt_limit(256)
    decoding.max_prompt_tokens = 0
    with pytest.raises(ValueError, match="max_prompt_tokens must be null or at least 1, got 0"):
        decoding.sampler()
    with pytest.raises(ValueError, match="decoding.max_new_tokens must leave room .* got 256"):
        DecodingConfig(max_new_tokens=256).prompt_limit(256)
    segments = SegmentSettings(max_segments=2, memory_tokens=30, recent_tokens=10)
    assert DecodingConfig(max_new_tokens=40, segments=segments).prompt_limit(256) == 216 - 43


@pytest.mark.parametrize("length", [400, 5_000_000])
def test_rows_that_are_too_long_are_dropped_and_counted(tmp_path, caplog, length, monkeypatch):
    content = rows(60)
    for i in (3, 7, 50):
        content[i]["prompt"] += "é" * length
    task = rows_task(tmp_path, content)
    longest = max(len(r["prompt"]) for r in rows(60))
    encoded = []
    encode = type(TEXT)._encode
    monkeypatch.setattr(
        type(TEXT), "_encode", lambda self, text: encoded.append(len(text)) or encode(self, text)
    )
    with caplog.at_level(logging.WARNING):
        fitted = checked(task, run_config(), MODEL, TEXT)
    kept = [fitted.example(s, i) for s in ("train", "test") for i in range(fitted.size(s))]
    assert {e.prompt for e in kept} == {
        r["prompt"] for i, r in enumerate(rows(60)) if i not in (3, 7, 50)
    }
    assert len(kept) == 57 and max(len(e.prompt) for e in kept) == longest
    assert sum("dropped" in line for line in caplog.messages) in (1, 2)
    dropped = sum(int(line.split("dropped ")[1].split()[0]) for line in caplog.messages)
    assert dropped == 3 and "240 tokens of a prompt" in caplog.text
    if length > 10_000:
        assert max(encoded) < 10_000, "characters alone decide"


def test_solved_examples_that_are_too_long_are_dropped_from_training_alone(tmp_path, caplog):
    content = rows(60)
    for row in content:
        row["thought"] += "é" * 300 * (row["prompt"] in ("3+3=", "7+7="))
    task = rows_task(tmp_path, content, test_share=0.3)
    config = run_config()
    with caplog.at_level(logging.WARNING):
        fitted = fit(task, config, MODEL, TEXT)
        train = {fitted.example("train", i).prompt for i in range(fitted.size("train"))}
        assert fitted.size("test") == task.size("test")
    every = {task.example("train", i).prompt for i in range(task.size("train"))}
    assert train == every - {"3+3=", "7+7="}
    assert "256 tokens of a solved example" in caplog.text
    config.stages = {"rl": StageConfig(rollouts=RolloutsConfig(num_prompts=4), steps=1)}
    assert fit(task, config, MODEL, TEXT).size("train") == task.size("train")


def test_the_exact_limit_is_kept():
    prompt = "é" * 50
    number = len(TEXT.prompt_ids(prompt))

    class One(Counted):
        def example(self, split, index):
            return Example(prompt, "4", "2+2")

    total = sum(map(len, TEXT.example_ids(Example(prompt, "4", "2+2"))))
    assert FittedTask(One(5), TEXT, prompt_limit=number).example("test", 0).prompt == prompt
    assert FittedTask(One(5), TEXT, text_limit=total).example("train", 0).prompt == prompt
    for limits in ({"prompt_limit": number - 1}, {"text_limit": total - 1}):
        with pytest.raises(ValueError, match="are too long"):
            FittedTask(One(5), TEXT, **limits).example("train", 0)


@pytest.mark.parametrize("number", [None, 1000])
def test_generated_problems_that_are_too_long_are_replaced_the_same_at_every_call(number, caplog):
    fitted = FittedTask(Counted(number), TEXT, prompt_limit=100)
    with caplog.at_level(logging.WARNING):
        first = [fitted.example("train", i).prompt for i in range(30)]
    assert caplog.text.count("is too long (limits: 100 tokens of a prompt)") == 1
    again = FittedTask(Counted(number), TEXT, prompt_limit=100)
    assert [again.example("train", i).prompt for i in reversed(range(30))] == first[::-1]
    assert all(p == Counted().example("train", i).prompt for i, p in enumerate(first) if i % 3 != 1)
    assert max(map(len, first)) < 20 and all(p.startswith("train") for p in first)
    assert fitted.size("train") == number


def test_a_task_of_which_nothing_fits_is_refused(tmp_path):
    task = rows_task(tmp_path, [{**r, "prompt": r["prompt"] + "x" * 400} for r in rows(40)])
    with pytest.raises(ValueError, match="all .* problems are too long .*max_prompt_tokens"):
        checked(task, run_config(), MODEL, TEXT)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"thought": "2</think>+2"}, r"the thought of row 5 of .*rows.jsonl must not hold '</thin"),
        ({"answer": "2</think>3"}, "the answer of row 5 of .* must not hold '</think>'"),
        ({"answer": "4</s>"}, "the answer of row 5 of .* must not hold '</s>'"),
    ],
)
def test_rows_that_would_be_read_wrongly_are_refused_by_name(tmp_path, row, message):
    content = rows(40)
    content[5] |= row
    with pytest.raises(ValueError, match=message):
        checked(rows_task(tmp_path, content), run_config(), MODEL, TEXT)


def test_generated_problems_are_named_by_their_number():
    class Bad(Counted):
        def example(self, split, index):
            return Example("p", "</s>" if split == "train" and index == 7 else "4", "2")

    with pytest.raises(ValueError, match="the answer of train problem 7 of task counted must not"):
        checked(Bad(), run_config(), MODEL, TEXT)


def test_an_answer_that_the_tokenizer_cannot_give_is_refused(tmp_path):
    from tokenizers.normalizers import Lowercase

    tokenizer = toy_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    text = PromptFormat(tokenizer, PHASES, 4)
    content = [{**row, "answer": "Four"} for row in rows(40)]
    with pytest.raises(ValueError, match="the answer of row .* reads 'Four' as 'four'"):
        checked(rows_task(tmp_path, content), run_config(), MODEL, text)
    content = [{**row, "answer": "four"} for row in rows(40)]
    assert checked(rows_task(tmp_path, content), run_config(), MODEL, text)


def test_answers_are_read_back_only_where_the_tokenizer_may_lose_something():
    alone = PromptFormat(character_tokenizer("0123456789+=", ["<think>", "</think>"]), PHASES, 4)
    assert FittedTask(Counted(), alone)._keeps_ascii and FittedTask(Counted(), TEXT)._keeps_ascii


def test_the_form_in_which_unicode_is_written_does_not_matter(tmp_path):
    task = rows_task(tmp_path, [{**row, "answer": "é"} for row in rows(40)])
    example = task.example("train", 0)
    assert task.outcome(example, "e\u0301") == task.outcome(example, " é ") == 1.0
    assert task.outcome(example, "e") == 0.0


def test_a_supervised_stage_of_the_head_needs_thoughts(tmp_path):
    content = [{k: v for k, v in row.items() if k != "thought"} for row in rows(40)]
    task = rows_task(tmp_path, content)
    config = run_config()
    with pytest.raises(ValueError, match=r"stages.head.objective.head_ce .* \(thought\).*steps=0"):
        checked(task, config, MODEL, TEXT)
    for name in ("head", "joint"):
        config.stages[name].steps = 0
    config.stages["rl"] = StageConfig(rollouts=RolloutsConfig(num_prompts=4), steps=1)
    assert checked(task, config, MODEL, TEXT).size("train") == task.size("train")


def test_a_run_on_rows_of_which_few_have_thoughts(tmp_path):
    """Batches without a thought leave every weight finite, and those with one train the head."""
    content = rows(40)
    for row in content[::2] + content[1::4]:
        del row["thought"]
    folder = tmp_path / "run"
    config = run_config(
        run_dir=str(folder),
        task=RowsConfig(source=write_rows(tmp_path / "rows.jsonl", content), num_test=4),
        model=ModelConfig(source=save_toy(tmp_path / "source", toy_tokenizer())),
        head=HeadConfig(num_slots=3, hidden_size=16, intermediate_size=24, taps=[1, 2]),
        fabric=FabricConfig(accelerator="cpu", num_threads=1),
        stages=stages(batch_size=2, micro_batch_size=1),
    )
    for stage in config.stages.values():
        stage.steps = 6
    config.evaluation.num_problems = 4
    config.logger = LoggerConfig(log_every=1, sinks={"files": FilesConfig()})
    train(config)
    from mtp.reports.json_lines import read_records

    records = [r for r in read_records(folder / "metrics.jsonl") if r.get("stage") == "head"]
    counts = [r["num_tokens/head_ce"] for r in records if "num_tokens/head_ce" in r]
    losses = [r["loss"] for r in records if "loss" in r]
    assert 0 in counts and max(counts) > 0
    assert [loss == 0 for loss in losses] == [count == 0 for count in counts]
