"""Plots: every axis has a label with its unit, and costs are on a logarithmic one."""

import pytest
from matplotlib.figure import Figure

from mtp.reports import comparison, curves
from mtp.reports.style import COLOURS, log_axis, looks, panels, share_axis


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The plots, in place of the files that reports would write."""
    found: list[Figure] = []
    for module in (curves, comparison):
        monkeypatch.setattr(module, "save", lambda figure, path: found.append(figure))
    return found


def labels(figure: Figure) -> list[tuple[str, str]]:
    return [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]


def test_curves_have_units_and_passes_grow_by_factors(figures, tmp_path):
    point = {"stage": "rl", "global_step": 10, "true_steps": 0.5}
    modes = {"slow_accuracy": 0.9, "slow_passes": 24.0, "fast_accuracy": 0.8, "fast_passes": 8.0}
    curves.save_curves([point | modes], tmp_path / "curves.png")
    (figure,) = figures
    assert labels(figure) == [
        ("passes per problem (log scale)", "held-out accuracy (%)"),
        ("optimizer steps, all stages", "held-out accuracy (%)"),
        ("optimizer steps, all stages", "true steps in thoughts (%)"),
    ]
    assert figure.axes[0].get_xscale() == "log"
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "rl, slow",
        "rl, fast",
    ]


def test_curves_of_a_comparator_have_its_one_mode(figures, tmp_path):
    points = [
        {"stage": "main", "global_step": n, "accuracy": n / 10, "passes": 5.0} for n in (1, 2)
    ]
    curves.save_curves(points, tmp_path / "curves.png")
    cost, training, _ = figures[0].axes
    assert [line.get_xydata().tolist() for line in cost.lines] == [[[5, 0.1], [5, 0.2]]]
    assert [line.get_xydata().tolist() for line in training.lines] == [[[1, 0.1], [2, 0.2]]]
    assert [text.get_text() for text in cost.get_legend().get_texts()] == ["main"]


def test_a_run_without_evaluations_has_empty_curves(figures, tmp_path):
    curves.save_curves([], tmp_path / "curves.png")
    assert figures[0].axes[0].get_legend() is None


def test_the_frontier_has_nats_by_factors_and_shares_in_per_cent(figures, tmp_path):
    metrics = {"fast_accuracy": 0.9, "true_steps": 0.8, "reference_nats_per_token": 0.01}
    runs = [
        comparison.VariantRun(name, 1, metrics, [(1, 0.5), (2, 0.9)], tmp_path)
        for name in ("open", "closed")
    ]
    summary = comparison.aggregate(runs)
    comparison.save_frontier(runs, summary, tmp_path / "frontier.png")
    comparison.save_plot(runs, summary, tmp_path / "variants.png")
    frontier, variants = figures
    share, nats = frontier.axes
    assert share.get_xlabel() == "true steps, fast mode (%)"
    assert nats.get_xlabel() == "reference nats per token, fast mode (nats, log scale)"
    assert (share.get_xscale(), nats.get_xscale()) == ("linear", "log")
    assert all("(%)" in axes.get_ylabel() for axes in frontier.axes)
    assert variants.axes[0].get_xlabel() == "optimizer steps of RL"
    assert variants.axes[1].get_xlabel() == "mean over seeds and its 95 % interval (%)"


def test_an_axis_with_a_zero_is_linear_and_does_not_say_otherwise():
    _, [[axes]] = panels(1, 1)
    axes.plot([0, 1], [1, 10])
    log_axis(axes, "cost", "ms", "x")
    log_axis(axes, "memory", "MiB")
    assert (axes.get_xscale(), axes.get_xlabel()) == ("linear", "cost (ms)")
    assert (axes.get_yscale(), axes.get_ylabel()) == ("log", "memory (MiB, log scale)")


def test_shares_are_shown_in_per_cent():
    _, [[axes]] = panels(1, 1)
    share_axis(axes, "accuracy")
    assert axes.yaxis.get_major_formatter()(0.25) == "25"


def test_series_beyond_the_colours_differ_in_lines_and_markers():
    turns = [looks(turn * len(COLOURS)) for turn in range(4)]
    assert len({look["color"] for look in turns}) == 1
    for differs in ("linestyle", "fillstyle"):
        assert len({look[differs] for look in turns}) == len(turns)
