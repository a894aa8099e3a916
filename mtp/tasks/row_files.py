"""Rows of files, folders and datasets of the hub, as they are written there.

JSON Lines are read without a library, since a name that is there twice, or text that looks like a
date, must not be changed without a word. Narrow floats get the digits that were written.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from .base import read_utf8


def load_rows(source: str, subset: str | None, split: str, key: str) -> Sequence[dict[str, Any]]:
    """Rows of a file, folder or hub id. Raises ValueError naming `key` if there are none.

    Args:
        source: path or hub id; an existing path takes precedence.
        subset: configuration of a folder or hub id.
        split: split of a folder or hub id.
        key: the config's name of the source.
    """
    path = Path(source).expanduser()
    suffix = path.suffix
    rows: Sequence[dict[str, Any]]
    if suffix in (".jsonl", ".parquet"):
        if not path.is_file():
            raise ValueError(f"{key} must be an existing file, got {source!r} (in {Path.cwd()})")
        rows = _jsonl(path, key) if suffix == ".jsonl" else _parquet(path, key)
    elif path.is_file():
        raise ValueError(f"{key} must end in .jsonl or .parquet, got {source!r}; convert the file")
    else:
        rows = _datasets(path, source, subset, split, key)
    if not len(rows):
        raise ValueError(f"{key} must hold at least one row, got none in {source!r}")
    return rows


def _jsonl(path: Path, key: str) -> list[dict[str, Any]]:
    rows = []
    # split at line feeds only: JSON strings may hold other line separators
    for number, line in enumerate(read_utf8(path, key).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{key}: line {number} of {path} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{key}: line {number} of {path} must be an object, got {row!r:.80}")
        rows.append(row)
    return rows


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError if it holds a name twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(n for n, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def _parquet(path: Path, key: str) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{key}={path} could not be read as Parquet: {error}") from None
    twice = [name for name, count in Counter(table.column_names).items() if count > 1]
    if twice:
        raise ValueError(f"{key}={path} has the column {twice[0]!r} twice; rename one")
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}={path} must hold UTF-8 text: {error}; convert the file") from None
    for column in table.schema:
        if str(column.type) in NARROW_FLOATS:
            for row in rows:
                row[column.name] = shortest(row[column.name], NARROW_FLOATS[str(column.type)])
    return rows


NARROW_FLOATS = {"float": "float32", "halffloat": "float16"}
"""Arrow's names of the floats that are narrower than Python's, and NumPy's."""


def shortest(value: float | None, dtype: str) -> float | None:
    """The float with the fewest digits that `dtype` rounds to `value`: 0.1, not 0.10000000149."""
    return None if value is None else float(str(numpy.dtype(dtype).type(value)))


def _datasets(path: Path, source: str, subset: str | None, split: str, key: str) -> Any:
    import datasets

    saved = path / "dataset_dict.json", path / "state.json"
    try:
        if not any(file.is_file() for file in saved):
            return _with_short_floats(datasets.load_dataset(source, subset, split=split))
        loaded = datasets.load_from_disk(str(path))
        chosen = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return _with_short_floats(chosen)
    except Exception as error:  # datasets raises any kind of error, by loader
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{key}={source!r} could not be opened by datasets as subset {subset!r}, split "
            f"{split!r}: {type(error).__name__}: {first}; give a .jsonl or .parquet file, a folder "
            "or a hub id, and task.subset, task.train_split, task.test_split where it has them"
        ) from error


def _with_short_floats(rows: Any) -> Any:
    """A dataset whose narrow floats come with the digits that were written, converted on access."""
    narrow = {
        name: feature.dtype
        for name, feature in rows.features.items()
        if getattr(feature, "dtype", None) in NARROW_FLOATS.values()
    }
    if not narrow:
        return rows

    def shortened(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return batch | {
            name: [shortest(value, dtype) for value in batch[name]]
            for name, dtype in narrow.items()
        }

    return rows.with_transform(shortened)
