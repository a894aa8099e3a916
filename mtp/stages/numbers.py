"""Updates whose numbers are watched: what is not finite stops the run or is left out."""

from collections.abc import Callable
from pathlib import Path

from ..common.files import save_atomically
from ..hub.checkpoint import write_state
from ..run import Run, StageRun
from ..training.batch import TextBatch
from ..training.numbers import as_tree, sampler_warning
from ..training.runtime import NotFinite, over_processes, weight_that_is_not_finite

FOLDER = "not_finite"
"""Folder of a run for batches whose numbers were not finite."""


class Watch:
    """The updates of one stage."""

    def __init__(self, run: Run, stage: StageRun):
        self.run, self.stage = run, stage
        self._step, self._num_updates = -1, 0

    def update(
        self, batches: list[TextBatch], take: Callable[[list[TextBatch]], dict[str, float]]
    ) -> dict[str, float]:
        """`take(batches)`, an optimizer step, and its metrics; `skipped` is 1 if it was left out.

        Raises NotFinite, with the file of the batch, where the run has to stop.
        """
        config, run, progress = self.run.config.numbers, self.run, self.run.progress
        is_next = progress.step == self._step
        self._step, self._num_updates = progress.step, self._num_updates + 1 if is_next else 1
        try:
            metrics = take(batches)
        except NotFinite as error:
            path = self.save(batches, str(error))
            progress.num_skipped += 1
            is_lost = weights_are_lost(run)
            too_many = progress.num_skipped >= config.max_skipped
            if config.not_finite == "stop" or is_lost or too_many:
                raise NotFinite(str(error), path) from error
            run.console.print(
                f"[yellow]warning: stage {self.stage.name}, step {run.progress.step + 1}: {error}; "
                f"the optimizer step is left out, its batch is in {path}"
            )
            return {"skipped": 1.0}
        progress.num_skipped = 0
        return metrics | ({"skipped": 0.0} if config.not_finite == "skip" else {})

    def save(self, batches: list[TextBatch], cause: str) -> Path:
        """Write this process's batches; `hub.checkpoint.read_state` reads them."""
        run, step = self.run, self.run.progress.step + 1
        name = f"{self.stage.name}_step_{step:06d}"
        if self._num_updates > 1:
            name += f"_update_{self._num_updates}"
        name += f"_process_{run.fabric.global_rank}"
        path = run.folder / FOLDER / f"{name}.safetensors"
        state = {
            "stage": self.stage.name,
            "step": step,
            "cause": cause,
            "batches": as_tree(batches),
        }
        save_atomically(path, lambda file: write_state(file, state))
        return path

    def compare(self, metrics: dict[str, float]) -> None:
        """Warn once in a run if the first update on new rollouts finds other probabilities."""
        run, config = self.run, self.stage.config
        if config.kind != "rl" or run.has_warned or metrics.get("skipped"):
            return
        if config.rollouts.lag:  # other weights sampled, so the two differ
            return
        emitters = ["main", "head"] if config.rollouts.mode == "fast" else ["main"]
        limit, precision = run.config.numbers.sampler_difference, run.config.fabric.precision
        found = sampler_warning(metrics, emitters, limit, run.model, precision)
        if found is not None:
            run.has_warned = True
            run.console.print(f"[yellow]warning: {found}")


def weights_are_lost(run: Run) -> bool:
    """True if a weight is not finite on any process."""
    mine = {"lost": float(weight_that_is_not_finite(run.model) is not None)}
    return bool(over_processes(run.fabric, mine, "max")["lost"])


def check_weights(run: Run) -> None:
    """Raise NotFinite if a weight is not finite, so that no checkpoint holds it."""
    if weights_are_lost(run):
        raise NotFinite("a weight is not finite; no checkpoint is written")
