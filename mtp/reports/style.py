"""One style for the PNGs of reports, docs and benchmarks: colours, markers, axes with units.

The colours are those of Okabe and Ito, which people with any colour vision can distinguish, in the
order of the report page (`page/charts.js`). Quantities that grow by factors, such as passes,
seconds or nats, have a logarithmic axis, whose label says so. Shares are in per cent from 0 to 100.

matplotlib is imported when a plot is made.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8A8A8A")
MODES = {"slow": ("--", "s"), "fast": ("-", "o"), "verified": (":", "D")}
"""Line style and marker of each decoding mode."""
STEPS = "optimizer steps, all stages"
"""Label of an axis over the training of a run."""
PANEL = (5.0, 4.2)
"""Width and height of one panel in inches."""
_STYLE: dict[str, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "grid.alpha": 0.3,
}


def looks(index: int) -> dict[str, Any]:
    """Arguments of a series' `plot`: a round of colours, then the next line style and filling."""
    turn = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": ("-", "--", ":", "-.")[turn % 4],
        "fillstyle": ("full", "none", "left", "bottom")[turn % 4],
        "markersize": 4,
    }


def panels(rows: int, columns: int) -> "tuple[Figure, list[list[Any]]]":
    """A figure and its panels, by row and column."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows))
        return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def share_axis(axes: Any, label: str, which: Literal["x", "y"] = "y") -> None:
    """An axis of values from 0 to 1, shown in per cent."""
    from matplotlib.ticker import PercentFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}lim": (-0.03, 1.03), f"{which}label": f"{label} (%)"})
    axis.set_major_formatter(PercentFormatter(xmax=1, symbol=""))


def log_axis(axes: Any, label: str, unit: str, which: Literal["x", "y"] = "y") -> None:
    """A logarithmic axis with plain numbers; linear if it has a value that is not above 0.

    Call it after the values are plotted.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    values = [v for line in axes.lines for v in line.get_data()[0 if which == "x" else 1]]
    is_log = bool(values) and min(values) > 0
    name = ", ".join(filter(None, [unit, "log scale" if is_log else ""]))
    axes.set(**{f"{which}label": f"{label} ({name})" if name else label})
    if not is_log:
        return
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    ratio = max(values) / min(values)
    subs = (1, 1.5, 2, 3, 5, 7) if ratio < 10 else (1, 2, 5) if ratio < 100 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend(axes: Any) -> None:
    """The legend of a panel, if it has a series with a label."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, framealpha=0.8)


def save(figure: "Figure", path: Path) -> None:
    """Write the PNG and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format="png")
