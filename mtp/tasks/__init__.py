"""Tasks by name. A new task is a file here with a config and a `Task`, and a line below."""

from .base import Example, Split, Task, TaskConfig
from .continuation import ContinuationConfig
from .graph_search import GraphSearchConfig
from .gsm_symbolic import GsmSymbolicConfig
from .pointer_chasing import PointerChasingConfig
from .reasoning_gym import ReasoningGymConfig
from .rows import RowsConfig
from .running_sum import RunningSumConfig

TASK_CONFIGS: dict[str, type[TaskConfig]] = {
    "running_sum": RunningSumConfig,
    "graph_search": GraphSearchConfig,
    "pointer_chasing": PointerChasingConfig,
    "reasoning_gym": ReasoningGymConfig,
    "gsm_symbolic": GsmSymbolicConfig,
    "rows": RowsConfig,
    "continuation": ContinuationConfig,
}

__all__ = ["TASK_CONFIGS", "Example", "Split", "Task", "TaskConfig"]
