"""Streamed rows: the examples of rows in memory, in windows, from any position on."""

import gzip
import itertools
import json

import pytest

from mtp.tasks.base import check_disjoint
from mtp.tasks.row_examples import in_test_share
from mtp.tasks.rows import RowsConfig
from mtp.tasks.streamed_rows import StreamedRows


def sums(first, last):
    return [
        {"prompt": f"{i}+1=", "answer": i + 1, "thought": f"{i} and 1", "level": 0.1 * i}
        for i in range(first, last)
    ]


def text(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same 100 rows in several forms, each in files of 30, 0 and 70 rows, and test rows."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("rows")
    for number, (first, last) in enumerate([(0, 30), (30, 30), (30, 100)]):
        rows = sums(first, last)
        (folder / f"plain{number}.jsonl").write_text(text(rows))
        with gzip.open(folder / f"packed{number}.jsonl.gz", "wt") as file:
            file.write(text(rows))
        if rows:
            table = datasets.Dataset.from_list(rows)
            table.to_parquet(folder / f"columns{number}.parquet", batch_size=11)
            (folder / "data").mkdir(exist_ok=True)
            (folder / "data" / f"train-{number}.jsonl").write_text(text(rows))
    datasets.Dataset.from_list(sums(0, 100)).save_to_disk(folder / "saved")
    (folder / "test.jsonl").write_text(text(sums(10, 20)))
    return folder


SOURCES = ("plain*.jsonl", "packed*.jsonl.gz", "columns*.parquet", "saved", "data")


def build(folder, source="plain*.jsonl", **given):
    given = {"test_source": str(folder / "test.jsonl"), "shuffle_rows": 15, **given}
    return RowsConfig(source=str(folder / source), stream=True, **given).build()


def take(task, first, last):
    return [task.example("train", index) for index in range(first, last)]


@pytest.mark.parametrize("source", SOURCES)
def test_one_epoch_has_the_examples_of_rows_in_memory(folder, source):
    """In the order of the rows, but for the windows: 15 examples each."""
    listed = RowsConfig(
        source=str(folder / "plain*.jsonl"), test_source=str(folder / "test.jsonl")
    ).build()
    wanted = [listed.example("train", i) for i in range(listed.size("train"))]
    task = build(folder, source)
    assert isinstance(task, StreamedRows) and task.size("train") is None
    found = take(task, 0, 180)
    assert len(wanted) == 90
    for at in range(0, 90, 15):
        window = sorted(found[at : at + 15], key=lambda example: int(example.answer))
        assert window == wanted[at : at + 15]
        assert found[at : at + 15] != window
        assert sorted(found[90 + at : 105 + at], key=lambda e: int(e.answer)) == window
    assert found[:90] != found[90:]
    assert take(build(folder, source, shuffle_rows=1), 0, 100) == wanted + wanted[:10]
    assert [task.example("test", i) for i in range(10)] == [
        listed.example("test", i) for i in range(10)
    ]
    check_disjoint(task)


def counted(reader):
    """The rows that a reader gives from now on."""
    reads, rows = [], reader.rows

    def count(place=None):
        for row in rows(place):
            reads.append(row)
            yield row

    reader.rows = count
    return reads


@pytest.mark.parametrize("source", SOURCES)
def test_any_position_is_the_same_in_another_process_with_and_without_a_bookmark(folder, source):
    first = build(folder, source)
    wanted = take(first, 0, 260)
    for position in (0, 14, 15, 100, 211):
        later = build(folder, source)
        assert take(later, position, 260) == wanted[position:]
        marked = build(folder, source)
        given = json.loads(json.dumps(first.bookmark(position)))
        marked.restore(given)
        reads = counted(marked._reader)
        assert take(marked, position, 260) == wanted[position:]
        if given["begins"][-1][0]:
            # Only what is needed: the rest of its window, and the windows up to the last position.
            rows_needed = (260 - position // 15 * 15) * 100 / 90
            assert len(reads) <= rows_needed + 31
    assert take(first, 3, 5) == wanted[3:5]  # back to a window that is no longer kept


@pytest.mark.parametrize("name", ["a.jsonl", "data/train.jsonl"])
def test_files_that_changed_are_refused(folder, tmp_path, name):
    """A file, and one in a folder that `datasets` reads."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    source = path if path.parent == tmp_path else path.parent
    path.write_text(text(sums(0, 50)))
    task = build(folder, source)
    bookmark = json.loads(json.dumps(task.bookmark(0)))
    build(folder, source).restore(bookmark)
    path.write_text(text(sums(0, 51)))
    with pytest.raises(ValueError, match="task.source must be what it was .* give those files"):
        build(folder, source).restore(bookmark)


def test_a_share_is_held_out_without_test_rows(folder):
    task = build(folder, test_source=None, test_share=0.3, num_test=8)
    train = {e.prompt for e in take(task, 0, 300)}
    held_out = {row["prompt"] for row in sums(0, 100)} - train
    test = [task.example("test", i).prompt for i in range(task.size("test"))]
    ordered = [row["prompt"] for row in sums(0, 100) if row["prompt"] in held_out]
    assert test == ordered[:8] and 15 < len(held_out) < 45
    check_disjoint(task)
    assert in_test_share("0" * 16, 0.3)


def test_every_answer_of_streamed_conversations(folder, tmp_path):
    """A window may end within a conversation."""
    rows = [
        {"messages": [m for n in range(3) for m in (
            {"role": "user", "content": f"{i}+{n}="},
            {"role": "assistant", "content": str(i + n)})]}
        for i in range(200, 210)
    ]  # fmt: skip
    (tmp_path / "talks.jsonl").write_text(text(rows))
    given = {"turns": "all", "shuffle_rows": 7}
    task = build(folder, tmp_path / "talks.jsonl", **given)
    found = take(task, 0, 35)
    assert sorted(e.prompt for e in found[:28]) == sorted(
        f"{i}+{n}=" for i, n in itertools.islice(itertools.product(range(200, 210), range(3)), 28)
    )
    for position in (7, 21, 28):
        again = build(folder, tmp_path / "talks.jsonl", **given)
        again.restore(json.loads(json.dumps(task.bookmark(position))))
        assert take(again, position, 35) == found[position:]


def test_at_most_two_windows_are_kept(folder):
    task = build(folder)
    take(task, 0, 200)
    assert len(task._windows) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a", "answer": 1, "answer": 2}\n', "line 3 of .*'answer' is there twice"),
        (b'{"prompt": "caf\xe9", "answer": 1}\n', "got .*, line 3; if it is ISO-8859-1"),
        (b'{"prompt": "a"}\n', "task.answer_column must name a filled column, .* row 2 of .*"),
        (b'{"prompt": [], "answer": 1}\n', "task.prompt_column must hold text .* in row 2 of"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(folder, tmp_path, content, message):
    for name, opened in (("a.jsonl", open), ("a.jsonl.gz", gzip.open)):
        with opened(tmp_path / name, "wb") as file:
            file.write(text(sums(40, 42)).encode() + content)
        with pytest.raises(ValueError, match=message):
            take(build(folder, tmp_path / name), 0, 3)


def test_files_that_cannot_be_read(folder, tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="a.jsonl.gz could not be read as gzip"):
        take(build(folder, tmp_path / "a.jsonl.gz"), 0, 1)
    with pytest.raises(ValueError, match="task.source must be an existing file, got .*none"):
        build(folder, tmp_path / "none*.jsonl")
    (tmp_path / "few.jsonl").write_text(text(sums(10, 20)))
    with pytest.raises(ValueError, match="task.source must hold at least one row"):
        take(build(folder, tmp_path / "few.jsonl"), 0, 1)
