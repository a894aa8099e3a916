"""The run's config: one typed tree, composed by Hydra from conf/ and checked before anything runs.

Every other dataclass is defined with the code that it configures. Hydra reports unknown keys and
wrong types; this project reports impossible values, each with its key.
"""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from mtp_kernels.dispatch import IMPLS
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from .common.bounds import bounded, check_numbers
from .common.files import save_text
from .evaluation.evaluate import EvaluationConfig
from .hub.build import ModelConfig
from .hub.run_folder import DECIDES, check_name
from .modeling.heads import HeadConfig
from .reports.loggers import SINKS, LoggerConfig
from .rollouts.advantage import AdvantageConfig
from .rollouts.reward import RewardConfig
from .rollouts.rollout import DecodingConfig
from .tasks import TASK_CONFIGS
from .tasks.base import TaskConfig
from .training.channel import ChannelConfig
from .training.numbers import NumbersConfig
from .training.runtime import FabricConfig
from .training.stage import ExamplesConfig, RolloutsConfig, StageConfig


@dataclass(kw_only=True)
class RunConfig:
    """Everything a run depends on."""

    name: str = "default"
    """Name of the run and of its directory."""
    run_dir: str = MISSING
    """Directory that the run writes to; `runs/<name>` by default."""
    seed: int = bounded(1, at_least=0, at_most=2**32 - 1)
    """Seed of weights, data, rollouts and anchors."""
    resume: bool | str = False
    """Continue from the run's last checkpoint: `true` requires one, `auto` starts a new run if
    there is none. The name of a file in `checkpoints/`, such as `best`, continues from that one."""
    overwrite: bool = False
    """Replace an existing run."""
    dry_run: bool = False
    """Build everything, run a few steps of each stage and one export, and print the cost of a full
    run."""
    checkpoint_minutes: float = bounded(10.0, at_least=0)
    """Minutes between two checkpoints within a stage."""
    grace_seconds: float = bounded(0.0, at_least=0)
    """Seconds that a cluster leaves between the signal that asks a run to stop and its end. The run
    warns once if a step or an evaluation takes longer, since the signal could not be obeyed in
    time. 0: not known."""
    kernels: str = "auto"
    """Implementation of the output-layer ops: `auto` (triton on a GPU, else torch), `triton`,
    `torch` or `reference`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    channel: ChannelConfig = field(default_factory=ChannelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    fabric: FabricConfig = field(default_factory=FabricConfig)
    numbers: NumbersConfig = field(default_factory=NumbersConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """Stages by name, in order. A mapping, so that `stages.rl.steps=100` works on the command
    line."""
    experiment: Any = None
    """Experiment chosen on the command line; its values are already merged into the other keys."""

    def active_stages(self) -> dict[str, StageConfig]:
        """Stages that have steps, in order."""
        return {name: stage for name, stage in self.stages.items() if stage.steps}

    def weight_dtype(self) -> torch.dtype:
        """Dtype of the weights: that of `model.dtype`, or bfloat16 in precision bf16-true."""
        in_bfloat16 = self.fabric.precision == "bf16-true"
        return torch.bfloat16 if in_bfloat16 else self.model.torch_dtype()

    def validate(self) -> None:
        """Raises ValueError naming the key of an impossible value."""
        check_numbers(self)
        check_name(self.name)
        if self.resume and self.overwrite:
            raise ValueError(
                f"resume={str(self.resume).lower()} and overwrite=true contradict each other; "
                "set resume=false to start anew"
            )
        if not self.active_stages():
            raise ValueError(
                "stages must hold at least one stage with steps; choose experiment=..."
            )
        for name, stage in self.active_stages().items():
            stage.validate(name)
        self.model.validate()
        self.head.validate()
        self.channel.validate()
        if self.kernels not in IMPLS:
            raise ValueError(f"kernels must be one of {list(IMPLS)}, got {self.kernels!r}")
        self.decoding.sampler()
        self.fabric.validate()
        self.numbers.validate()
        if self.model.attention not in ("sdpa", "eager"):
            raise ValueError(
                f"model.attention must be one of sdpa, eager, got {self.model.attention!r}"
            )
        self.logger.validate()
        self._check_shares()
        self._check_temperature()
        self._check_streams()
        self._check_lag()
        self._check_compiled()

    def _check_temperature(self) -> None:
        """Raises ValueError where rollouts are to differ, and are greedy."""
        for name, stage in self.active_stages().items():
            if stage.objective.policy.weight and not self.decoding.temperature:
                raise ValueError(
                    "decoding.temperature must be above 0, got 0: an advantage compares the "
                    f"rollouts of one prompt, which are equal then; set stages.{name}.objective."
                    "policy.weight=0 to learn from greedy rollouts by the other streams"
                )

    def _check_streams(self) -> None:
        """Raises ValueError for a stream that does not fit the sampler or the head."""
        num_slots = self.head.num_slots
        for name, stage in self.active_stages().items():
            kl = stage.objective.reference_kl
            if kl.weight and kl.kind != "full" and self.decoding.sampler().truncates:
                key = f"stages.{name}.objective.reference_kl.kind"
                raise ValueError(
                    f"{key}={kl.kind} needs decoding.top_k=0 and decoding.top_p=1, got "
                    f"{self.decoding.top_k} and {self.decoding.top_p}; use {key}=full"
                )
            for stream, settings in stage.objective.active().items():
                key = f"stages.{name}.objective.{stream}"
                weights = getattr(settings, "slot_weights", [])
                if weights and len(weights) != num_slots:
                    raise ValueError(
                        f"{key}.slot_weights must have head.num_slots={num_slots} entries, one per "
                        f"slot, got {len(weights)}; leave it empty for equal weights"
                    )

    def _check_lag(self) -> None:
        """Raises ValueError where no other process can sample the rollouts."""
        for name, stage in self.active_stages().items():
            if stage.rollouts.lag is None:
                continue
            key = f"stages.{name}.rollouts.lag={stage.rollouts.lag}"
            if self.fabric.strategy == "fsdp2":
                raise ValueError(
                    f"{key} sends whole weights to the process that samples, got "
                    "fabric.strategy=fsdp2; use fabric.strategy=ddp, or set it to null"
                )
            if not self.channel.is_text:
                raise ValueError(
                    f"{key} samples text, got channel.name={self.channel.name}; set it to null"
                )

    def _check_compiled(self) -> None:
        """Raises ValueError where passes cannot be compiled, whatever the model is."""
        if not self.decoding.compile_passes:
            return
        if self.fabric.strategy == "fsdp2":
            raise ValueError(
                "decoding.compile_passes must be false with fabric.strategy=fsdp2, which gathers "
                "weights in every pass; use fabric.strategy=ddp"
            )
        if not self.channel.is_text:
            raise ValueError(
                "decoding.compile_passes must be false with a channel that is not text, got "
                f"channel.name={self.channel.name}"
            )

    def _check_shares(self) -> None:
        """Raises ValueError for a step's examples that the processes cannot divide evenly."""
        processes = self.fabric.devices * self.fabric.num_nodes
        for name, stage in self.active_stages().items():
            sizes = {
                "examples.batch_size": stage.examples.batch_size,
                "rollouts.num_prompts": stage.rollouts.num_prompts,
                "rollouts.num_solved": stage.rollouts.num_solved,
            }
            for key, size in sizes.items():
                if size % processes:
                    raise ValueError(
                        f"stages.{name}.{key} must be a multiple of the {processes} processes "
                        f"(fabric.devices times fabric.num_nodes), got {size}"
                    )


def decides_numbers(override: str) -> bool:
    """True for an override of the training command that a run's numbers may depend on.

    override: `key=value`, also with + or ~ before the key. A key of no setting of mtp, such as a
    group of settings in a folder of the user's own, may decide them.
    """
    key = override.partition("=")[0].lstrip("+~")
    names = (*DECIDES, "experiment")
    if any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in names):
        return True
    others = {one.name for one in fields(RunConfig)} | {"study", "sweep", "sweeper"}
    return key.partition(".")[0] not in others


def save_run_config(config: RunConfig, path: Path) -> None:
    """Write a run's config.yaml. `task_name` next to `task` names the type of its settings."""
    name = next((name for name, cls in TASK_CONFIGS.items() if cls is type(config.task)), None)
    content = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(content, dict)
    save_text(path, OmegaConf.to_yaml(OmegaConf.create({"task_name": name, **content})))


def load_run_config(path: Path) -> RunConfig:
    """The config that `save_run_config` wrote.

    Raises ValueError naming the file if it is missing or does not fit.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a run that train.py wrote")
    try:
        content = OmegaConf.load(path)
        if not isinstance(content, DictConfig):
            raise ValueError("it is not a mapping of keys")
        name = content.pop("task_name", None)
        if name not in TASK_CONFIGS:
            raise ValueError(f"task_name must be one of {sorted(TASK_CONFIGS)}, got {name!r}")
        content = OmegaConf.create(with_new_keys(OmegaConf.to_container(content)))
        schemas = OmegaConf.create({"task": TASK_CONFIGS[name], "logger": logger_schema(content)})
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), schemas, content)
        assert isinstance(merged, DictConfig)
        return to_run_config(merged)
    except (OmegaConfBaseException, YAMLError, ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} could not be read: {str(error).splitlines()[0]}") from None


def with_new_keys(content: Any) -> Any:
    """A run's settings as earlier versions wrote them, with today's keys of the stages.

    `content` is changed in place. A checkpoint's settings are translated too, so that it resumes.
    """
    for stage in content.get("stages", {}).values():
        if "kind" in stage:
            _move_stage_keys(stage)
    return content


def with_defaults(content: Any, config: RunConfig) -> Any:
    """A checkpoint's settings; those that were added since have their default.

    A default is what a run did before there was a choice. `content` is changed.
    """
    _fill(content, asdict(RunConfig(task=type(config.task)())))
    for stage in content["stages"].values():
        _fill(stage, asdict(StageConfig()))
    return content


def _fill(content: dict[str, Any], defaults: dict[str, Any]) -> None:
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(content.get(key), dict):
            _fill(content[key], default)
        else:
            content.setdefault(key, default)


def _move_stage_keys(stage: dict[str, Any]) -> None:
    objective = stage["objective"]
    objective["reference_kl"] = objective.pop("leash")
    objective["extra"] = {}
    for name in ("head_kl", "preserve"):
        objective[name].pop("reverse")
    stage["optimizers"] = {part: stage.pop(part) for part in ("main", "head")}
    for optimizer in stage["optimizers"].values():
        optimizer.pop("betas")
    anchors = {name: stage.pop(name) for name in ("num_anchors", "block_anchors")}
    examples = {"batch_size": stage.pop("batch_size")} | anchors
    sampling = {
        name: stage.pop(name)
        for name in ("num_prompts", "group_size", "num_minibatches", "num_epochs", "recompute_old",
                     "drop_uninformative", "max_rounds", "num_solved")
    }  # fmt: skip
    rollouts = {"mode": stage.pop("rollout_mode")} | sampling | anchors
    in_rl = stage.pop("kind") == "rl"
    # Keys of the other kind had no effect, and are an error today.
    if in_rl:
        stage["examples"], stage["rollouts"] = asdict(ExamplesConfig()), rollouts
    else:
        stage["examples"], stage["rollouts"] = examples, asdict(RolloutsConfig())
        stage["reward"], stage["advantage"] = asdict(RewardConfig()), asdict(AdvantageConfig())


def logger_schema(content: DictConfig) -> dict[str, Any]:
    """Schemas of the sinks of a run's `logger`, with the keys of earlier versions translated.

    A sink that this process does not know is left out, since opening a run's model needs no sink.
    """
    logger = content.setdefault("logger", {})
    if "wandb" in logger:
        with_wandb, log_every = logger.pop("wandb"), logger.pop("log_every")
        content.logger = {"log_every": log_every, "sinks": {"files": {}}}
        if with_wandb:
            content.logger.sinks.wandb = logger
    for name in [name for name in content.logger.get("sinks", {}) if name not in SINKS]:
        del content.logger.sinks[name]
    return {"sinks": {name: SINKS[name].config for name in content.logger.get("sinks", {})}}


def to_run_config(config: DictConfig) -> RunConfig:
    """The composed config as dataclasses, validated."""
    run = OmegaConf.to_object(config)
    assert isinstance(run, RunConfig)
    unknown = unknown_keys(run)
    if unknown:
        raise ValueError(
            f"unknown key {unknown[0]}; mtp has no such field, so it cannot be added with +"
        )
    run.validate()
    return run


def unknown_keys(node: Any, prefix: str = "") -> list[str]:
    """Keys that `+key=value` added to a dataclass that has no such field."""
    if isinstance(node, dict):
        return [key for k, v in node.items() for key in unknown_keys(v, f"{prefix}{k}.")]
    if not is_dataclass(node):
        return []
    known = {field.name for field in fields(node)}
    found = [f"{prefix}{name}" for name in vars(node) if name not in known]
    return found + [key for k, v in vars(node).items() for key in unknown_keys(v, f"{prefix}{k}.")]
