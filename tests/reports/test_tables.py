"""Tables on a terminal of 100 columns."""

import io

from rich.console import Console

from mtp.reports.metrics import metrics_of
from mtp.reports.tables import print_table


def test_the_table_that_ends_a_run_fits_100_columns_and_cuts_no_head():
    """Four stages with each metric there is, of a head with five slots."""
    values: dict = {metric.name: 0.123456 for metric in metrics_of("run")}
    values |= {"acceptance_by_slot": [0.91, 0.82, 0.73, 0.61, 0.52], "num_problems": 512}
    stages = [{"name": name, **values} for name in ("main", "head", "joint", "rl")]
    console = Console(width=100, file=io.StringIO(), record=True)
    print_table(console, {"stages": stages, "seed": 1, "seconds": 9.0, "export": "out"})
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text
    for word in {word for metric in metrics_of("run") for word in metric.head.split()}:
        assert word in text
