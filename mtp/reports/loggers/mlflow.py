"""Records as a run of MLflow, by its client: the package mlflow-skinny is enough.

Without a server the store is the SQLite file `mlflow.db` of the working folder, MLflow's own
default, and `mlflow ui` of the whole package mlflow shows it. mlflow itself is imported when a run
starts.

Left out: models, and the details that the report is made of.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .base import LoggedRun, Sink, SinkConfig, scalars

MOST_PARAMETERS = 100
"""Parameters, and metrics too, that one call of the client takes."""
LONGEST_VALUE = 6000
"""Characters of a parameter's value."""


@dataclass(kw_only=True)
class MlflowConfig(SinkConfig):
    """A run of MLflow."""

    needs: ClassVar[str | None] = "mlflow"

    experiment: str = "mtp"
    """Experiment that the run belongs to; made if it is missing."""
    tracking_uri: str | None = None
    """Server or store, such as `http://localhost:5000`; None: MLFLOW_TRACKING_URI, else the file
    `mlflow.db` of the working folder."""
    group: str | None = None
    """Tag `group` of the run; the jobs of a sweep share theirs."""


class MlflowSink(Sink):
    """One run of MLflow, which a resumed run continues under the same id.

    The store removes no metrics. A resumed run leaves out the points that the store already has.
    """

    stores_report = True

    def __init__(self, config: MlflowConfig):
        self._config = config
        self._client: Any = None
        self._id = ""
        self._is_resumed = False
        self._stage: str | None = None
        self._known: dict[str, set[tuple[int, float]]] = {}

    def start(self, run: LoggedRun, state: dict[str, Any] | None) -> list[str]:
        """Make the run, or open the one of the checkpoint."""
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        lines = []
        self._is_resumed = False
        try:
            self._client = MlflowClient(self._config.tracking_uri)
            if state is not None:
                try:
                    self._client.update_run(state["id"], status="RUNNING")
                    self._id, self._is_resumed = state["id"], True
                except MlflowException as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                        raise
                    lines = [f"MLflow has no run {state['id']} any more: a new one continues it"]
            if not self._is_resumed:
                self._id = self._make_run(run)
        except (MlflowException, OSError) as error:
            uri = self._config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "null"
            raise ValueError(
                f"logger.sinks.mlflow.tracking_uri={uri} cannot be used: "
                f"{str(error).splitlines()[0]}; start the server, or give another store"
            ) from None
        return lines

    def _make_run(self, run: LoggedRun) -> str:
        """A new run with the settings as its parameters."""
        from mlflow.entities import Param

        experiment = self._client.get_experiment_by_name(self._config.experiment)
        place = (
            self._client.create_experiment(self._config.experiment)
            if experiment is None
            else experiment.experiment_id
        )
        tags = {} if self._config.group is None else {"group": self._config.group}
        made = self._client.create_run(place, run_name=run.folder.name, tags=tags)
        found = [Param(k, str(v)[:LONGEST_VALUE]) for k, v in leaves(run.settings)]
        for first in range(0, len(found), MOST_PARAMETERS):
            chosen = found[first : first + MOST_PARAMETERS]
            self._client.log_batch(made.info.run_id, params=chosen)
        return str(made.info.run_id)

    def metrics(self, record: dict[str, Any]) -> None:
        """All numbers of a record in one call; the tag `stage` is the current stage."""
        from mlflow.entities import Metric

        step, now = record["global_step"], int(1000 * time.time())
        if record["stage"] != self._stage:
            self._stage = record["stage"]
            self._client.set_tag(self._id, "stage", self._stage)
        points = [
            Metric(name, value, now, step)
            for name, value in scalars(record).items()
            if (step, value) not in self._points(name)
        ]
        for first in range(0, len(points), MOST_PARAMETERS):
            self._client.log_batch(self._id, metrics=points[first : first + MOST_PARAMETERS])

    def _points(self, name: str) -> set[tuple[int, float]]:
        """Points of a metric that the store had when the run was resumed."""
        if not self._is_resumed:
            return set()
        if name not in self._known:
            history = self._client.get_metric_history(self._id, name)
            self._known[name] = {(point.step, point.value) for point in history}
        return self._known[name]

    def table(self, name: str, rows: list[dict[str, Any]], global_step: int) -> None:
        """A JSON file per step, which a resumed run writes again."""
        if rows:
            self._client.log_dict(self._id, rows, f"{name}/step_{global_step:08d}.json")

    def artifact(self, path: Path) -> None:
        """A file; folders, which hold models, are not uploaded."""
        if path.is_file():
            self._client.log_artifact(self._id, str(path))

    def state(self) -> dict[str, Any]:
        """Id of the run."""
        return {"id": self._id}

    def finish(self, has_ended: bool) -> None:
        """Mark the run as finished, or as killed if it may be resumed."""
        if self._id:
            self._client.set_terminated(self._id, "FINISHED" if has_ended else "KILLED")


def leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted key."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
