"""Evaluation of a search on held-out problems: metrics of texts that are known in advance."""

from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_model

from mtp.evaluation import evaluate_search as module
from mtp.evaluation.evaluate_search import evaluate_search, outcome_scorer
from mtp.modeling.branches import Branch, SearchConfig
from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.phases import Phase
from mtp.rollouts.new_tokenizers import character_tokenizer
from mtp.rollouts.prompt_format import PromptFormat
from mtp.tasks.running_sum import RunningSum, RunningSumConfig

PHASES = {
    "thought": Phase(mode="fast", opened_by="<think>"),
    "answer": Phase(mode="slow", opened_by="</think>"),
}
TEXT = PromptFormat(character_tokenizer("0123456789+=;", ["<think>", "</think>"]), PHASES, 4)
TASK = RunningSumConfig(num_terms=2).build()
SETTINGS = {"mode": "fast", "num_problems": 5, "batch_size": 6}


def said(answer, prompt):
    return Branch(prompt=prompt, tokens=TEXT.completion_ids("1", answer), is_open=False)


def test_figures_are_shares_of_problems(monkeypatch):
    """Problem i finds i right texts of four; the chosen one is the second."""
    asked = []

    def search(model, prompts, lengths, plan, sampler, config, **options):
        texts = []
        for row in range(len(prompts)):
            example = TASK.example("test", len(asked))
            number = len(asked)
            asked.append(example)
            right = [at < number for at in range(4)]
            texts.append([said(example.answer if yes else "0", row) for yes in right])
        return SimpleNamespace(
            texts=texts,
            chosen=[found[1] for found in texts],
            passes=torch.full((len(texts),), 7),
            tokens_read=torch.arange(len(texts)),
        )

    monkeypatch.setattr(module, "search", search)
    config = SearchConfig(n=3)
    metrics = evaluate_search(
        tiny_model(),
        TEXT,
        TASK,
        config,
        DecodeOptions(max_new_tokens=14),
        scorer="logprob",
        **SETTINGS,
    )
    assert metrics == {
        "chosen_accuracy": 3 / 5,
        "any_right_accuracy": 4 / 5,
        "mean_accuracy": (0 + 1 + 2 + 3 + 4) / 4 / 5,
        "search_texts": 4.0,
        "search_passes": 7.0,
        "search_tokens_read": 2 / 5,  # batches of 2, 2 and 1 problems
        "num_problems": 5,
    }


def test_the_outcome_scores_final_answers():
    examples = [TASK.example("test", i) for i in range(2)]
    scorer = outcome_scorer(TASK, TEXT, examples)
    unfinished = Branch(prompt=0, tokens=said(examples[0].answer, 0).tokens[:-1])
    branches = [said(examples[0].answer, 0), said(examples[0].answer, 1), unfinished]
    assert scorer(branches) == [1.0, 0.0, 0.0]


def test_with_the_reward_as_scorer_what_was_found_right_is_chosen():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[TEXT.eos_id] *= 3

    class OneDigit(RunningSum):
        """Any answer of one character is right."""

        def score(self, example, answer):
            return float(len(answer) == 1)

    task = OneDigit(RunningSumConfig(num_terms=2))
    config = SearchConfig(n=24)
    options = DecodeOptions(max_new_tokens=10, generator=torch.Generator().manual_seed(0))
    metrics = evaluate_search(model, TEXT, task, config, options, scorer="reward", **SETTINGS)
    assert metrics["chosen_accuracy"] == metrics["any_right_accuracy"] > metrics["mean_accuracy"]


def test_an_unknown_scorer_is_an_error():
    message = "scorer must be one of .'logprob', 'reward'., got 'vibes'"
    with pytest.raises(ValueError, match=message):
        evaluate_search(
            tiny_model(),
            TEXT,
            TASK,
            SearchConfig(),
            DecodeOptions(max_new_tokens=14),
            scorer="vibes",
            **SETTINGS,
        )
