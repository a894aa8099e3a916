"""The runs whose numbers are recorded, and everything that they know of the code under test.

Module paths, config keys, metric names and the layout of a run's folder are named in this file
alone. A change that renames them edits this file and leaves `values/` as it is: the numbers must
not move. `CASES` maps a name to a function (scratch folder) -> {section: {number: value}}.

`old_run.tar.xz` is the folder of a run (config.yaml, stages/joint, export) as the code wrote it
when the values were first recorded. It is never made anew: it shows that what users have on their
disks still opens. It is an archive so that no tool that edits source files changes it. The RL cases
start from its model: 35,000 parameters that add two numbers below 32, half of them right in either
mode. The weights are rounded to bfloat16, which halves the archive.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from mtp.cli.hydra import register_configs
from mtp.cli.main import main as command_line
from mtp.config import RunConfig, load_run_config, to_run_config
from mtp.hub.build import build_model, load_model
from mtp.trainer import train
from mtp.training.stage import RolloutsConfig

ROOT = Path(__file__).parents[2]
ARCHIVE = Path(__file__).with_name("old_run.tar.xz")
PACKAGES = ("mtp", "mtp_kernels")
"""Packages that an exported folder must work without."""

Values = dict[str, dict[str, Any]]

NEAR_TIES = {"accuracy": 5e-3}
"""Added to what is allowed of numbers with such a name. The likeliest token of an untrained model
leads by so little that rounding changes one token in a thousand."""

UNSTEADY = {"step_time", "rollout_time", "tokens_per_second", "seconds", "global_step"}
"""Fields with times, and those that only hold a record's position."""

COMMON = [
    "seed=1",
    "fabric.accelerator=cpu",
    "fabric.num_threads=1",
    "fabric.precision=32-true",
    "logger.log_every=1",
    "evaluation.num_problems=6",
    "evaluation.num_interim_problems=4",
]
SMALL = [
    # Random numbers of a token are then a function of a seed and its position, on every machine.
    "kernels=torch",
    "task.num_terms=2",
    "task.low=0",
    "task.high=31",
    "decoding.max_new_tokens=16",
    "decoding.temperature=1.0",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=2",
    "model.config.max_position_embeddings=64",
    "head.num_slots=3",
    "head.taps=[1,2]",
    "head.hidden_size=32",
    "head.intermediate_size=48",
    "stages.main.steps=0",
    "stages.head.steps=0",
    "stages.joint.examples.batch_size=16",
    "stages.rl.rollouts.num_prompts=4",
    "stages.rl.rollouts.group_size=4",
    "stages.rl.evaluate_every=0",
]
RL_ALONE = [
    "stages.joint.steps=0",
    "stages.rl.steps=2",
    "stages.rl.reference=start",
    "evaluation.reference=start",
]
RATES = [
    f"stages.rl.optimizers.{part}.{setting}"
    for part in ("main", "head")
    for setting in ("algorithm=adamw", "lr=7e-4", "warmup_steps=0", "decay=constant")
]
"""High enough for ratios to leave the clip range in the second update on the same rollouts. AdamW,
because Muon raises small singular values of a gradient, and their rounding with them."""


def configured(*overrides: str) -> RunConfig:
    register_configs()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("train", [*COMMON, *overrides])
    return to_run_config(composed)


def numbers_of_run(folder: Path, *overrides: str) -> Values:
    """Trains, and reads what the run logged: each step, each evaluation, each stage's summary."""
    run = folder / "run"
    with redirect_stdout(io.StringIO()):
        train(configured(f"run_dir={run}", *overrides))
    values: Values = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        section = f"{record.pop('stage')} {record.pop('step')}"
        values.setdefault(section, {}).update(steady(record))
    for stage in json.loads((run / "summary.json").read_text())["stages"]:
        values[f"{stage.pop('name')} end"] = steady(stage)
    return values


def steady(record: dict[str, Any]) -> dict[str, Any]:
    """Without clocks, and with the names that metrics had when they were recorded."""
    return {
        name.replace("reference_kl_", "leash_"): value
        for name, value in record.items()
        if name not in UNSTEADY
    }


def old_run(folder: Path) -> Path:
    """The recorded folder of a run, unpacked."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "old_run"


def from_old_run(folder: Path, *overrides: str) -> Values:
    """RL alone, from the recorded model."""
    start = f"model.source={old_run(folder)}/stages/joint"
    return numbers_of_run(folder, *SMALL, *RL_ALONE, start, *overrides)


def default(folder: Path) -> Values:
    """The run of `make train`: its models, its four stages, a few steps of each."""
    return numbers_of_run(
        folder,
        "stages.main.steps=3",
        "stages.head.steps=2",
        "stages.joint.steps=3",
        "stages.joint.evaluate_every=2",
        "stages.joint.stop_every=2",
        "stages.rl.steps=2",
        "stages.rl.rollouts.num_prompts=4",
    )


ESTIMATORS = {"reinforce_pp": "k1", "rloo": "k3"}
"""Algorithms whose case estimates the reference KL from the sampled tokens; the others sum it."""


def algorithm(name: str) -> Callable[[Path], Values]:
    """Two steps of two updates: the first on-policy, the second with ratios that are clipped."""

    def run(folder: Path) -> Values:
        objective, overrides = "stages.rl.objective", list(RATES)
        if name in ESTIMATORS:
            overrides.append(f"{objective}.reference_kl.kind={ESTIMATORS[name]}")
        overrides += [
            f"{objective}.policy.algorithm={name}",
            f"{objective}.policy.length=16",
            "stages.rl.advantage.kind=null",
            "stages.rl.rollouts.num_epochs=2",
        ]
        clips = configured("run_dir=unused", *overrides).stages["rl"].objective.policy.clips()
        # GSPO's range is so narrow that a loss hardly shows it.
        clipped = {"clip range": {part: list(range_) for part, range_ in clips.items()}}
        return clipped | from_old_run(folder, *overrides)

    return run


def rl_options(folder: Path) -> Values:
    """Settings that other cases leave at their defaults: costs, filters, estimators, replayed
    ratios.
    """
    objective = "stages.rl.objective"
    return from_old_run(
        folder,
        "decoding.top_k=12",
        "stages.rl.steps=2",
        "stages.rl.rollouts.num_prompts=2",
        "stages.rl.rollouts.drop_uninformative=true",
        "stages.rl.rollouts.max_rounds=3",
        "stages.rl.rollouts.num_minibatches=2",
        "stages.rl.micro_batch_size=3",
        "stages.rl.rollouts.num_solved=4",
        "stages.rl.rollouts.recompute_old=true",
        "stages.rl.channel_gradient=0.5",
        "stages.rl.channel_ramp_steps=2",
        "stages.rl.logits_detach=true",
        "stages.rl.gradient_checkpointing=true",
        f"{objective}.policy.ratio=block",
        f"{objective}.policy.correction_cap=2.0",
        f"{objective}.policy.head_clip_low=0.1",
        f"{objective}.policy.head_weight=0.5",
        f"{objective}.main_ce.weight=0.1",
        f"{objective}.head_ce.weight=0.2",
        f"{objective}.head_kl.weight=0.3",
        f"{objective}.reference_kl.reverse=true",
        "stages.rl.reward.token_cost=0.01",
        "stages.rl.reward.format_cost=0.3",
        "stages.rl.reward.overlong_buffer=6",
        "stages.rl.reward.legibility_cost=0.05",
        *RATES,
        "stages.rl.optimizers.head.weight_decay=0.1",
    )


def slow_rollouts(experiment: str) -> Callable[[Path], Values]:
    """Main writes alone, and the head learns from what it wrote."""
    return lambda folder: from_old_run(folder, f"experiment={experiment}", *RATES)


def segments(folder: Path) -> Values:
    """Thoughts in segments with a memory file between them."""
    return numbers_of_run(
        folder,
        *SMALL,
        "decoding=segments",
        "decoding.max_new_tokens=44",
        "task.num_terms=3",
        "task.low=10",
        "task.high=99",
        "model.config.max_position_embeddings=256",
        "stages.joint.steps=2",
        "stages.rl.steps=2",
        "stages.rl.micro_batch_size=5",
        "stages.rl.rollouts.num_solved=2",
        "stages.rl.objective.main_ce.weight=0.1",
        "stages.rl.objective.policy.algorithm=reinforce_pp",
        "stages.rl.advantage.kind=null",
        "stages.rl.reward.pass_cost=0.01",
    )


HEADS = {
    "eavesdrop": ["head.type=eavesdrop"],
    "eavesdrop_recall": ["head.type=eavesdrop", "head.recall=true"],
    "parallel_recall": ["head.type=parallel", "head.recall=true"],
    "own_matrices": ["head.shared_embeddings=false"],
}


def head(name: str) -> Callable[[Path], Values]:
    """A head of another kind: joint supervision, then rollouts whose costs are the reward."""

    def run(folder: Path) -> Values:
        return numbers_of_run(
            folder,
            *SMALL,
            *HEADS[name],
            "evaluation.verified=true",
            "stages.joint.steps=3",
            "stages.joint.objective.head_kl.weight=0.5",
            "stages.joint.examples.num_anchors=4",
            "stages.rl.steps=2",
            "stages.rl.objective.policy.algorithm=reinforce_pp",
            "stages.rl.advantage.kind=null",
            *RATES,
        )

    return run


def random_model(name: str) -> Any:
    """Untrained, with weights so large that its tokens vary from position to position."""
    config = configured("run_dir=unused", *SMALL, *HEADS[name], "model.config.initializer_range=.3")
    torch.set_num_threads(1)
    torch.manual_seed(5)
    return build_model(config.model, config.head, config.decoding, config.task.build())[0].eval()


PROMPTS = ["17+25=", "4+9=", "30+31="]


def prompt_ids(text: Any) -> dict[str, torch.Tensor]:
    """The prompts padded on the left, as a tokenizer gives them to `generate`."""
    rows = [text.prompt_ids(prompt) for prompt in PROMPTS]
    longest = max(map(len, rows))
    ids = torch.tensor([[text.pad_id] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


MODES: dict[str, Any] = {
    "fast": "fast",
    "slow": "slow",
    "verified": "verified",
    "mixed": ["fast", "slow", "verified"],
}


def decoded(model: Any, given: dict[str, torch.Tensor], modes: list[str], **options: Any) -> Values:
    """Tokens of `generate` in each mode, and their log-probabilities."""
    values = {}
    for mode in modes:
        generator = torch.Generator().manual_seed(3)
        out = model.generate(
            **given, mtp_mode=MODES[mode], max_new_tokens=14, return_dict_in_generate=True,
            generator=generator, **options,
        )  # fmt: skip
        start = given["input_ids"].shape[1]
        values[mode] = {
            "tokens": out.sequences[:, start:].tolist(),
            "slots": out.slots.tolist(),
            "accepted": out.accepted.tolist(),
            "passes": out.passes.tolist(),
            "finished": out.finished.tolist(),
            "logprobs": out.logprobs.tolist(),
        }
    return values


def models(folder: Path) -> dict[str, Any]:
    trained, text = load_model(old_run(folder) / "stages" / "joint")
    made = {"trained": trained.eval()} | {name: random_model(name) for name in HEADS}
    return {name: (model, prompt_ids(text)) for name, model in made.items()}


def greedy(folder: Path) -> Values:
    return {
        f"{name} {mode}": numbers
        for name, (model, given) in models(folder).items()
        for mode, numbers in decoded(model, given, list(MODES), do_sample=False).items()
    }


def sampled(folder: Path) -> Values:
    values: Values = {}
    for name, (model, given) in models(folder).items():
        for title, options in (
            ("hot", {"temperature": 1.3, "top_k": 0}),
            ("cut", {"temperature": 0.9, "top_k": 9, "top_p": 0.95}),
        ):
            found = decoded(model, given, ["fast", "slow", "verified"], do_sample=True, **options)
            values |= {f"{name} {title} {mode}": numbers for mode, numbers in found.items()}
    return values


def searched(folder: Path) -> Values:
    """The three searches over thoughts."""
    model, given = models(folder)["trained"]
    values = {}
    for method in ("best_of_n", "beam", "mcts"):
        out = model.search(
            **given, config={"method": method, "n": 3}, do_sample=True, temperature=1.3, top_k=0,
            max_new_tokens=14, generator=torch.Generator().manual_seed(4),
        )  # fmt: skip
        values[method] = {
            "tokens": out.sequences[:, given["input_ids"].shape[1] :].tolist(),
            "scores": out.scores.tolist(),
            "passes": out.passes.tolist(),
            "tokens read": out.tokens_read.tolist(),
            "texts": [len(texts) for texts in out.texts],
        }
    return values


def exported(folder: Path) -> Values:
    """Content of an export, as Hugging Face reads it."""
    numbers_of_run(folder, *SMALL, "stages.joint.steps=1", "stages.rl.steps=0", "task.num_test=50")
    export = folder / "run" / "export"
    values: Values = {"folder": {"files": sorted(path.name for path in export.iterdir())}}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = json.loads((export / name).read_text())
        content.pop("transformers_version", None)
        values[name] = content
    values["chat_template.jinja"] = {"text": (export / "chat_template.jinja").read_text()}
    return values


def old_layout(folder: Path) -> Values:
    """A run's folder as earlier versions wrote it opens with the code of today."""
    run = old_run(folder)
    torch.set_num_threads(1)
    values: Values = {"config.yaml": settings_of(load_run_config(run / "config.yaml"))}
    for part in ("stages/joint", "export"):
        model, text = load_model(run / part)
        given = prompt_ids(text)
        values[part] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "slots": model.block_size,
            "logits": logits(model.eval(), given["input_ids"][0]),
            "modes of phases": [phase.mode for phase in text.phases.values()],
        }
        values |= {f"{part} {m}": v for m, v in decoded(model, given, ["fast", "slow"]).items()}
    for part in (run, run / "export"):
        with redirect_stdout(io.StringIO()) as out:
            code = command_line(["generate", str(part), "17+25=", "--mode", "fast"])
        shown = {"exit code": code, "text": out.getvalue().splitlines()[0]}
        values[f"mtp generate {part.relative_to(folder)}"] = shown
    return values


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Some settings of every part of a run's config."""
    main = config.model.config
    settings = {
        "seed": config.seed,
        "width": main["hidden_size"],
        "head's type": config.head.type,
        "head's slots": config.head.num_slots,
        "taps": config.head.taps,
        "terms": config.task.num_terms,  # type: ignore[attr-defined]
        "highest term": config.task.high,  # type: ignore[attr-defined]
        "new tokens": config.decoding.max_new_tokens,
        "temperature": config.decoding.temperature,
        "phases": {name: phase.mode for name, phase in config.decoding.phases.items()},
        "problems": config.evaluation.num_problems,
    }
    for name, stage in config.stages.items():
        # Supervised stages had these keys too, at their defaults.
        rollouts = stage.rollouts if stage.kind == "rl" else RolloutsConfig(num_prompts=16)
        weights = {stream: term.weight for stream, term in stage.objective.active().items()}
        settings[f"stage {name}"] = {
            "steps": stage.steps,
            "rates": [stage.optimizer_of(part).lr for part in ("main", "head")],
            "algorithms": [stage.optimizer_of(part).algorithm for part in ("main", "head")],
            "channel": stage.channel_gradient,
            "weights": sorted(weights.values()),
            "prompts": [rollouts.num_prompts, rollouts.group_size],
            "pass cost": stage.reward.pass_cost,
        }
    return settings


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> list[list[float]]:
    """[T, V] of main for one prompt."""
    return model(ids[None]).logits[0].tolist()


def old_export_alone(folder: Path) -> Values:
    """An export as earlier versions wrote it runs on the code beside its weights, without ours."""
    script = Path(__file__).with_name("alone.py")
    given = [str(old_run(folder) / "export"), PROMPTS[0], *PACKAGES]
    environment = os.environ | {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-I", str(script), *given],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {"export": json.loads(done.stdout.splitlines()[-1])}


ALGORITHMS = ("cispo", "dapo", "dr_grpo", "grpo", "gspo", "reinforce_pp", "rloo")

CASES: dict[str, Callable[[Path], Values]] = {
    "default": default,
    **{f"rl_{name}": algorithm(name) for name in ALGORITHMS},
    "rl_options": rl_options,
    "rl_auxiliary_ce": slow_rollouts("rl_proof/auxiliary_ce"),
    "rl_auxiliary_policy": slow_rollouts("rl_proof/auxiliary_policy"),
    "segments": segments,
    **{f"head_{name}": head(name) for name in HEADS if name != "eavesdrop"},
    "decode_greedy": greedy,
    "decode_sampled": sampled,
    "decode_searched": searched,
    "export": exported,
    "old_layout": old_layout,
    "old_export_alone": old_export_alone,
}

DRAWN_BY_MKL = {"decode_sampled", "decode_searched"}
"""Sampled by `torch.multinomial`, whose random stream on a CPU is MKL's where torch has MKL."""
