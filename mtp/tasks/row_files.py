"""Rows of files, folders and datasets of the hub, as they are written there, from any place on.

JSON Lines are read without a library, since a name that is there twice, or text that looks like a
date, must not be changed without a word. Narrow floats get the digits that were written.

A reader holds one row, or one batch of a Parquet file, in memory.
"""

import gzip
import json
import os
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO

import numpy

from .base import begins_as_utf16, not_utf8

Row = tuple[str, dict[str, Any]]
"""(origin, content): `row 3 of rows.jsonl` and the row."""
Place = dict[str, Any]
"""The place after a row, as plain values that JSON can hold; a new reader continues from it."""
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


class WrittenFloat(Decimal):
    """A float of a JSON file, with all digits that were written."""


class RowReader(ABC):
    """The rows of a source, in order."""

    place: Place
    """The place after the row that was given last."""

    @abstractmethod
    def rows(self, place: Place | None = None) -> Iterator[Row]:
        """The rows from a place on; None: from the first."""

    def identity(self) -> list[list[Any]]:
        """Name and size of each file, by which a place is known to be of the same source."""
        return []


def open_rows(
    source: str, subset: str | None, split: str, key: str, *, streaming: bool = False
) -> RowReader:
    """The rows of files, a folder or a hub id. Raises ValueError naming `key` if there are none.

    Args:
        source: path, pattern of paths (`data/*.jsonl.gz`) or hub id; an existing path takes
            precedence.
        subset: configuration of a folder or hub id.
        split: split of a folder or hub id.
        key: the config's name of the source.
        streaming: read a folder or hub id without writing it to the cache of `datasets`.
    """
    path = Path(source).expanduser()
    if source.endswith(SUFFIXES):
        paths = [path]
        if not path.exists() and has_magic(source):
            paths = sorted(Path(name) for name in glob(str(path), recursive=True))
        for one in paths or [path]:
            if not one.is_file():
                raise ValueError(
                    f"{key} must be an existing file, got {source!r} (in {Path.cwd()})"
                )
        return FileReader(paths, key)
    if path.is_file() or has_magic(source):
        raise ValueError(
            f"{key} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got {source!r}; "
            "convert the file"
        )
    return _datasets(path, source, subset, split, key, streaming)


def load_rows(source: str, subset: str | None, split: str, key: str) -> list[Row]:
    """All rows of a source, see `open_rows`. Raises ValueError if it has none."""
    rows = list(open_rows(source, subset, split, key).rows())
    if not rows:
        raise no_rows(source, key)
    return rows


def no_rows(source: str, key: str) -> ValueError:
    """The error of a source without rows."""
    return ValueError(f"{key} must hold at least one row, got none in {source!r}")


class FileReader(RowReader):
    """The rows of files, one file after the other."""

    def __init__(self, paths: list[Path], key: str):
        self.paths, self.key = paths, key

    def rows(self, place: Place | None = None) -> Iterator[Row]:
        place = {"file": 0, "row": 0, "at": None} if place is None else place
        row, at = place["row"], place["at"]
        for number in range(place["file"], len(self.paths)):
            path = self.paths[number]
            read = _parquet if path.suffix == ".parquet" else _json_lines
            for content, after in read(path, self.key, at):
                self.place = {"file": number, "row": row + 1, "at": after}
                yield f"row {row} of {path}", content
                row += 1
            row, at = 0, None

    def identity(self) -> list[list[Any]]:
        """Name and size of each file."""
        return [[path.name, path.stat().st_size] for path in self.paths]


def _json_lines(path: Path, key: str, at: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """(row, place after it) of a file's lines; a place is [bytes, lines] before it."""
    offset, number = at or (0, 0)
    opened: Any = gzip.open if path.suffix == ".gz" else Path.open
    with opened(path, "rb") as file:
        try:
            if begins_as_utf16(file.read(4)):
                raise not_utf8(key, str(path), "UTF-16")
            file.seek(offset)
            yield from _lines(file, path, key, number)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{key}={path} could not be read as gzip: {error}") from None


def _lines(file: BinaryIO, path: Path, key: str, number: int) -> Iterator[tuple[dict, Any]]:
    """The rows of the rest of a file, whose next line has this number, counted from 0."""
    # Lines end at line feeds only: JSON strings may hold other line separators.
    while line := file.readline():
        number += 1
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise not_utf8(key, f"{path}, line {number}", "ISO-8859-1") from None
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_object, parse_float=WrittenFloat)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{key}: line {number} of {path} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{key}: line {number} of {path} must be an object, got {row!r:.80}")
        yield row, [file.tell(), number]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError if it holds a name twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(n for n, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


_BATCH = 1024
"""Number of rows of a Parquet file that are decoded at once."""


def _parquet(path: Path, key: str, at: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """(row, place after it) of a Parquet file; a place is the number of rows before it."""
    import pyarrow
    from pyarrow import parquet

    skipped, begin = 0, at or 0
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            twice = [name for name, count in Counter(schema.names).items() if count > 1]
            if twice:
                raise ValueError(f"{key}={path} has the column {twice[0]!r} twice; rename one")
            narrow = narrow_floats(schema)
            groups: list[int] = []
            for group in range(file.metadata.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if not groups and skipped + size <= begin:
                    skipped += size
                else:
                    groups.append(group)
            for batch in file.iter_batches(_BATCH, row_groups=groups) if groups else ():
                first = max(0, begin - skipped)
                for row in batch.slice(first).to_pylist():
                    first += 1
                    yield shortened(row, narrow), skipped + first
                skipped += len(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{key}={path} could not be read as Parquet: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}={path} must hold UTF-8 text: {error}; convert the file") from None


NARROW_FLOATS = {"float": "float32", "halffloat": "float16"}
"""Arrow's names of the floats that are narrower than Python's, and NumPy's."""

Narrow = str | dict[str, "Narrow"] | list["Narrow"] | None
"""Places of narrow floats in a value: NumPy's name of its type, or those in the fields of a dict or
in the items of a list. None: there are none."""


def narrow_floats(schema: Any) -> dict[str, Narrow]:
    """Places of narrow floats in the columns of an Arrow schema."""
    from pyarrow import types

    def within(kind: Any) -> Narrow:
        if types.is_struct(kind):
            fields = {field.name: within(field.type) for field in kind}
            return fields if any(fields.values()) else None
        if hasattr(kind, "value_type") and not types.is_dictionary(kind):  # all kinds of lists
            inner = within(kind.value_type)
            return [inner] if inner else None
        return NARROW_FLOATS.get(str(kind))

    return {column.name: within(column.type) for column in schema}


def shortened(value: Any, narrow: Narrow) -> Any:
    """A value with the digits of narrow floats that were written: 0.1, not 0.10000000149."""
    if value is None or not narrow:
        return value
    if isinstance(narrow, dict):
        return value | {
            name: shortened(value.get(name), one) for name, one in narrow.items() if one
        }
    if isinstance(narrow, list):
        return [shortened(one, narrow[0]) for one in value] if isinstance(value, list) else value
    return float(str(numpy.dtype(narrow).type(value)))


class DatasetReader(RowReader):
    """The rows of a dataset of `datasets`, which is in memory or mapped from a disk."""

    def __init__(self, dataset: Any, source: str):
        self.dataset, self.source = dataset, source
        self.narrow = narrow_floats(dataset.features.arrow_schema)

    def rows(self, place: Place | None = None) -> Iterator[Row]:
        begin = 0 if place is None else place["row"]
        for index in range(begin, len(self.dataset)):
            self.place = {"row": index + 1}
            yield f"row {index} of {self.source}", shortened(self.dataset[index], self.narrow)

    def identity(self) -> list[list[Any]]:
        """Number of rows."""
        return [[self.source, len(self.dataset)]]


class StreamReader(RowReader):
    """The rows of an IterableDataset of `datasets`, whose own `state_dict` is the place."""

    def __init__(self, dataset: Any, source: str, files: list[str]):
        """files: paths or addresses of what is read; those of the hub hold the revision."""
        self.dataset, self.source, self.files = dataset, source, files
        features = dataset.features
        self.narrow = narrow_floats(features.arrow_schema) if features else {}
        self.start = dataset.state_dict()

    def identity(self) -> list[list[Any]]:
        """Name of each file, and size of those on this machine."""
        return [
            [Path(file).name, os.path.getsize(file)] if os.path.isfile(file) else [file, None]
            for file in self.files
        ]

    @property
    def place(self) -> Place:  # type: ignore[override]
        """The place after the row that was given last."""
        return {"row": self._row, "state": self.dataset.state_dict()}

    def rows(self, place: Place | None = None) -> Iterator[Row]:
        place = {"row": 0, "state": self.start} if place is None else place
        self.dataset.load_state_dict(place["state"])
        self._row = place["row"]
        for content in self.dataset:
            self._row += 1
            yield f"row {self._row - 1} of {self.source}", shortened(content, self.narrow)


def _datasets(
    path: Path, source: str, subset: str | None, split: str, key: str, streaming: bool
) -> RowReader:
    import datasets

    saved = path / "dataset_dict.json", path / "state.json"
    try:
        if any(file.is_file() for file in saved):
            loaded = datasets.load_from_disk(str(path))
            chosen = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
            return DatasetReader(chosen, source)
        if streaming:
            builder = datasets.load_dataset_builder(source, subset)
            files = [str(file) for file in (builder.config.data_files or {}).get(split, ())]
            return StreamReader(builder.as_streaming_dataset(split=split), source, files)
        return DatasetReader(datasets.load_dataset(source, subset, split=split), source)
    except Exception as error:  # datasets raises any kind of error, by loader
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{key}={source!r} could not be opened by datasets as subset {subset!r}, split "
            f"{split!r}: {type(error).__name__}: {first}; give a .jsonl or .parquet file, a folder "
            "or a hub id, and task.subset, task.train_split, task.test_split where it has them"
        ) from error
