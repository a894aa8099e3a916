"""The HTML file: style, scripts, Plotly and data in one, with a policy that runs nothing else.

Text that a model wrote is data: it is JSON in script elements that no browser runs, and the page's
scripts put it on the screen as text. The content security policy lists the hashes of the page's own
scripts, so a script in a model's text would not run even if it became part of the page.
"""

import base64
import hashlib
import json
import math
import re
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from ...common.files import save_text
from .content import page_data
from .runs import find_runs, read_runs

SCRIPTS = ("elements.js", "tables.js", "tokens.js", "thoughts.js", "app.js")
"""Run in this order, before Plotly is read: tables and rollouts are on the screen first."""
AFTER_PLOTLY = ("charts.js",)
REPORT = "report.html"
"""File of the page in the folder of its only run or sweep."""
REFRESH_SECONDS = 10
"""Seconds after which the page of an unfinished run is read again."""


def write_page(
    folders: list[Path],
    output: Path,
    *,
    watch: bool = False,
    summary: dict[str, Any] | None = None,
) -> bool:
    """Write the page about the runs in some folders, each a run or a folder of runs.

    watch: the page reloads itself as long as a run has not ended. summary: that of the only run,
    which has not written it yet. Returns whether all have ended. Raises ValueError for a folder
    without a run.
    """
    runs = read_runs(find_runs(folders))
    if summary is not None:
        runs[0].summary = summary
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    page = page_data(runs, title)
    has_ended = all(run.status != "unfinished" for run in runs)
    page.data["refresh"] = REFRESH_SECONDS if watch and not has_ended else None
    save_text(output, html(page.data, page.rollouts))
    return has_ended


def html(data: dict[str, Any], rollouts: list[dict[str, Any]]) -> str:
    """The whole file."""
    own = [_own(name) for name in SCRIPTS]
    after = [_plotly(), *(_own(name) for name in AFTER_PLOTLY)]
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in [*own, *after])
    parts = {
        "policy": "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src {hashes}; base-uri 'none'; form-action 'none'",
        "title": escape(data["title"]),
        "style": _own("page.css"),
        "data": _json_element("data", data),
        "rollouts": "\n".join(
            _json_element(f"rollout-{number}", rollout) for number, rollout in enumerate(rollouts)
        ),
        "scripts": "\n".join(f"<script>{script}</script>" for script in own),
        "charts": "\n".join(f"<script>{script}</script>" for script in after),
    }
    # In one go, so that no part is searched for the place of another.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _own("page.html"))


def _own(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _plotly() -> str:
    """Plotly's code, which its Python package ships. It never ends a script element."""
    path = resources.files("plotly") / "package_data" / "plotly.min.js"
    return path.read_text(encoding="utf-8").replace("</script", "<\\/script")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json_element(name: str, content: Any) -> str:
    """Data in an element that is not run; no text in it can end the element."""
    text = json.dumps(_finite(content), separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _finite(content: Any) -> Any:
    """The content with null for NaN and infinity, which JSON has not."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content
