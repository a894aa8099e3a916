"""The run's config: one typed tree, composed by Hydra from conf/ and checked before anything runs.

Every other dataclass lives beside what it configures. Unknown keys and wrong types are Hydra's
errors; impossible values are ours, each naming its key.
"""

import hashlib
import re
import sys
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from mtp_kernels.dispatch import IMPLS
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from .checkpoint import save_text
from .evaluate import EvaluationConfig
from .logger import LoggerConfig
from .modeling_mtp import HeadConfig
from .models import ModelConfig
from .rollout import DecodingConfig
from .run_folder import check_name
from .runtime import FabricConfig
from .stage import StageConfig
from .tasks import TASK_CONFIGS
from .tasks.base import TaskConfig


@dataclass(kw_only=True)
class RunConfig:
    """Everything a run depends on."""

    name: str = "default"
    """Of the run's directory."""
    run_dir: str = MISSING
    """Where the run writes; `runs/<name>` by default."""
    seed: int = 1
    resume: bool | str = False
    """Continue from the run's last checkpoint: `true` needs one, `auto` starts if there is none.
    The name of a file in `checkpoints/`, such as `best`, continues from that one."""
    overwrite: bool = False
    """Replace a run that is there already."""
    dry_run: bool = False
    """Build everything, run three steps of each stage and one export, say what a full run costs."""
    checkpoint_minutes: float = 10.0
    """Minutes between two checkpoints within a stage."""
    kernels: str = "auto"
    """Output-layer ops: `auto` (triton on a GPU, else torch), or `triton`, `torch`, `reference`
    throughout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    fabric: FabricConfig = field(default_factory=FabricConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """By name, in order: a mapping, so that `stages.rl.steps=100` works on the command line."""
    experiment: Any = None
    """Chosen on the command line; its values are already merged into the rest."""

    def active_stages(self) -> dict[str, StageConfig]:
        """Stages that have steps, in order."""
        return {name: stage for name, stage in self.stages.items() if stage.steps}

    def validate(self) -> None:
        """Raises ValueError naming the key of an impossible value."""
        check_name(self.name)
        if self.resume and self.overwrite:
            raise ValueError(
                f"resume={str(self.resume).lower()} and overwrite=true contradict each other; "
                "with resume=false the run starts anew"
            )
        if not self.active_stages():
            raise ValueError(
                "stages must hold at least one stage with steps; choose experiment=..."
            )
        for name, stage in self.active_stages().items():
            stage.validate(name)
        self.model.validate()
        self.head.validate()
        if self.kernels not in IMPLS:
            raise ValueError(f"kernels must be one of {list(IMPLS)}, got {self.kernels!r}")
        self.decoding.sampler()
        for key in ("num_problems", "num_interim_problems", "batch_size"):
            if getattr(self.evaluation, key) < 1:
                value = getattr(self.evaluation, key)
                raise ValueError(f"evaluation.{key} must be at least 1, got {value}")
        if self.logger.log_every < 1:
            raise ValueError(f"logger.log_every must be at least 1, got {self.logger.log_every}")


def register_configs() -> None:
    """Put the schema, the tasks' schemas and the resolvers where conf/ can name them."""
    store = ConfigStore.instance()
    store.store(name="run_config", node=RunConfig)
    for name, config in TASK_CONFIGS.items():
        store.store(group="task", name=f"{name}_schema", node=config)
    for resolver in (in_sweep, run_folder, job_folder, sweep_name, choices):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


def in_sweep(then: Any, otherwise: Any) -> Any:
    """`${in_sweep:a,b}` is a within a job of a sweep, else b."""
    in_job = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return then if in_job else otherwise


def run_folder(name: str) -> str:
    """`${run_folder:${name}}` is runs/<name>, or the folder of a sweep's job."""
    if not in_sweep(True, False):
        return f"runs/{name}"
    folder = Path(HydraConfig.get().runtime.output_dir)
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def sweep_name() -> str | None:
    """`${sweep_name:}` is what a sweep's folder is called; None outside of one."""
    return Path(HydraConfig.get().runtime.output_dir).parent.name if in_sweep(True, False) else None


def job_folder(overrides: str, number: int) -> str:
    """What a job's folder is called: its overrides, as far as they make a good name.

    A name that had to be changed or cut ends in a hash, so that two jobs never share a folder.
    """
    name = re.sub(r"[^\w.,=+-]", "_", overrides) or f"job{number}"
    if name == overrides and len(name) <= 120 or not overrides:
        return name
    return f"{name[:100]}-{hashlib.sha256(overrides.encode()).hexdigest()[:6]}"


def choices() -> str:
    """The options of every group of conf/ with the first line of each file's comment."""
    sources = HydraConfig.get().runtime.config_sources
    conf = next(source.path for source in sources if source.provider == "main")
    lines, group = [], ""
    for path in sorted(Path(conf).glob("*/*.yaml")):
        comments = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
        about = next((line for line in comments if "@package" not in line), "")
        shown = "" if path.parent.name == group else path.parent.name
        group = path.parent.name
        lines.append(shorten(f"  {shown:<11}{path.stem:<24}{about}"))
    return "\n".join(lines)


def shorten(line: str) -> str:
    """A line that fits a screen of 100 columns."""
    return line.rstrip() if len(line) <= 100 else line[:97].rstrip() + "..."


def job_overrides() -> dict[str, str] | None:
    """What sets this job apart from the others of its sweep, by key; None outside a sweep."""
    if not in_sweep(True, False):
        return None
    hydra = HydraConfig.get()
    fixed = hydra.job.config.override_dirname.exclude_keys
    pairs = (override.partition("=")[::2] for override in hydra.overrides.task)
    return {key: value for key, value in pairs if key not in fixed}


class SweepCallback(Callback):
    """Names a sweep's jobs by what differs between them, and ends the sweep with its table."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Leave out of the jobs' names what all of them share; one folder for all of them."""
        overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        swept = {o.key_or_group for o in overrides if o.is_sweep_override()}
        given = {o.key_or_group for o in overrides}
        if "name" in swept or "run_dir" in given:
            print(
                "error: a sweep writes to runs/<name>_sweep/<overrides>: name cannot be swept over "
                "and run_dir cannot be set; name=... or hydra.sweep.dir=... moves the sweep",
                file=sys.stderr,
            )
            sys.exit(2)
        fixed, launcher = ",".join(sorted(given - swept)), config.hydra.launcher
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.overrides.hydra.append(
                f"hydra.job.config.override_dirname.exclude_keys=[{fixed}]"
            )
            # An experiment may have a name of its own; its jobs belong here nonetheless.
            folder = config.hydra.sweep.dir
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{folder}'")
        logs = f"; output of the jobs: {folder}/.submitit/" if "submitit_folder" in launcher else ""
        print(f"sweep over {', '.join(sorted(swept)) or 'nothing'}: {folder}{logs}", flush=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table; exit with code 1 if a job failed."""
        from .sweep import report

        if report(Path(config.hydra.sweep.dir)):
            sys.exit(1)


def save_run_config(config: RunConfig, path: Path) -> None:
    """Write a run's config.yaml. `task_name` beside `task` says whose settings those are."""
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
        assert isinstance(content, DictConfig)
        name = content.pop("task_name", None)
        if name not in TASK_CONFIGS:
            raise ValueError(f"task_name must be one of {sorted(TASK_CONFIGS)}, got {name!r}")
        task = OmegaConf.create({"task": TASK_CONFIGS[name]})
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), task, content)
        assert isinstance(merged, DictConfig)
        return to_run_config(merged)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ValueError(f"{path} could not be read: {str(error).splitlines()[0]}") from None


def to_run_config(config: DictConfig) -> RunConfig:
    """The composed config as dataclasses, validated."""
    run = OmegaConf.to_object(config)
    assert isinstance(run, RunConfig)
    unknown = unknown_keys(run)
    if unknown:
        raise ValueError(f"unknown key {unknown[0]}; a leading + adds nothing that a run reads")
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
