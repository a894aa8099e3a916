"""Metrics of a trained model: each is declared once, with its title, unit and better direction.

Tables, sweeps, comparisons and model cards show a declared metric if a summary has it. To add one,
return it from an evaluation under a new name and declare it:

    declare(Metric("mean_digits", "digits", unit="digits", better="lower"))

Left out: metrics of a training step (loss, reward), which only the log and the progress bar show.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Table = Literal[
    "run", "sweep", "comparison", "interval", "frontier", "search", "channel", "gradient", "thought"
]
"""Table or plot that shows a metric: the table that ends a run and its model card; the table of a
sweep; the table of a comparison, there with the interval over seeds; the plot of accuracy against
legibility; the table of `mtp evaluate --search`; the last three: those of `--measure`."""

Value = float | list[float] | None
COUNTED = ("%", "passes", "tokens", "texts", "seconds", "nats", "bits", "tokens/pass")
"""Units whose values are never below 0."""


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

    @property
    def bounds(self) -> tuple[float, float]:
        """Values that the metric can have: 0 to 1 for a share, at least 0 for what is counted."""
        return 0.0 if self.unit in COUNTED else -math.inf, 1.0 if self.unit == "%" else math.inf

    def cell(self, value: Value, ends: tuple[float, float] | None = None) -> str:
        """A value as tables show it, with the ends of its interval where it has one.

        `95.0 ± 1.2 %`, or `99.5 (98.1–100.0) %` where the value is not in the middle.
        """
        if value is None:
            return "-"
        if isinstance(value, list):
            return " ".join(self._number(one) for one in value)
        interval = ""
        if ends is not None:
            below, above = (self._number(abs(end - value)) for end in ends)
            interval = f" ± {above}"
            if below != above:
                interval = f" ({self._number(ends[0])}–{self._number(ends[1])})"
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


def by_test_set(stages: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Summaries of stages by held-out set: "" for `test`, then the task's further sets.

    An entry of a further set has its stage's name and that set's metrics.
    """
    found: dict[str, list[dict[str, Any]]] = {"": []}
    for stage in stages:
        found[""].append(dict(stage))
        for name, metrics in stage.get("test_sets", {}).items():
            found.setdefault(name, []).append({"name": stage["name"], **metrics})
    return found


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
    Metric("fast_thought_passes", "thought passes", **PASSES, shown_in=("run", "comparison")),
    Metric(
        "accuracy_by_budget",
        "by budget",
        **SHARE,
        meaning="fast accuracy where thoughts of more passes than each of "
        "`evaluation.thought_budgets` count as wrong",
        shown_in=("run", "comparison"),
    ),
    Metric(
        "slow_accuracy_by_place",
        "slow by place",
        **SHARE,
        meaning="slow accuracy of the first problem of a project, the second, and further ones",
        shown_in=("run", "comparison"),
    ),
    Metric(
        "fast_accuracy_by_place",
        "fast by place",
        **SHARE,
        meaning="fast accuracy of the first problem of a project, the second, and further ones",
        shown_in=("run", "comparison"),
    ),
    Metric("fast_tokens_per_pass", "tokens/pass", "tokens/pass", better="higher", shown_in=IN_RUNS),
    Metric(
        "thought_tokens_per_pass",
        "thought tokens/pass",
        "tokens/pass",
        better="higher",
        meaning="tokens per forward pass of fast mode within the thought",
        shown_in=IN_RUNS,
    ),
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
        "steps_per_thought",
        "steps checked",
        "steps",
        digits=2,
        meaning="number of steps per thought that could be checked",
        shown_in=IN_RUNS,
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
    # A comparator has one mode.
    Metric("accuracy", "accuracy", **SHARE, shown_in=("run", "sweep")),
    Metric(
        "accuracy_by_place",
        "by place",
        **SHARE,
        meaning="accuracy of the first problem of a project, the second, and further ones",
        shown_in=("run", "comparison"),
    ),
    Metric("passes", "passes", **PASSES, shown_in=("run", "sweep")),
    Metric("thought_passes", "thought passes", **PASSES, shown_in=IN_RUNS),
):
    declare(_metric)

BITS: Any = {"unit": "bits", "digits": 2, "shown_in": ("channel",)}
GRADIENT: Any = {"digits": 3, "shown_in": ("gradient",)}
THOUGHT: Any = {"unit": "%", "shown_in": ("thought",)}
DIFFERENCE: Any = {"digits": 3, "shown_in": ("thought",)}

for _metric in (
    Metric(
        "channel_least_bits",
        "channel, at least",
        **BITS,
        meaning="lower bound of the mutual information of message and block, given main's token",
    ),
    Metric(
        "channel_limit_bits", "limit of that bound", **BITS, meaning="most that the bound can be"
    ),
    Metric(
        "channel_same_bits",
        "channel, message of the same class",
        **BITS,
        meaning="log-probability of a block that is lost with the message of another problem's "
        "pass that begins with the same token; an upper bound of the mutual information",
    ),
    Metric(
        "channel_other_bits",
        "channel, any other message",
        **BITS,
        meaning="log-probability of a block that is lost with any message of another problem",
    ),
    Metric(
        "channel_zero_bits",
        "channel, message of zeros",
        **BITS,
        meaning="log-probability of a block that is lost with a message of zeros",
    ),
    Metric(
        "channel_coverage",
        "passes with others of their class",
        unit="%",
        shown_in=("channel",),
        meaning="share of the passes for which another problem has a pass with the same first "
        "token",
    ),
    Metric(
        "block_entropy_bits",
        "entropy of a block",
        **BITS,
        meaning="sum of the writers' entropies along a block: the most that a pass passes on",
    ),
    Metric(
        "token_entropy_bits",
        "entropy of main's token",
        **BITS,
        meaning="entropy of the one token that a pass of slow mode passes on",
    ),
    Metric(
        "gradient_norm_own",
        "norm, own tokens",
        **GRADIENT,
        meaning="length of main's policy gradient from the tokens that main sampled",
    ),
    Metric(
        "gradient_norm_channel",
        "norm, head's tokens",
        **GRADIENT,
        meaning="length of main's policy gradient from the head's tokens, through the channel",
    ),
    Metric("gradient_cosine", "cosine of the two", **GRADIENT, meaning="mean over batches"),
    Metric(
        "gradient_pooled_cosine",
        "cosine, all batches as one",
        **GRADIENT,
        meaning="cosine of the sums over all batches, which hold less noise",
    ),
    Metric(
        "thought_accuracy",
        "right, with the thought",
        **THOUGHT,
        meaning="accuracy of slow answers after the model's own thought",
    ),
    Metric(
        "no_thought_accuracy",
        "right, without",
        **THOUGHT,
        meaning="accuracy of slow answers after an empty thought",
    ),
    Metric(
        "early_answering_area",
        "area over early answering",
        **THOUGHT,
        meaning="share of answers that change if the thought is cut short, a mean over its length",
    ),
    Metric(
        "filler_area",
        "area over filler",
        **THOUGHT,
        meaning="the same if the rest of the thought is replaced by one repeated token",
    ),
    Metric(
        "mistake_changed",
        "changed by a mistake",
        **THOUGHT,
        meaning="share of answers that change after one digit of the thought is changed",
    ),
    Metric(
        "mistake_followed",
        "follows the mistake",
        **THOUGHT,
        meaning="share of answers that are what the changed digit leads to",
    ),
    Metric(
        "unchanged_changed",
        "changed without a mistake",
        **THOUGHT,
        meaning="share of answers that change if the thought is cut there and continued",
    ),
    Metric(
        "paraphrase_gap",
        "paraphrase gap",
        **DIFFERENCE,
        meaning="accuracy after the thought minus that after its paraphrase, a mean over cuts",
    ),
    Metric(
        "retokenised_gap",
        "gap of other tokens",
        **DIFFERENCE,
        meaning="the same for the thought in the tokenizer's own tokens",
    ),
    Metric(
        "policy_gain",
        "gain from the thought",
        **DIFFERENCE,
        meaning="accuracy after the thought minus that after an empty one",
    ),
    Metric(
        "reader_gain",
        "gain of the frozen reader",
        **DIFFERENCE,
        meaning="the same for a frozen model that reads the thought",
    ),
    Metric(
        "steganographic_gap",
        "steganographic gap",
        **DIFFERENCE,
        meaning="gain of the model minus that of the frozen reader",
    ),
):
    declare(_metric)
