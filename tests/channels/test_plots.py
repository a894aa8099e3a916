"""A number of tokens per pass looks the same in all panels, though tasks have different rows."""

from mtp.channels import plots


def test_a_block_size_has_one_colour_in_all_panels(monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "save", lambda figure, path: shown.append(figure))
    rows = {
        "a": ["token", "block_2"],
        "b": ["token", "block_1", "block_2"],
    }
    at = {"accuracy_at_passes": {"4": 0.5, "8": 1.0}}
    tasks = {task: [{"channel": name, **at} for name in names] for task, names in rows.items()}
    plots.plot_block_sizes(tasks, None)
    found = [
        {line.get_label(): line.get_color() for line in axes.get_lines()} for axes in shown[0].axes
    ]
    assert list(found[0]) == ["1 per pass", "3 per pass"]
    assert list(found[1]) == ["1 per pass", "2 per pass", "3 per pass"]
    assert found[0].items() <= found[1].items() and len(set(found[1].values())) == 3
    assert all(axes.get_legend() is not None for axes in shown[0].axes)


def test_panels_are_three_in_a_line_and_sums_come_first(monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "save", lambda figure, path: shown.append(figure))
    row = {"channel": "token", "accuracy_at_passes": {"4": 0.5, "8": 1.0}}
    plots.plot_block_sizes({task: [row] for task in ("a", "running_sum_5", "c", "b")}, None)
    labels = [axes.get_xlabel() for axes in shown[0].axes]
    assert [label.split(", ")[1].split()[0] for label in labels] == ["running_sum_5", "a", "b", "c"]
    tops = [round(axes.get_position().y1, 3) for axes in shown[0].axes]
    assert tops[0] == tops[1] == tops[2] > tops[3]
