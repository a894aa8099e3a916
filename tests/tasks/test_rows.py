"""Rows from files, and equality of mathematical answers."""

import json
import logging
import os
import signal
import subprocess
import sys
import unicodedata
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mtp.tasks.base import Example, Task, check_disjoint, fingerprint
from mtp.tasks.math_answer import MathVerifier
from mtp.tasks.row_examples import ColumnsConfig, in_test_share, to_examples
from mtp.tasks.rows import RowsConfig


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(count):
    return [
        {"prompt": f"{i}+1=", "answer": i + 1, "thought": f"{i} and 1", "level": i % 3}
        for i in range(count)
    ]


def every(task: Task, split):
    return [task.example(split, i) for i in range(task.size(split))]


def test_rows_become_examples(tmp_path):
    source = write(tmp_path / "sums.jsonl", sums(200))
    task = RowsConfig(source=source, num_test=1000, test_share=0.25).build()
    examples = {e.prompt: e for e in every(task, "train") + every(task, "test")}
    assert len(examples) == 200
    assert examples["7+1="] == Example(
        "7+1=", "8", "7 and 1", {"prompt": "7+1=", "answer": 8, "thought": "7 and 1", "level": 1}
    )
    assert 25 <= task.size("test") <= 75
    assert task.outcome(examples["7+1="], "8") == 1.0
    assert task.outcome(examples["7+1="], "8.0") == 0.0
    check_disjoint(task)


def test_more_rows_move_no_question(tmp_path):
    few = RowsConfig(source=write(tmp_path / "a.jsonl", sums(60)), num_test=999).build()
    many = RowsConfig(source=write(tmp_path / "b.jsonl", sums(90)), num_test=999).build()
    for split in ("train", "test"):
        small = {e.prompt for e in every(few, split)}
        assert small == {e.prompt for e in every(many, split)} & {f"{i}+1=" for i in range(60)}


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=40, max_size=80), st.floats(0.2, 0.8))
def test_copies_of_a_question_go_to_one_side(tmp_path_factory, numbers, share):
    rows = [{"prompt": f" {n}+1= ", "answer": str(i)} for i, n in enumerate(numbers)]
    source = write(tmp_path_factory.mktemp("rows") / "r.jsonl", rows)
    held_out = {n for n in numbers if in_test_share(fingerprint(Example(f"{n}+1=", "")), share)}
    assume(held_out and held_out != set(numbers))
    task = RowsConfig(source=source, num_test=999, test_share=share).build()
    train = {e.prompt for e in every(task, "train")}
    test = {e.prompt: e.answer for e in every(task, "test")}
    assert test == {f"{n}+1=": str(numbers.index(n)) for n in held_out}
    assert train == {f"{n}+1=" for n in set(numbers) - held_out}
    assert task.size("train") == sum(n not in held_out for n in numbers)
    assert task.size("test") == len(held_out)


def test_share_is_that_of_the_hashes():
    hashes = [fingerprint(Example(str(i), "")) for i in range(4000)]
    assert sum(in_test_share(h, 0.1) for h in hashes) == pytest.approx(400, abs=80)
    assert in_test_share("0" * 16, 1e-9) and not in_test_share("f" * 16, 0.999999)


def test_explicit_test_rows_are_kept_from_training(tmp_path, caplog):
    train = write(tmp_path / "train.jsonl", sums(10))
    test = write(tmp_path / "test.jsonl", sums(3))
    with caplog.at_level(logging.WARNING):
        task = RowsConfig(source=train, test_source=test).build()
    assert {e.prompt for e in every(task, "test")} == {"0+1=", "1+1=", "2+1="}
    assert [e.prompt for e in every(task, "train")] == [f"{i}+1=" for i in range(3, 10)]
    assert "dropped 3 of 10 training rows" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_test_question_with_several_solutions_counts_once(tmp_path, stream):
    rows = [{"prompt": f"{i % 5}+1=", "answer": str(i)} for i in range(40)]
    sources = {
        "source": write(tmp_path / "train.jsonl", sums(50)),
        "test_source": write(tmp_path / "test.jsonl", rows),
    }
    task = RowsConfig(**sources, stream=stream, num_test=4).build()
    assert len({e.prompt for e in every(task, "test")}) == 4 == task.size("test")
    task = RowsConfig(**sources, stream=stream).build()
    assert {e.answer for e in every(task, "test")} == set("01234")


def test_a_run_shows_the_warnings(tmp_path):
    """Hydra's logging is off, and the warnings of tasks are shown nonetheless."""
    given = [
        "task=rows",
        f"task.source={write(tmp_path / 'train.jsonl', sums(10))}",
        f"task.test_source={write(tmp_path / 'test.jsonl', sums(3))}",
        f"run_dir={tmp_path / 'run'}",
        f"model.source={tmp_path / 'none'}",
    ]
    command = [sys.executable, str(Path(__file__).parents[2] / "train.py"), *given]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "error: model.source=" in done.stderr
    assert "rows/train.jsonl: dropped 3 of 10 training rows whose question is in" in done.stderr


def test_num_test_takes_the_same_sample(tmp_path):
    source = write(tmp_path / "sums.jsonl", sums(200))
    whole = RowsConfig(source=source, num_test=999).build()
    part = RowsConfig(source=source, num_test=5).build()
    assert every(part, "test") == every(whole, "test")[:5]
    assert every(part, "train") == every(whole, "train")


def test_parquet_and_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(sums(40))
    rows.to_parquet(tmp_path / "sums.parquet")
    rows.save_to_disk(tmp_path / "saved")
    both = datasets.DatasetDict(
        {"train": rows.select(range(30)), "test": rows.select(range(30, 40))}
    )
    both.save_to_disk(tmp_path / "both")
    wanted = RowsConfig(source=write(tmp_path / "sums.jsonl", sums(40))).build()
    for name in ("sums.parquet", "saved"):
        task = RowsConfig(source=str(tmp_path / name)).build()
        assert every(task, "train") == every(wanted, "train")
    task = RowsConfig(source=str(tmp_path / "both"), test_split="test").build()
    assert [e.prompt for e in every(task, "train")] == [f"{i}+1=" for i in range(30)]
    assert {e.prompt for e in every(task, "test")} == {f"{i}+1=" for i in range(30, 40)}


def test_columns_by_name_and_within_columns(tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}+1="}],
            "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
        }
        for i in range(40)
    ]
    source = write(tmp_path / "verl.jsonl", rows)
    task = RowsConfig(source=source, answer_column="reward_model.ground_truth").build()
    example = next(e for e in every(task, "train") + every(task, "test") if e.prompt == "7+1=")
    assert example.answer == "8" and example.thought is None
    assert example.columns["reward_model"]["style"] == "rule"


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (None, {}, "task.source must be an existing file, got .*rows.jsonl"),
        ([], {}, "task.source must hold at least one row, got none"),
        ([{"prompt": "a"}], {}, r"task.answer_column .*got 'answer', but row 0 of .*\['prompt'\]"),
        ([{"question": "a", "answer": "b"}], {}, r"task.prompt_column .*got 'prompt'"),
        ([{"prompt": "a", "answer": None}], {}, "task.answer_column must name a filled column"),
        ([{"prompt": " ", "answer": "b"}], {}, "task.prompt_column must hold text, got an empty"),
        ([{"prompt": "a", "answer": ["b"]}], {}, r"task.answer_column must hold text.*\['b'\]"),
        ([{"prompt": "a", "answer": True}], {}, "task.answer_column must hold text"),
        ([{"prompt": [1, 2], "answer": "b"}], {}, "a prompt may be a list of messages too"),
        ([3], {}, "line 1 of .* must be an object, got 3"),
        ([{"prompt": "a", "answer": "b"}], {}, "needs at least one (train|test) row"),
        (sums(9), {"test_share": 0.0}, "task.test_share must be between 0 and 1, got 0.0"),
        (sums(9), {"num_test": 0}, "task.num_test must be at least 1, got 0"),
        (sums(9), {"right_at": float("nan")}, "task.right_at must be a finite number"),
        (sums(9), {"test_source": "none.parquet"}, "task.test_source must be an existing file"),
        (sums(9), {"reward": "exactly"}, "task.reward must be exact, math or .*got 'exactly'"),
        (sums(9), {"reward": "no_such_module_:f"}, "importing 'no_such_module_' failed"),
        (sums(9), {"reward": "json:scores"}, r"'json' has no function 'scores'; it has .*'loads'"),
        (sums(9), {"reward_style": "ppo"}, "task.reward_style must be auto or one of"),
    ],
)
def test_bad_input_names_key_and_remedy(tmp_path, rows, settings, message):
    path = tmp_path / "rows.jsonl"
    if rows is not None:
        write(path, rows)
    with pytest.raises(ValueError, match=message):
        RowsConfig(**{"source": str(path), **settings}).build()


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt"\n')
    with pytest.raises(ValueError, match="task.source: line 2 of .* is not JSON"):
        RowsConfig(source=str(tmp_path / "a.jsonl")).build()
    (tmp_path / "a.csv").write_text("prompt,answer\n")
    with pytest.raises(ValueError, match="must end in .jsonl, .jsonl.gz or .parquet"):
        RowsConfig(source=str(tmp_path / "a.csv")).build()
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="could not be read as Parquet"):
        RowsConfig(source=str(tmp_path / "a.parquet")).build()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="could not be opened by datasets .*split 'train'"):
        RowsConfig(source=str(tmp_path / "empty")).build()
    with pytest.raises(ValueError, match="task.source must be"):
        RowsConfig().build()


def test_line_separators_within_a_string(tmp_path):
    rows = [{"prompt": f"a\u2028{i}", "answer": "b"} for i in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    task = RowsConfig(source=str(path)).build()
    assert task.example("train", 0).prompt.startswith("a\u2028")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (6, "6"),
        (6.0, "6"),
        (-0.0, "0"),
        (10.0, "10"),
        (1e16, "10000000000000000"),
        (1.5e300, "15" + "0" * 299),
        (0.1, "0.1"),
        (-2.50, "-2.5"),
        (1e-7, "0.0000001"),
        (Decimal("1E+3"), "1000"),
        (Decimal("2.500"), "2.5"),
        (" 06.0 ", "06.0"),
    ],
)
def test_numbers_become_text_as_they_are_written(value, text):
    row = {"prompt": value, "answer": value, "thought": value}
    ((_, example),) = to_examples(row, RowsConfig(), "row 3 of r")
    assert (example.prompt, example.answer, example.thought) == (text, text, text)
    assert example.where == "row 3 of r"


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), Decimal("NaN"), Decimal("-Infinity")]
)
def test_numbers_that_are_none_are_refused(value):
    message = "task.answer_column must hold finite numbers, got .* in row 3 of r; correct or drop"
    with pytest.raises(ValueError, match=message):
        to_examples({"prompt": "p", "answer": value}, RowsConfig(), "row 3 of r")


@pytest.mark.parametrize("line", ['"answer": NaN', '"answer": -Infinity', '"answer": 1e999'])
def test_json_numbers_that_are_none_are_refused(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b", ' + line + "}\n")
    with pytest.raises(ValueError, match="must hold finite numbers, .* in row 1 of .*rows.jsonl"):
        RowsConfig(source=str(path)).build()


def test_a_byte_order_mark_is_read_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = "".join(json.dumps(row) + "\r\n" for row in sums(40))
    path.write_bytes(lines.encode("utf-8-sig"))
    wanted = RowsConfig(source=write(tmp_path / "plain.jsonl", sums(40))).build()
    assert every(RowsConfig(source=str(path)).build(), "train") == every(wanted, "train")


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-16", r"task.source must be UTF-8 text, got .*rows.jsonl; .*iconv -f UTF-16 -t UTF-8"),
        ("utf-16-le", r"must be UTF-8 text, got .*rows.jsonl; .*iconv -f UTF-16 -t UTF-8"),
        ("latin-1", r"must be UTF-8 text, got .*rows.jsonl, line 3; .*iconv -f ISO-8859-1"),
    ],
)
def test_other_encodings_are_named_with_the_remedy(tmp_path, encoding, message):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "caf\u00e9" if i == 2 else str(i), "answer": "b"} for i in range(5)]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=message):
        RowsConfig(source=str(path)).build()


@pytest.mark.parametrize("column", ["prompt", "answer", "thought"])
def test_a_lone_surrogate_is_named(tmp_path, column):
    rows = sums(40)
    rows[3][column] = "a\ud800b"
    source = write(tmp_path / "rows.jsonl", rows)
    message = rf"task.{column}_column must .*lone surrogate '.ud800' in row 3 of .*rows.jsonl"
    with pytest.raises(ValueError, match=message):
        RowsConfig(source=source).build()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "answer": "b", "prompt": "c"}', "line 2 of .*'prompt' is there twice"),
        ('{"prompt": "a", "answer": %s}' % ("9" * 5000), "line 2 of .* is not JSON: Exceeds"),
        ('{"prompt": %s}' % ("[" * 100_000), "line 2 of .* is not JSON: maximum recursion"),
        ('{"prompt": [[{"role": "user", "content": "a"}]], "answer": 1}', "a list of messages too"),
        ('{"prompt": [{"role": "user", "content": ["a"]}], "answer": 1}', "only text is supported"),
    ],
)
def test_json_that_is_no_row_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        RowsConfig(source=str(path)).build()


def test_parquet_columns_that_are_there_twice_or_hold_short_floats(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    prompts = pyarrow.array([str(i) for i in range(40)])
    answers = pyarrow.array([0.1, None, *[6.0] * 38], pyarrow.float32())
    table = pyarrow.table([prompts, answers, answers], names=["prompt", "answer", "answer"])
    parquet.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match="twice.parquet has the column 'answer' twice; rename"):
        RowsConfig(source=str(tmp_path / "twice.parquet")).build()
    table = pyarrow.table([prompts, answers.fill_null(2.5)], names=["prompt", "answer"])
    parquet.write_table(table, tmp_path / "short.parquet")
    task = RowsConfig(source=str(tmp_path / "short.parquet"), num_test=99).build()
    found = {e.prompt: e.answer for e in every(task, "train") + every(task, "test")}
    assert (found["0"], found["1"], found["2"]) == ("0.1", "2.5", "6")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_narrow_floats_of_a_dataset_and_of_parquet_keep_their_digits(tmp_path, dtype):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "answer": datasets.Value(dtype)}
    )
    rows = [{"prompt": str(i), "answer": 0.1 if i else 2.5} for i in range(40)]
    dataset = datasets.Dataset.from_list(rows, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "rows.parquet")
    for name in ("saved", "rows.parquet"):
        task = RowsConfig(source=str(tmp_path / name), num_test=99).build()
        found = {e.prompt: e.answer for e in every(task, "train") + every(task, "test")}
        assert (found["0"], found["1"]) == ("2.5", "0.1"), name


def test_narrow_floats_within_columns_keep_their_digits(tmp_path):
    datasets = pytest.importorskip("datasets")
    inner = {"truth": datasets.Value("float32"), "style": datasets.Value("string")}
    answers = datasets.List(datasets.Value("float16"))
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "reward": inner, "all": answers}
    )
    about = {"reward": {"truth": 0.1, "style": "rule"}, "all": [0.1, None, 2.5]}
    rows = [{"prompt": str(i), **about} for i in range(40)]
    dataset = datasets.Dataset.from_list(rows, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "rows.parquet")
    for name in ("saved", "rows.parquet"):
        given = {"source": str(tmp_path / name), "answer_column": "reward.truth"}
        example = RowsConfig(num_test=9, **given).build().example("train", 0)
        assert example.answer == "0.1" and example.columns["reward"] == about["reward"], name
        assert example.columns["all"] == about["all"], name


def test_numbers_of_json_lines_keep_their_digits(tmp_path):
    """A float has 16 of them. A reward gets floats, which JSON's users expect."""
    written = ["9007199254740993.0", "3.14159265358979323846", "0.10", "1e3", "-0.0"]
    lines = [f'{{"prompt": "{i}", "answer": {text}}}\n' for i, text in enumerate(written)]
    lines += [f'{{"prompt": "x{i}", "answer": {i}}}\n' for i in range(40)]  # for both splits
    (tmp_path / "r.jsonl").write_text("".join(lines))
    task = RowsConfig(source=str(tmp_path / "r.jsonl"), num_test=99).build()
    found = {e.prompt: e for e in every(task, "train") + every(task, "test")}
    shown = ["9007199254740993", "3.14159265358979323846", "0.1", "1000", "0"]
    assert [found[str(i)].answer for i in range(5)] == shown
    assert found["2"].columns == {"prompt": "2", "answer": 0.1}
    assert type(found["2"].columns["answer"]) is float


def test_a_reward_gets_the_decimals_of_a_parquet_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    exact = Decimal("3.14159265358979323846")
    columns = [pyarrow.array([str(i) for i in range(40)]), pyarrow.array([exact] * 40)]
    parquet.write_table(pyarrow.table(columns, ["prompt", "answer"]), tmp_path / "r.parquet")
    example = RowsConfig(source=str(tmp_path / "r.parquet"), num_test=9).build().example("train", 0)
    assert example.answer == str(exact) and example.columns["answer"] == exact


@pytest.mark.parametrize("more", [{}, {"answer": "4"}])
def test_the_thought_of_a_conversation_may_have_a_column(more):
    question, answer = {"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}
    config = ColumnsConfig()

    def thought(**row):
        ((_, example),) = to_examples({"messages": [question, answer], **more, **row}, config, "it")
        return example.thought

    assert thought() is None and thought(thought="two and two") == "two and two"
    same = {"messages": [question, {**answer, "reasoning_content": "A"}]}
    assert thought(**same) == thought(**same, thought="A") == "A"
    with pytest.raises(ValueError, match="it must have one thought, got different ones"):
        thought(**same, thought="B")
    if more:
        assert thought(answer="<think>two</think>4") == "two"


@pytest.fixture(scope="module")
def verifier():
    return MathVerifier(seconds=2)


def test_signals_of_a_run_do_not_end_its_verifier_and_a_dead_one_is_replaced(verifier):
    assert verifier("12", "12") == 1.0
    worker = verifier._worker
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(worker.pid, number)
    assert os.getpgid(worker.pid) != os.getpgid(0)  # where Ctrl-C would reach it
    assert verifier("12", "13") == 0.0 and verifier._worker is worker
    worker.kill()
    worker.wait()
    assert verifier("12", "12") == 1.0 and verifier._worker is not worker


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("1/2", "0.5", 1.0),
        (r"\frac{1}{2}", "1/2", 1.0),
        (r"$\frac{1}{2}$", r"\frac{2}{4}", 1.0),
        ("12", "13", 0.0),
        ("12", "", 0.0),
        ("x+1", "1+x", 1.0),
        ("1,000", "1000", 1.0),
        ("(1,2)", "(2,1)", 0.0),
        # a number that still has to be computed is no answer, another way to write it is one
        ("122", "37+85", 0.0),
        ("122", "$37+85=$", 0.0),
        ("46", "What is 12+34", 0.0),
        ("55", r"\sum_{i=1}^{10} i", 0.0),
        ("-2", r"3 \times 1 - 5", 0.0),
        ("122", "37+85=122", 1.0),
        ("5", "x+2=7, x=5", 1.0),
        ("120000", r"1.2 \times 10^5", 1.0),
        ("1024", "2**10", 1.0),
        ("42", "The answer is 42!", 1.0),
        ("3", "non-negative 3", 1.0),
        (r"2\sqrt{3}", r"2 \times \sqrt{3}", 1.0),
        ("2+3x", "3x+2", 1.0),
    ],
)
def test_math_equality(verifier, gold, answer, right):
    assert verifier(gold, answer) == right


def test_math_that_does_not_end_is_wrong_and_the_verifier_continues(verifier):
    assert verifier("12", "9**9**9") == 0.0
    assert verifier("12", "24/2") == 1.0


def test_gold_answers_that_are_no_mathematics(verifier):
    with pytest.raises(ValueError, match="gold answer must be a mathematical expression.*got ''"):
        verifier("", "1")


def test_the_math_reward(tmp_path):
    source = write(tmp_path / "r.jsonl", sums(40))
    task = RowsConfig(source=source, reward="math").build()
    example = task.example("train", 0)
    assert task.outcome(example, f"{int(example.answer) * 2}/2") == 1.0
    assert task.outcome(example, "1/7") == 0.0


@pytest.mark.parametrize("answer", ["", "  ", "<think>2+2</think>", "<think>2+2</think>\n"])
def test_an_empty_answer_is_refused(tmp_path, answer):
    source = write(tmp_path / "a.jsonl", [*sums(9), {"prompt": "q", "answer": answer}])
    with pytest.raises(
        ValueError, match=r"answer_column must hold text, got an empty answer in row 9"
    ):
        RowsConfig(source=source).build()


def test_a_resumed_run_refuses_rows_that_have_changed(tmp_path):
    rows = sums(40)
    task = RowsConfig(source=write(tmp_path / "a.jsonl", rows)).build()
    noted = json.loads(json.dumps(task.bookmark(3)))
    RowsConfig(source=write(tmp_path / "copy.jsonl", rows)).build().restore(noted)
    corrected = [rows[0] | {"answer": 7}, *rows[1:]]
    for other in (rows[::-1], rows[:-1], corrected):
        changed = RowsConfig(source=write(tmp_path / "b.jsonl", other)).build()
        with pytest.raises(ValueError, match="task.source must hold what it held when the run"):
            changed.restore(noted)


def test_forms_of_the_same_unicode_text_go_to_one_side(tmp_path):
    rows = [{"prompt": f"é{i}", "answer": "1"} for i in range(40)]
    forms = [{**row, "prompt": unicodedata.normalize("NFD", row["prompt"])} for row in rows]
    assert forms[0]["prompt"] != rows[0]["prompt"]
    source = write(tmp_path / "a.jsonl", rows + forms)
    task = RowsConfig(source=source, test_share=0.5, num_test=99).build()
    sides = [
        {unicodedata.normalize("NFC", e.prompt) for e in every(task, s)} for s in ("train", "test")
    ]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 40
