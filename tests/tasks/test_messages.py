"""Rows of several messages: prompts, solutions, thoughts, and rows that are refused."""

import json

import pytest

from mtp.tasks.base import Example, check_disjoint, fingerprint
from mtp.tasks.row_examples import to_examples
from mtp.tasks.rows import RowsConfig

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "2+2="}
ANSWER = {"role": "assistant", "content": "4"}
AGAIN = {"role": "user", "content": "and 1?"}


def examples(row, **given):
    return [example for _, example in to_examples(row, RowsConfig(**given), "row 3 of r")]


def example(row, **given):
    (one,) = examples(row, **given)
    return one


def test_a_prompt_of_several_messages():
    row = {"prompt": [SYSTEM, USER, ANSWER, AGAIN], "answer": 5, "level": 2}
    one = example(row)
    assert (one.prompt, one.answer, one.thought) == ("and 1?", "5", None)
    assert one.messages == (SYSTEM, USER, ANSWER, AGAIN) and one.columns == row
    assert one.shown == "system: Be brief.\nuser: 2+2=\nassistant: 4\nuser: and 1?"


def test_one_user_message_is_the_question_that_text_is():
    as_text, as_messages = (example({"prompt": p, "answer": 4}) for p in ("2+2=", [USER]))
    assert as_messages.prompt == "2+2=" == as_messages.shown
    assert fingerprint(as_text) == fingerprint(as_messages)
    assert fingerprint(example({"prompt": [SYSTEM, USER], "answer": 4})) != fingerprint(as_text)


def test_a_conversation_ends_with_its_solution():
    one = example({"messages": [SYSTEM, USER, ANSWER, AGAIN, {**ANSWER, "content": " 5 "}]})
    assert one.messages == (SYSTEM, USER, ANSWER, AGAIN) and one.answer == "5"
    one = example({"messages": [SYSTEM, USER], "answer": "4"})
    assert one.messages == (SYSTEM, USER) and one.answer == "4"


def test_every_answer_of_a_conversation_is_an_example():
    """The prompts hold what came before, and all have the split of the first question."""
    thoughtful = {**ANSWER, "reasoning_content": "two and two"}
    row = {"messages": [SYSTEM, USER, thoughtful, AGAIN, {**ANSWER, "content": "5"}]}
    pairs = to_examples(row, RowsConfig(turns="all"), "r")
    assert [(e.messages, e.thought, e.answer) for _, e in pairs] == [
        ((SYSTEM, USER), "two and two", "4"),
        ((SYSTEM, USER, ANSWER, AGAIN), None, "5"),
    ]
    opening = fingerprint(Example("2+2=", "", messages=(SYSTEM, USER)))
    assert [key for key, _ in pairs] == [opening, opening]
    assert [e.answer for e in examples(row)] == ["5"]


@pytest.mark.parametrize(
    ("message", "thought", "answer"),
    [
        ({"content": "4", "reasoning_content": "2 and 2"}, "2 and 2", "4"),
        ({"content": "4", "thinking": " 2 and 2\n"}, "2 and 2", "4"),
        ({"content": "<think>\n2 and 2\n</think>\n\n4"}, "2 and 2", "4"),
        ({"content": "2 and 2</think>4"}, "2 and 2", "4"),
        ({"content": "<think>\n\n</think>\n\n4"}, None, "4"),
        ({"content": "<think>a</think>4", "reasoning_content": "a"}, "a", "4"),
        ({"content": "4", "reasoning_content": None, "tool_calls": None}, None, "4"),
        ({"content": [{"type": "text", "text": "4"}]}, None, "4"),
    ],
)
def test_thoughts_of_an_answer(message, thought, answer):
    one = example({"messages": [USER, {"role": "assistant", **message}]})
    assert (one.thought, one.answer) == (thought, answer)


def test_tags_of_other_data():
    tags = ["<reasoning>", "</reasoning>"]
    row = {"messages": [USER, {**ANSWER, "content": "<reasoning>a</reasoning>4"}]}
    one = example(row, thought_tags=tags)
    assert (one.thought, one.answer) == ("a", "4")
    assert example(row).thought is None
    one = example({"prompt": "p", "answer": "<reasoning>a</reasoning>4"}, thought_tags=tags)
    assert (one.thought, one.answer) == ("a", "4")


def test_other_names_of_other_data():
    talk = [{"from": "human", "value": "2+2="}, {"from": "gpt", "value": "<think>a</think>4"}]
    one = example({"conversations": talk}, messages_column="conversations")
    assert (one.messages, one.thought, one.answer) == ((USER,), "a", "4")
    one = example({"prompt": [USER], "completion": [ANSWER]}, answer_column="completion")
    assert (one.messages, one.answer) == ((USER,), "4")
    one = example({"system": "Be brief.", "prompt": "2+2=", "answer": 4}, system_column="system")
    assert one.messages == (SYSTEM, USER)


def test_an_answer_column_beside_a_conversation():
    row = {"messages": [USER, {**ANSWER, "content": "It is 4."}], "answer": "4"}
    with pytest.raises(ValueError, match="row 3 of r must have one answer, got '4' in 'answer'"):
        example(row)
    one = example(row, answer_column=None)
    assert one.answer == "It is 4." and one.columns["answer"] == "4"
    assert example({"messages": [USER, ANSWER], "answer": 4}).answer == "4"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "2+2=", "messages": [USER, ANSWER]},
            "row 3 of r must have a prompt or messages, got both .* task.prompt_column or",
        ),
        ({"prompt": [USER, ANSWER], "answer": 1}, "must end with the user's, .* user, assistant"),
        ({"prompt": [SYSTEM], "answer": 1}, "must end with the user's, got the roles system in"),
        ({"messages": [ANSWER]}, "must end with the user's, got the roles none in row 3"),
        ({"messages": [USER]}, "task.answer_column must name a filled column"),
        ({"messages": [USER, ANSWER, ANSWER]}, "join messages of the assistant that follow"),
        ({"messages": "2+2="}, "task.messages_column must hold a list of messages, got '2"),
        (
            {"messages": [USER, {"role": "tool", "content": "4"}]},
            "message 1 of task.messages_column in row 3 of r must not use tools",
        ),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"id": 1}]}]}, "must not use tools"),
        ({"messages": [USER, {"role": "bot", "content": "4"}]}, "must have a role of .*'bot'"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "must have the weight 1, got 0"),
        ({"messages": [{**USER, "content": " "}, ANSWER]}, "got an empty user message"),
        ({"messages": [USER, {**ANSWER, "content": ""}]}, "must hold an answer, got only ''"),
        ({"messages": [{**USER, "content": None}, ANSWER]}, "must hold text, got None"),
        (
            {"messages": [{**USER, "content": [{"type": "image"}]}, ANSWER]},
            r"must hold text, got parts of the types \['image'\]",
        ),
        (
            {"messages": [USER, {**ANSWER, "content": "<think>a</think>4", "thinking": "b"}]},
            "must have one thought, got different ones in thinking and content",
        ),
        (
            {"messages": [USER, {**ANSWER, "content": "<think>a 4"}]},
            "must hold one thought, .* 1 opening and 0 closing tags .* set task.thought_tags",
        ),
        (
            {"messages": [USER, {**ANSWER, "content": "so <think>a</think>4"}]},
            "one thought, at its",
        ),
        ({"messages": [USER, {**ANSWER, "content": "a</think>b</think>4"}]}, "2 closing tags"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, "the column 'tools' filled"),
        (
            {"prompt": "p", "answer": "<think>a</think>4", "thought": "b"},
            "different ones in task.thought_column and the answer",
        ),
        ({"prompt": [USER], "answer": [USER]}, "must hold one assistant message, got the roles us"),
    ],
)
def test_rows_that_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        example(row)


def test_two_system_messages_are_refused():
    row = {"prompt": [SYSTEM, USER], "answer": "4", "s": "Be long."}
    with pytest.raises(ValueError, match="row 3 of r must have one system message"):
        example(row, system_column="s")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"turns": "both"}, "task.turns must be last or all, got 'both'"),
        ({"thought_tags": ["<think>"]}, "task.thought_tags must be two different texts"),
        ({"thought_tags": ["|", "|"]}, "task.thought_tags must be two different texts"),
        ({"prompt_column": None, "messages_column": None}, "must name a column"),
    ],
)
def test_columns_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        RowsConfig(source="r.jsonl", **given).build()


def test_all_answers_of_a_conversation_are_in_one_split(tmp_path):
    """A later prompt holds the earlier answer."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}+1="},
                {"role": "assistant", "content": str(i + 1)},
                {"role": "user", "content": "and 1?"},
                {"role": "assistant", "content": str(i + 2)},
            ]
        }
        for i in range(60)
    ]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = RowsConfig(source=str(path), turns="all", test_share=0.3, num_test=999).build()
    openings = {
        split: {task.example(split, i).messages[0]["content"] for i in range(task.size(split))}
        for split in ("train", "test")
    }
    assert not openings["train"] & openings["test"]
    assert len(openings["train"] | openings["test"]) == 60
    assert task.size("train") + task.size("test") == 120
    check_disjoint(task)
