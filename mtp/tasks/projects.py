"""Projects: problems in a fixed order, of which a later one may need what an earlier one showed.

A task with projects gives its problems `Example.project` and `Example.place`, and `project_size` of
them make a project. Batches, and the shares of processes, hold whole projects.
"""

from collections.abc import Sequence

from .base import Example

_SHARING = "problems that share a memory (decoding.segments.memory_scope=shared)"


def own_places(number: int, project_size: int, rank: int, world: int) -> list[int]:
    """Places among `number` examples that a process has: every `world`-th project."""
    return [place for place in range(number) if place // project_size % world == rank]


def projects_of(examples: Sequence[Example]) -> int:
    """Number of problems of each project in a list of whole projects, one after the other.

    Raises ValueError if some problem has no project or no predecessor there, or if a project is cut
    short: its problems would begin with a memory that is not theirs.
    """
    sizes: list[int] = []
    before: Example | None = None
    for example in examples:
        expected = None if before is None else (before.project, before.place + 1)
        follows = (example.project, example.place) == expected
        if not example.project or (example.place and not follows):
            raise ValueError(
                f"{_SHARING} must be whole projects in order, got place {example.place} of project "
                f"{example.project!r} after "
                + (f"place {before.place} of {before.project!r}" if before else "nothing")
            )
        if example.place:
            sizes[-1] += 1
        else:
            sizes.append(1)
        before = example
    if len(set(sizes)) > 1:
        raise ValueError(
            f"{_SHARING} must be whole projects of one size, got {min(sizes)} to {max(sizes)} "
            "problems; use a multiple of task.project_size"
        )
    return sizes[0] if sizes else 1
