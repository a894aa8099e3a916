"""Distribution of the problems of an evaluation over the processes of a run."""

from collections.abc import Callable
from typing import TypeVar

from lightning.fabric import Fabric

from ..rollouts.rollout import Rollouts
from ..training.runtime import all_of

T = TypeVar("T")


class Spread:
    """Consecutive problems on each process, and their results on all.

    Example, 5 problems on 2 processes: 0 1 2 and 3 4. The second decodes problem 4 twice and drops
    the copy, so that all processes decode equally many batches of equally many rows. Problems that
    share a memory are kept together: projects are divided so.
    """

    def __init__(
        self,
        fabric: Fabric | None = None,
        any_continues: Callable[[bool], bool] | None = None,
    ):
        """None: all problems on this process. any_continues: as in `DecodeOptions`."""
        self.fabric, self.any_continues = fabric, any_continues

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return 1 if self.fabric is None else self.fabric.world_size

    @property
    def rank(self) -> int:
        """Number of this process."""
        return 0 if self.fabric is None else self.fabric.global_rank

    def places(self, number: int, project_size: int = 1) -> tuple[list[int], int]:
        """Problems that this process decodes, and how many of them are no copies.

        project_size: number of problems that follow each other, a divisor of `number`.
        """
        projects = number // project_size
        share = -(-projects // self.world_size)
        begin = min(self.rank * share, projects)
        own = min(share, projects - begin)
        mine = [min(begin + i, projects - 1) for i in range(share)]
        places = [project * project_size + i for project in mine for i in range(project_size)]
        return places, own * project_size

    def all_of(self, mine: list[T]) -> list[T]:
        """The items of all processes, in the order of the processes."""
        if self.fabric is None:
            return mine
        return [item for part in all_of(self.fabric, mine) for item in part]

    def joined(self, batches: list[Rollouts], own: int) -> list[Rollouts]:
        """The batches of all processes; `own` examples of this one's are no copies."""
        kept = []
        for batch in batches:
            number = min(len(batch.examples), own)
            own -= number
            if number:
                kept.append(batch.of_examples(range(number)))
        return self.all_of(kept)


ALONE = Spread()
"""All problems on this process."""
