"""Records as a run of Weights & Biases. wandb itself is imported when a run starts."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .base import LoggedRun, Sink, SinkConfig

MODES = ("offline", "online")


@dataclass(kw_only=True)
class WandbConfig(SinkConfig):
    """A wandb run."""

    project: str = "mtp"
    """Project of the wandb run."""
    entity: str | None = None
    """Owner of the project; None: the user's default."""
    mode: str = "offline"
    """offline (files below the run's `wandb/`, for `wandb sync`) or online."""
    group: str | None = None
    """Group of the wandb run; the jobs of a sweep share theirs."""
    tags: list[str] = field(default_factory=list)
    """Tags of the wandb run."""

    def validate(self, key: str) -> None:
        """Raises ValueError for an unknown mode."""
        if self.mode not in MODES:
            raise ValueError(f"{key}.mode must be one of {list(MODES)}, got {self.mode!r}")


class WandbSink(Sink):
    """One wandb run, which a resumed run continues under the same id."""

    writes = ("wandb",)

    def __init__(self, config: WandbConfig):
        self._config = config
        self._run: Any = None

    def start(self, run: LoggedRun, state: dict[str, Any] | None) -> list[str]:
        """Open the wandb run."""
        import wandb

        settings = self._config
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,  # type: ignore[arg-type]
            group=settings.group,
            tags=settings.tags,
            dir=str(run.folder),
            id=state["id"] if state else None,
            resume="allow" if state else None,
            config=run.settings,
            name=run.folder.name,
        )
        self._run.define_metric("global_step")
        self._run.define_metric("*", step_metric="global_step")
        return []

    def metrics(self, record: dict[str, Any]) -> None:
        """Numbers that are not None."""
        self._run.log({name: value for name, value in record.items() if value is not None})

    def table(self, name: str, rows: list[dict[str, Any]], global_step: int) -> None:
        """A wandb table; a cell that is a list becomes JSON."""
        if not rows:
            return
        import wandb

        data = [[json.dumps(v) if isinstance(v, list) else v for v in r.values()] for r in rows]
        table = wandb.Table(columns=list(rows[0]), data=data)
        self._run.log({name: table, "global_step": global_step})

    def artifact(self, path: Path) -> None:
        """A picture; models are not uploaded."""
        if path.suffix == ".png":
            import wandb

            self._run.log({path.stem: wandb.Image(str(path))})

    def state(self) -> dict[str, Any]:
        """Id of the wandb run."""
        return {"id": self._run.id}

    def finish(self) -> None:
        """End the wandb run, so that a next run in this process gets its own."""
        if self._run is not None:
            self._run.finish()
