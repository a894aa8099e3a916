"""Reduced versions of the studies of docs/evidence.md."""

from pathlib import Path

import pytest
import torch
from helpers import ROOT
from hydra import compose, initialize_config_dir
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mtp.cli.hydra import register_configs
from mtp.config import to_run_config
from mtp.tasks.gsm_symbolic import GsmSymbolicConfig
from mtp.trainer import train

pytestmark = [pytest.mark.slow, pytest.mark.learning]

TEMPLATES = [16, 43, 4]
"""Small numbers, such as `David has 22 / 2 = 11 LinkedIn friends.`; template 4 is held out."""
SENTENCES = [
    "experiment=gsm_symbolic_small",
    f"task.templates={TEMPLATES}",
    "model.gguf_file=null",
    'model.add_tokens=["<think>","</think>"]',
    "head=tiny",
    "fabric.precision=32-true",
    "stages.main.steps=400",
    "stages.main.examples.batch_size=32",
    "stages.main.optimizers.main={algorithm:muon,lr:2e-3,warmup_steps:0}",
    "stages.main.evaluate_every=0",
    "stages.head.steps=60",
    "stages.head.examples.batch_size=32",
    "stages.head.evaluate_every=0",
    "stages.joint.steps=300",
    "stages.joint.examples.batch_size=32",
    "stages.joint.stop_accuracy=0",
    "stages.joint.optimizers.main={algorithm:muon,lr:1e-3}",
    "stages.joint.optimizers.head={algorithm:muon,lr:1.5e-3}",
    "stages.joint.evaluate_every=0",
    "stages.rl.steps=0",
]

SUMS = [
    "task.num_terms=2",
    "decoding.max_new_tokens=24",
    "evaluation.num_problems=256",
    "head.taps=[1,3,4]",
    "head.hidden_size=64",
    "head.intermediate_size=128",
]
TEACHER = [
    "task.num_train=1000",
    "model.config.hidden_size=64",
    "model.config.intermediate_size=192",
    "model.config.initializer_range=0.06",
    "stages.main.steps=400",
    "stages.main.evaluate_every=0",
    "stages.head.steps=0",
    "stages.joint.steps=300",
    "stages.joint.stop_accuracy=0",
    "stages.joint.evaluate_every=0",
]


def stages_of(folder: Path, *overrides: str) -> list[dict]:
    """Summaries of the stages of a run in a folder."""
    register_configs()
    fixed = ["fabric.accelerator=cpu", "fabric.num_threads=1", f"run_dir={folder}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return train(to_run_config(compose("train", [*overrides, *fixed])))["stages"]


def save_untrained_llm(folder: Path) -> None:
    """A small Llama with random weights, and a tokenizer of the words of the tasks' texts."""
    task = GsmSymbolicConfig(templates=TEMPLATES).build()
    examples = [task.example("train", i) for i in range(300)]
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokens.train_from_iterator([t for e in examples for t in (e.prompt, e.thought)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def test_english_thoughts_are_written_in_blocks(tmp_path):
    """A frozen main's head fails at them, and joint training opens the channel."""
    save_untrained_llm(tmp_path / "llm")
    source = f"model.source={tmp_path / 'llm'}"
    main, head, joint = stages_of(tmp_path / "run", *SENTENCES, source)
    assert main["slow_accuracy"] >= 0.8
    assert main["empty_thought_accuracy"] <= 0.3
    assert head["fast_accuracy"] <= 0.2
    assert joint["slow_accuracy"] >= 0.8
    assert joint["fast_accuracy"] >= 0.5
    assert joint["thought_tokens_per_pass"] >= 4.0


def test_the_reward_adds_to_what_imitation_of_an_imperfect_teacher_gives(tmp_path):
    """From one model that imitation has opened, with the same rates, steps and rollouts."""
    start = tmp_path / "start"
    teacher, joint = stages_of(start, "experiment=imperfect_teacher/start", *SUMS, *TEACHER)
    assert teacher["slow_accuracy"] <= 0.8

    def after(source: Path, arm: str, name: str, steps: int) -> dict:
        (stage,) = stages_of(
            tmp_path / name,
            f"experiment=imperfect_teacher/{arm}",
            *SUMS,
            f"model.source={source}",
            f"evaluation.reference={start / 'stages' / 'main'}",
            f"stages.rl.steps={steps}",
            "stages.rl.evaluate_every=0",
        )
        return stage

    opened = after(start / "stages" / "joint", "kl_only", "opened", 400)
    assert opened["fast_accuracy"] >= joint["fast_accuracy"] + 0.1
    source = tmp_path / "opened" / "stages" / "rl"
    imitation = after(source, "kl_only", "imitation", 500)
    reward = after(source, "reward_kl_0.03", "reward", 500)
    assert reward["fast_accuracy"] >= imitation["fast_accuracy"] + 0.1
    assert reward["fast_accuracy"] >= teacher["slow_accuracy"] + 0.05
    assert reward["true_steps"] >= imitation["true_steps"]
