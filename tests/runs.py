"""Comparisons of the folders of runs."""

import json
from pathlib import Path

from helpers import records

from mtp.reports.json_lines import read_records

CLOCKS = {"seconds"}


def content(folder: Path, *patterns: str) -> dict[str, bytes]:
    """Bytes of the files in a folder, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for pattern in patterns or ("**/*",)
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }


def without_clocks(summary: dict) -> list[dict]:
    return [{k: v for k, v in s.items() if k not in CLOCKS} for s in summary["stages"]]


def same_run(mine: Path, theirs: Path) -> None:
    """Weights, metrics, completions, summary and export are equal bit for bit but for clocks."""
    assert records(mine) == records(theirs)
    read = [read_records(folder / "completions.jsonl") for folder in (mine, theirs)]
    assert read[0] == read[1]
    assert (mine / "metrics.csv").read_bytes().count(b"\n") == len(records(theirs)) + 1
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (mine, theirs)]
    assert without_clocks(summaries[0]) == without_clocks(summaries[1])
    for name in ("stages", "export"):
        assert content(mine / name, "**/*.safetensors") == content(
            theirs / name, "**/*.safetensors"
        )
