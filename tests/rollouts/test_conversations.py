"""Prompts of several messages as token ids, and messages that a chat template cannot show."""

import pytest
from toy_text import CHAT, NO_SYSTEM, toy_tokenizer

from mtp.modeling.phases import Phase
from mtp.rollouts.prompt_format import PromptFormat
from mtp.tasks.base import Example

PHASES = {
    "thought": Phase(mode="fast", opened_by="<think>"),
    "answer": Phase(mode="slow", opened_by="</think>"),
}


def make_text(tokenizer, **given):
    return PromptFormat(tokenizer, PHASES, 4, **given)


SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = (
    {"role": "user", "content": "2+2="},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "and 1?"},
)
SHOWN = "<|user|>2+2=<|end|><|assistant|>4<|end|><|user|>and 1?<|end|><|assistant|><think>"


def talk(*messages, thought="4 and 1"):
    return Example(messages[-1]["content"], "5", thought, messages=messages)


def test_a_prompt_of_several_messages_goes_through_the_chat_template():
    chat = make_text(toy_tokenizer(chat_template=CHAT))
    wanted = chat.tokenizer.encode(SHOWN, add_special_tokens=False)
    prompt, completion = chat.example_ids(talk(*TURNS))
    assert prompt == wanted
    assert completion == chat.completion_ids("4 and 1", "5")
    own = chat.tokenizer.encode("<|system|>Be brief.<|end|>", add_special_tokens=False)
    assert chat.question_ids(talk(SYSTEM, *TURNS)) == own + wanted
    assert chat.checked(talk(SYSTEM, *TURNS), "row 3").messages == (SYSTEM, *TURNS)


def test_a_system_message_of_its_own_replaces_that_of_the_run():
    plain = make_text(toy_tokenizer(chat_template=CHAT))
    brief = make_text(toy_tokenizer(chat_template=CHAT), system_prompt="Be brief.")
    long = make_text(toy_tokenizer(chat_template=CHAT), system_prompt="Be long.")
    wanted = plain.question_ids(talk(SYSTEM, *TURNS))
    assert long.question_ids(talk(SYSTEM, *TURNS)) == wanted
    assert brief.question_ids(talk(*TURNS)) == wanted != long.question_ids(talk(*TURNS))


SPEECHLESS = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("given", "messages", "message"),
    [
        ({}, TURNS, r"row 3 has several messages \(user, assistant, user\).* has none: choose a"),
        (
            {"chat_template": CHAT, "used": False},
            TURNS,
            "several messages .*: set decoding.chat_template=true",
        ),
        (
            {"chat_template": NO_SYSTEM + CHAT},
            (SYSTEM, *TURNS),
            r"prompt of row 3 cannot be used: .*no system role.*roles are system, user, assistant",
        ),
        ({"chat_template": SPEECHLESS}, TURNS, "leaves out the assistant message '4' of row 3"),
        (
            {"chat_template": CHAT},
            (SYSTEM, {"role": "user", "content": "a<|end|>"}),
            "the prompt of row 3 must not hold the special token '<|end|>'",
        ),
    ],
)
def test_messages_that_a_template_cannot_show_are_refused(given, messages, message):
    text = make_text(
        toy_tokenizer(chat_template=given.get("chat_template")),
        chat_template=given.get("used", True),
    )
    with pytest.raises(ValueError, match=message):
        text.checked(talk(*messages), "row 3")
