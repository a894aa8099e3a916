"""Records as a run of Weights & Biases. wandb itself is imported when a run starts."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .base import LoggedRun, Sink, SinkConfig, scalars

MODES = ("auto", "offline", "online")


@dataclass(kw_only=True)
class WandbConfig(SinkConfig):
    """A wandb run."""

    project: str = "mtp"
    """Project of the wandb run."""
    entity: str | None = None
    """Owner of the project; None: the user's default."""
    mode: str = "auto"
    """offline (files below the run's `wandb/`, for `wandb sync`), online, or auto: WANDB_MODE, else
    online if there is an API key, else offline."""
    group: str | None = None
    """Group of the wandb run; the jobs of a sweep share theirs."""
    tags: list[str] = field(default_factory=list)
    """Tags of the wandb run."""

    def validate(self, key: str) -> None:
        """Raises ValueError for an unknown mode."""
        if self.mode not in MODES:
            raise ValueError(f"{key}.mode must be one of {list(MODES)}, got {self.mode!r}")


class WandbSink(Sink):
    """One wandb run, which a resumed run continues under the same id.

    wandb removes no records: after a run was killed, the records since its last checkpoint are
    there twice, at the same `global_step` and with the same values.
    """

    writes = ("wandb",)
    stores_report = True

    def __init__(self, config: WandbConfig):
        self._config = config
        self._run: Any = None
        self._tables: dict[str, Any] = {}

    def start(self, run: LoggedRun, state: dict[str, Any] | None) -> list[str]:
        """Open the wandb run. `global_step` is the axis of all metrics."""
        import wandb

        settings, lines = self._config, []
        mode: Any = settings.mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE")
            if mode is None:
                mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
                if mode == "offline":
                    lines = ["no API key of wandb was found, so it logs offline"]
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                mode=mode,
                group=settings.group,
                tags=settings.tags,
                dir=str(run.folder),
                id=state["id"] if state else None,
                resume="allow" if state else None,
                config=run.settings,
                name=run.folder.name,
            )
        except wandb.errors.Error as error:
            why = str(error).splitlines()[0]
            raise ValueError(
                f"logger.sinks.wandb.mode={settings.mode} cannot be used: {why}; run `wandb "
                "login`, or use mode=offline"
            ) from None
        self._tables = {}
        self._run.define_metric("global_step")
        self._run.define_metric("*", step_metric="global_step")
        return lines

    def metrics(self, record: dict[str, Any]) -> None:
        """Numbers by name, with the stage."""
        at = {name: record[name] for name in ("stage", "step", "global_step")}
        self._run.log(at | scalars(record))

    def table(self, name: str, rows: list[dict[str, Any]], global_step: int) -> None:
        """Rows at the end of an incremental table; a cell that is a list becomes JSON."""
        if not rows:
            return
        import wandb

        if name not in self._tables:
            columns: list[str | int] = ["global_step", *rows[0]]
            self._tables[name] = wandb.Table(columns=columns, log_mode="INCREMENTAL")
        for row in rows:
            cells = [json.dumps(v) if isinstance(v, list) else v for v in row.values()]
            self._tables[name].add_data(global_step, *cells)
        self._run.log({name: self._tables[name], "global_step": global_step})

    def artifact(self, path: Path) -> None:
        """A picture, or the report page as an artifact; models are not uploaded."""
        import wandb

        if path.suffix == ".png":
            self._run.log({path.stem: wandb.Image(str(path))})
        elif path.suffix == ".html":
            page = wandb.Artifact(f"{path.stem}-{self._run.id}", type=path.stem)
            page.add_file(str(path))
            self._run.log_artifact(page)

    def state(self) -> dict[str, Any]:
        """Id of the wandb run."""
        return {"id": self._run.id}

    def finish(self, has_ended: bool) -> None:
        """End the wandb run, so that a next run in this process gets its own."""
        if self._run is not None:
            self._run.finish(exit_code=0 if has_ended else 1)
