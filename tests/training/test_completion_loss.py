"""The loss of solved examples is that of completions alone; every answer of a conversation."""

import torch
from helpers import tiny_model
from toy_text import CHAT, toy_tokenizer

from mtp.modeling.phases import Phase
from mtp.rollouts.prompt_format import PromptFormat
from mtp.tasks.row_examples import to_examples
from mtp.tasks.rows import RowsConfig
from mtp.training.collate import collate_text
from mtp.training.objectives.scored import replay_batch

PHASES = {
    "thought": Phase(mode="fast", opened_by="<think>"),
    "answer": Phase(mode="slow", opened_by="</think>"),
}


def loss(model, samples, plan):
    """Sum of -log p over main's rows."""
    batch = collate_text(samples, plan, 4, 0)
    scored = replay_batch(model, batch, channel_gradient=1.0, use_head=False, impl="torch")
    return -scored.stats()["main"].logprob.sum().item(), batch


def test_main_is_trained_on_completions_alone(plan):
    """The sum is that of stock's cross-entropy with the prompt's labels at -100."""
    model = tiny_model()
    samples = [([5, 6, 7], [8, 9, 10, 2, 11, 1]), ([12], [13, 2, 14, 1])]
    with torch.no_grad():
        got, batch = loss(model, samples, plan)
    wanted = 0.0
    for prompt, completion in samples:
        ids = torch.tensor([prompt + completion])
        labels = torch.tensor([[-100] * len(prompt) + completion])
        logits = model(ids).logits[0, :-1].detach().float()
        wanted += float(
            torch.nn.functional.cross_entropy(
                logits, labels[0, 1:], ignore_index=-100, reduction="sum"
            )
        )
    assert abs(got - wanted) < 1e-3
    assert batch.main.targets.tolist() == samples[0][1] + samples[1][1]
    # The head's targets are within completions too.
    assert set(batch.head.targets.tolist()) <= set(samples[0][1] + samples[1][1])


def test_every_answer_of_a_conversation_is_trained_on_once():
    """turns=all: each answer is scored after the prompt that it is given at decoding time."""
    fmt = PromptFormat(toy_tokenizer(chat_template=CHAT), PHASES, 4)
    row = {
        "messages": [
            {"role": "user", "content": "1+1="},
            {"role": "assistant", "content": "2", "reasoning_content": "1 and 1"},
            {"role": "user", "content": "and 1?"},
            {"role": "assistant", "content": "<think>2 and 1</think>3"},
        ]
    }
    examples = [e for _, e in to_examples(row, RowsConfig(turns="all"), "r")]
    samples = [fmt.example_ids(example) for example in examples]
    batch = collate_text(samples, fmt.plan(), 4, fmt.pad_id)
    shown = [str(fmt.tokenizer.decode(prompt)) for prompt, _ in samples]
    assert shown == [
        "<|user|>1+1=<|end|><|assistant|><think>",
        "<|user|>1+1=<|end|><|assistant|>2<|end|><|user|>and 1?<|end|><|assistant|><think>",
    ]
    targets = str(fmt.tokenizer.decode(batch.main.targets.tolist()))
    assert targets == "1 and 1</think>2</s>2 and 1</think>3</s>"
