"""One RL step of mtp and of TRL's GRPOTrainer, side by side on this machine.

    python benchmarks/rl_step.py [--json] [--rollouts 16,128] [--tokens 128] [--repeats 2]
                                 [--experiment smollm2_rl] [--source FOLDER] [--dtype float32]
                                 [--precision bf16-mixed]

A step samples rollouts, scores them and updates the weights. Both sides have the same main (the
experiment's, SmolLM2-135M by default), problems, prompts, group size, number of rollouts and of
tokens (no rollout ends early), micro-batches, precision, attention and loss (DAPO's), no reference
model, and a process of their own with large memory pages (`train.py`), in which two steps are run
before the timed ones, since memory grows to its size in them; medians are reported.

For TRL every token is a pass. The most that fast mode can be faster at sampling is
(k + 1) t(1) / t(k + 1), with t(n) the time of a pass of n new tokens, measured here too. Replay is
compared with a plain causal forward and backward of main alone over the very same text, and
`peak_bytes` is the largest resident memory of the process, its imports and weights included, or on
a GPU the largest that its allocator has given out. With --source main is another model, such as
`random_model.py` writes, with a fresh head of the size of smollm2's. Both sides run on a GPU if
there is one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from measure import median_seconds, medians, peak_resident, print_json  # noqa: E402
from measure import timed as timed_call  # noqa: E402

GROUP_SIZE = 8
MICRO_BATCH = 16
CLIP_NORM = 0.3
LEARNING_RATE = 1e-6
WARM_UP = 2
"""Steps before the timed ones."""
CACHED = 64
"""Tokens in the cache when a pass is timed."""


@dataclass(frozen=True)
class Case:
    """The settings of a step, which both sides share."""

    experiment: str
    """Name of the experiment that gives main, head and task."""
    source: str | None
    """Folder of another main."""
    dtype: str
    """Dtype of the weights."""
    precision: str
    """Precision of the products, as Fabric names it."""
    rollouts: int
    """Rollouts of a step."""
    tokens: int
    """Tokens of each rollout."""
    repeats: int
    """Timed steps."""

    def arguments(self) -> list[str]:
        """Options of this file that give the case."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def configuration(experiment: str, source: str | None = None, dtype: str = "float32") -> Any:
    """Model, head, task and text as the experiment has them, with the main of a folder if given."""
    from hydra import compose, initialize_config_dir

    from mtp.cli.hydra import register_configs
    from mtp.config import to_run_config

    register_configs()
    overrides = [f"experiment={experiment}", "run_dir=none", f"model.dtype={dtype}"]
    if source is not None:
        overrides += ["model=smollm2", f"model.source={source}", "model.gguf_file=null"]
        overrides += ["head=smollm2", "head.taps=null"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return to_run_config(compose("train", overrides))


def mtp_side(case: Case) -> dict[str, float]:
    """Seconds of mtp's step and its parts; then the two yardsticks, after the peak is read."""
    import torch
    from lightning.fabric import Fabric

    from mtp.hub.build import build_model
    from mtp.modeling.decode_options import DecodeOptions
    from mtp.modeling.phases import PhasePlan
    from mtp.modeling.sampler import Sampler
    from mtp.rollouts.advantage import GroupRewards, group_std
    from mtp.rollouts.reward import RewardConfig, score
    from mtp.rollouts.rollout import sample
    from mtp.training.collate import collate_rollouts
    from mtp.training.objectives import ObjectiveConfig
    from mtp.training.objectives.policy import Policy
    from mtp.training.optimizers import OptimizerConfig, build_optimizer, split_parameters
    from mtp.training.step_module import wrap
    from mtp.training.update import update

    config = configuration(case.experiment, case.source, case.dtype)
    task = config.task.build()
    torch.manual_seed(1)
    model, text = build_model(config.model, config.head, config.decoding, task)
    fabric = Fabric(accelerator="auto", devices=1, precision=case.precision)
    model.to(fabric.device)
    settings = OptimizerConfig(lr=LEARNING_RATE)
    optimizers = {
        part: build_optimizer(parameters, settings)
        for part, parameters in split_parameters(model).items()
    }
    wrapped = wrap(fabric, model)
    optimizers = {part: fabric.setup_optimizers(o) for part, o in optimizers.items()}
    stepping = 0.0

    def timed(step: Callable[[], Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal stepping
            seconds, out = timed_call(lambda: step(*args, **kwargs))
            stepping += seconds
            return out

        return call

    for optimizer in optimizers.values():
        optimizer.step = timed(optimizer.step)
    examples = [task.example("train", i) for i in range(case.rollouts // GROUP_SIZE)]
    endless = PhasePlan(keep=[text.block_size], opened_by=[None], eos_ids=[])
    objective = ObjectiveConfig(policy=Policy(weight=1.0))

    def roll() -> Any:
        with fabric.autocast():
            return sample(
                model,
                text,
                examples,
                endless,
                DecodeOptions(sampler=Sampler(), max_new_tokens=case.tokens, impl=config.kernels),
                group_size=GROUP_SIZE,
            )

    def collate(rollouts: Any) -> list[Any]:
        rewards = score(task, text, rollouts, RewardConfig(), max_new_tokens=case.tokens)
        advantages = group_std(
            GroupRewards(rewards.total, rewards.outcomes, rewards.total)
        ).flatten()
        # Untrained heads solve nothing; noise replaces advantages so that no gradient is zero.
        advantages = advantages + 0.1 * torch.randn(case.rollouts)
        return [
            collate_rollouts(
                rollouts.prompts, rollouts.out, advantages,
                list(range(at, min(at + MICRO_BATCH, case.rollouts))), text.block_size, text.pad_id,
            ).to(fabric.device)
            for at in range(0, case.rollouts, MICRO_BATCH)
        ]  # fmt: skip

    clip_norms = {"main": CLIP_NORM, "head": CLIP_NORM}
    rows, batches = [], []
    for _ in range(WARM_UP + case.repeats):
        stepping = 0.0
        rollout_seconds, rollouts = timed_call(roll)
        reward_seconds, batches = timed_call(lambda sampled=rollouts: collate(sampled))
        update_seconds, _ = timed_call(
            lambda given=batches: update(
                fabric, wrapped, optimizers, given, objective,
                clip_norms=clip_norms, sampler=Sampler(),
            )
        )  # fmt: skip
        rows.append(
            {
                "seconds": rollout_seconds + reward_seconds + update_seconds,
                "rollout_seconds": rollout_seconds,
                "replay_seconds": update_seconds - stepping,
                "update_seconds": stepping,
            }
        )
    result = medians(rows[WARM_UP:]) | {"peak_bytes": peak_resident()}
    result["causal_seconds"] = causal_seconds(fabric, model, batches, case.repeats)
    result["limit"] = speed_limit(fabric, model, case.rollouts, case.repeats)
    return result


def causal_seconds(fabric: Any, model: Any, batches: list[Any], repeats: int) -> float:
    """Seconds of main's forward and backward over the text, every written token scored."""
    import torch

    from mtp.training.objectives.scored import OutputRows

    def call() -> None:
        for batch in batches:
            with fabric.autocast():
                replayed = model.replay(batch.tokens)
                hidden = replayed.main_hidden.flatten(0, 1)
                rows = torch.cat([batch.main.positions, batch.head.positions])
                targets = batch.tokens.flatten()[rows + 1]
                scored = OutputRows(hidden[rows], replayed.main_output, targets)
                loss = -scored.stats().logprob.mean()
            fabric.backward(loss)
        for parameter in model.parameters():
            parameter.grad = None

    for _ in range(WARM_UP):
        call()
    return median_seconds(call, repeats)


def speed_limit(fabric: Any, model: Any, num_rows: int, repeats: int) -> float:
    """(k + 1) t(1) / t(k + 1), each t over a cache of `CACHED` tokens a row."""
    import torch

    from mtp.modeling.cache import BlockCache

    seconds = {}
    with torch.no_grad(), fabric.autocast():
        device = fabric.device
        cache = BlockCache(model.config.num_hidden_layers, num_rows, CACHED + model.block_size)

        def forward(first: int, number: int) -> None:
            tokens = torch.zeros(num_rows, number, dtype=torch.long, device=device)
            start = torch.full((num_rows,), first, device=device)
            hidden, _ = model.main_states(tokens, start, cache, first + number)
            model.get_output_embeddings()(hidden[:, -1])

        forward(0, CACHED)
        for number in (1, model.block_size):
            forward(CACHED, number)
            seconds[number] = median_seconds(partial(forward, CACHED, number), 5 * repeats)
    return model.block_size * seconds[1] / seconds[model.block_size]


def trl_side(case: Case) -> dict[str, float]:
    """Seconds of a step of TRL's GRPOTrainer, and of its generation."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from mtp.hub.build import build_model, save_model

    config = configuration(case.experiment, case.source, case.dtype)
    task = config.task.build()
    main, text = build_model(config.model, config.head, config.decoding, task)
    with tempfile.TemporaryDirectory() as folder:
        save_model(main, text, Path(folder))
        del main
        # Main alone: the head is skipped.
        model = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation=config.model.implementation()
        )
    examples = [task.example("train", i) for i in range(case.rollouts // GROUP_SIZE)]
    prompts = [text.tokenizer.decode(text.prompt_ids(e.prompt)) for e in examples]
    steps: list[float] = []
    generation: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps.append(time.perf_counter() - self.began)

    def reward(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        # As on mtp's side: noise, so that no gradient is zero.
        import random

        given = zip(completions, answer, strict=True)
        return [float(c.strip() == a) + 0.1 * random.random() for c, a in given]

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            processing_class=text.tokenizer,
            train_dataset=Dataset.from_dict(
                {"prompt": prompts, "answer": [e.answer for e in examples]}
            ),
            callbacks=[Clock()],
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=not torch.cuda.is_available(),
                bf16=case.precision == "bf16-mixed",
                gradient_checkpointing=False,
                per_device_train_batch_size=min(MICRO_BATCH, case.rollouts),
                gradient_accumulation_steps=max(1, case.rollouts // MICRO_BATCH),
                num_generations=GROUP_SIZE,
                max_completion_length=case.tokens,
                generation_kwargs={"min_new_tokens": case.tokens},
                loss_type="dapo",
                beta=0.0,
                temperature=1.0,
                max_grad_norm=CLIP_NORM,
                learning_rate=LEARNING_RATE,
                max_steps=WARM_UP + case.repeats,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
        )
        generate = trainer._generate_single_turn

        def timed(*args: Any, **kwargs: Any) -> Any:
            seconds, out = timed_call(lambda: generate(*args, **kwargs))
            generation.append(seconds)
            return out

        trainer._generate_single_turn = timed
        trainer.train()
    pairs = zip(steps[WARM_UP:], generation[WARM_UP:], strict=True)
    rows = [{"seconds": whole, "generation_seconds": part} for whole, part in pairs]
    return medians(rows) | {"peak_bytes": peak_resident()}


SIDES = {"mtp": mtp_side, "trl": trl_side}


def measure(side: str, case: Case) -> dict[str, float]:
    """A side's numbers, from a process of its own."""
    command = [sys.executable, __file__, "--side", side, *case.arguments()]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_HUB_OFFLINE": "1",
        "THP_MEM_ALLOC_ENABLE": "1",
    }
    print(f"{side}, {case.rollouts} rollouts: {WARM_UP} + {case.repeats} steps", file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"error: {side}, {case.rollouts} rollouts:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(case: Case) -> dict[str, Any]:
    """Both sides at one size."""
    mtp, trl = (measure(side, case) for side in SIDES)
    causal, limit = mtp.pop("causal_seconds"), mtp.pop("limit")
    speedup = trl["generation_seconds"] / mtp["rollout_seconds"]
    return {
        "rollouts": case.rollouts,
        "mtp": mtp,
        "trl": trl,
        "trl_over_mtp": trl["seconds"] / mtp["seconds"],
        "rollout_over_limit": speedup / limit,
        "replay_over_causal": mtp["replay_seconds"] / causal,
    }


def show(result: dict[str, Any]) -> None:
    """One size as text."""
    mtp, trl = result["mtp"], result["trl"]
    print(f"{result['rollouts']} rollouts")
    print(
        f"  mtp {mtp['seconds']:.2f} s: rollouts {mtp['rollout_seconds']:.2f}, replay "
        f"{mtp['replay_seconds']:.2f}, update {mtp['update_seconds']:.2f}; "
        f"{mtp['peak_bytes'] / 2**30:.2f} GiB"
    )
    print(
        f"  TRL {trl['seconds']:.2f} s: generation {trl['generation_seconds']:.2f}; "
        f"{trl['peak_bytes'] / 2**30:.2f} GiB"
    )
    print(
        f"  TRL / mtp {result['trl_over_mtp']:.2f}; rollouts reach "
        f"{100 * result['rollout_over_limit']:.0f} % of the limit; replay is "
        f"{result['replay_over_causal']:.2f} of a plain causal pass"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--rollouts", default="16,128", help="sizes, with commas between")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each rollout")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps of each size")
    parser.add_argument("--experiment", default="smollm2_rl", help="whose main, head and task")
    parser.add_argument("--source", metavar="FOLDER", help="another main, with a fresh head")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights"
    )
    parser.add_argument(
        "--precision",
        default="bf16-mixed",
        choices=("bf16-mixed", "32-true"),
        help="of the products; a CPU without bfloat16 arithmetic is slow at bf16-mixed",
    )
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = [int(size) for size in given.rollouts.split(",")]
    bad = [size for size in sizes if size % GROUP_SIZE or size < 1]
    if bad or given.tokens < 1 or given.repeats < 1:
        parser.error(f"--rollouts must be multiples of {GROUP_SIZE}, the others at least 1")
    shared = (given.experiment, given.source, given.dtype, given.precision)
    cases = [Case(*shared, size, given.tokens, given.repeats) for size in sizes]
    if given.side:
        print_json(True, SIDES[given.side](cases[0]))
        return
    results = []
    for case in cases:
        results.append(compare(case))
        if not given.json:
            show(results[-1])
    print_json(given.json, {"results": results})


if __name__ == "__main__":
    main()
