"""The progress bar of an evaluation: on a terminal, and elsewhere."""

import io

from rich.console import Console

import mtp.reports.progress as progress
from mtp.reports.progress import PartsProgress


def shown(is_terminal):
    out = io.StringIO()
    with PartsProgress(Console(file=out, force_terminal=is_terminal, width=90)) as report:
        for part in ("slow", "fast"):
            for done in (0, 4, 8):
                report(part, done, 8)
    return out.getvalue()


def test_a_terminal_shows_each_part_and_keeps_none():
    text = shown(True)
    assert text.index("slow") < text.index("fast") and "8/8" in text
    erased = "\x1b[2K"  # as a progress bar is removed
    assert text.rindex("8/8") < text.rindex(erased)


def test_elsewhere_short_work_writes_nothing(monkeypatch):
    assert shown(False) == ""
    monkeypatch.setattr(progress, "LINE_SECONDS", -1)
    assert shown(False).splitlines()[:3] == ["slow 0/8", "slow 4/8", "slow 8/8"]
