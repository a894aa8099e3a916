"""Metrics of a trained model: each is declared once, with its title, unit and better direction.

Tables, sweeps, comparisons and model cards show a declared metric if a summary has it. To add one,
return it from an evaluation under a new name and declare it:

    declare(Metric("mean_digits", "digits", unit="digits", better="lower"))

Left out: metrics of a training step (loss, reward), which only the log and the progress bar show.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Table = Literal["run", "sweep", "comparison", "interval", "frontier", "search"]
"""Table or plot that shows a metric: the table that ends a run and its model card; the table of a
sweep; the table of a comparison, there with the interval over seeds; the plot of accuracy against
legibility; the table of `mtp evaluate --search`."""

Value = float | list[float] | None


@dataclass(frozen=True)
class Metric:
    """Name and presentation of one number, or a list of numbers, from an evaluation."""

    name: str
    """Key in `summary.json`; `eval/<name>` in `metrics.jsonl`."""
    title: str
    """Short name in tables; the head of a column breaks it at its spaces."""
    unit: str = ""
    """Unit of the value, such as `passes` or `nats`. `%`: a share, shown in per cent."""
    better: Literal["higher", "lower"] | None = None
    """Direction that is better; None if neither is."""
    digits: int = 1
    """Digits shown after the decimal point."""
    meaning: str = ""
    """Explanation in model cards: a noun phrase."""
    shown_in: tuple[Table, ...] = ("run", "sweep", "comparison")
    """Tables that show the metric."""

    @property
    def head(self) -> str:
        """Title with an arrow to the better direction."""
        return self.title + {"higher": " ↑", "lower": " ↓", None: ""}[self.better]

    @property
    def narrow_head(self) -> str:
        """Head of a column, one word per line."""
        return self.title.replace(" ", "\n").replace("/", "/\n") + self.head[len(self.title) :]

    @property
    def label(self) -> str:
        """Name in words, for plots."""
        return self.name.replace("_", " ")

    def cell(self, value: Value, half_width: float | None = None) -> str:
        """A value as tables show it, with half the width of its interval if it has one."""
        if value is None:
            return "-"
        if isinstance(value, list):
            return " ".join(self._number(one) for one in value)
        interval = "" if half_width is None else f" ± {self._number(half_width)}"
        return self._number(value) + interval + (" %" if self.unit == "%" else "")

    def _number(self, value: float) -> str:
        return f"{100 * value if self.unit == '%' else value:.{self.digits}f}"


METRICS: dict[str, Metric] = {}
"""Declared metrics by name, in the order of the tables."""


def declare(metric: Metric) -> Metric:
    """Add a metric to all tables. Raises ValueError if another has its name."""
    if METRICS.setdefault(metric.name, metric) != metric:
        raise ValueError(
            f"metric {metric.name} must be declared once, got {metric} after "
            f"{METRICS[metric.name]}; choose another name"
        )
    return metric


def metrics_of(table: Table) -> list[Metric]:
    """Metrics that a table shows."""
    return [metric for metric in METRICS.values() if table in metric.shown_in]


def measured(table: Table, summaries: Iterable[Mapping[str, Any]]) -> list[Metric]:
    """Metrics of a table for which some summary has a value."""
    found = {name for summary in summaries for name, value in summary.items() if value is not None}
    return [metric for metric in metrics_of(table) if metric.name in found]


SHARE: Any = {"unit": "%", "better": "higher"}
PASSES: Any = {"unit": "passes", "better": "lower"}
IN_RUNS: tuple[Table, ...] = ("run",)
IN_SEARCHES: tuple[Table, ...] = ("search",)

for _metric in (
    Metric(
        "slow_accuracy",
        "slow acc.",
        **SHARE,
        meaning="accuracy when only main's token of each pass is kept",
        shown_in=("run", "sweep", "comparison", "interval"),
    ),
    Metric(
        "fast_accuracy",
        "fast acc.",
        **SHARE,
        meaning="accuracy when the head's tokens are kept in the fast phases",
        shown_in=("run", "sweep", "comparison", "interval"),
    ),
    Metric("slow_passes", "slow passes", **PASSES, shown_in=("run", "sweep")),
    Metric("fast_passes", "fast passes", **PASSES),
    Metric("fast_tokens_per_pass", "tokens/pass", "tokens/pass", better="higher", shown_in=IN_RUNS),
    Metric("verified_passes", "verified passes", **PASSES, shown_in=IN_RUNS),
    Metric(
        "verified_tokens_per_pass",
        "verified tokens/pass",
        "tokens/pass",
        better="higher",
        digits=2,
        shown_in=IN_RUNS,
    ),
    Metric(
        "acceptance_by_slot",
        "accepted by slot",
        better="higher",
        digits=2,
        meaning="share of the passes of verified mode in which main accepted the head's draft of "
        "each slot",
        shown_in=IN_RUNS,
    ),
    Metric(
        "empty_thought_accuracy",
        "empty thought",
        unit="%",
        meaning="accuracy after an empty thought",
        shown_in=("run", "comparison"),
    ),
    Metric(
        "wrong_thought_accuracy",
        "wrong thought",
        unit="%",
        meaning="accuracy after another problem's thought",
        shown_in=("run", "comparison"),
    ),
    Metric(
        "true_steps",
        "true steps",
        **SHARE,
        meaning="share of the steps in the thoughts that are true",
        shown_in=("run", "sweep", "comparison", "interval", "frontier"),
    ),
    Metric(
        "reference_nats_per_token",
        "ref. nats/token",
        "nats",
        better="lower",
        digits=3,
        meaning="mean negative log-likelihood of the thoughts' tokens under a frozen reference, by "
        "default main after the first stage",
        shown_in=("run", "comparison", "frontier"),
    ),
    Metric(
        "unigram_drift",
        "drift",
        "bits",
        better="lower",
        digits=3,
        meaning="Jensen-Shannon divergence of the thoughts' token frequencies from the solver's",
        shown_in=(),
    ),
    Metric("seconds", "seconds", "seconds", shown_in=("run", "sweep")),
    Metric("chosen_accuracy", "chosen text right", **SHARE, shown_in=IN_SEARCHES),
    Metric("any_right_accuracy", "any text right", **SHARE, shown_in=IN_SEARCHES),
    Metric("mean_accuracy", "mean over texts", **SHARE, shown_in=IN_SEARCHES),
    Metric("search_texts", "texts", "texts", shown_in=IN_SEARCHES),
    Metric("search_passes", "passes", **PASSES, shown_in=IN_SEARCHES),
    Metric("search_tokens_read", "tokens read", "tokens", better="lower", shown_in=IN_SEARCHES),
):
    declare(_metric)
