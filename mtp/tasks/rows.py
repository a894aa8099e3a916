"""Problems from files: JSONL, Parquet, a folder of `datasets` or a dataset of the Hugging Face hub.

A row has a prompt, an answer, perhaps a thought, and any other columns, which a reward may read.
Without separate test rows, the hash of a question decides its split: copies of a question are in
one split, and rows added later move none. With test rows, training rows whose question is among
them are dropped and counted in a warning. Test problems are ordered by hash, so that the first
`num_test` of them are a fair sample.

Left out: streaming, and prompts of several messages.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy

from ..common.bounds import bounded
from .base import Example, Split, Task, TaskConfig, fingerprint, read_utf8
from .reward_functions import load_reward

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RowsConfig(TaskConfig):
    """Settings for `task=rows task.source=problems.jsonl task.reward=math`."""

    source: str | None = None
    """Source of the rows: a file ending in .jsonl or .parquet, a folder or a hub id that `datasets`
    opens."""
    subset: str | None = None
    """Configuration of a hub id or folder, such as `main` of gsm8k."""
    train_split: str = "train"
    """Training split of a hub id or folder."""
    test_source: str | None = None
    """Source of test rows; None: the rows of `test_split`, else a held-out share of the rows."""
    test_split: str | None = None
    """Test split of a hub id or folder; without `test_source`, a split of `source`."""
    test_share: float = bounded(0.1, above=0, below=1)
    """Share of the questions that is held out if there are no test rows."""
    prompt_column: str = "prompt"
    """Column of the prompt."""
    answer_column: str = "answer"
    """Column of the answer."""
    thought_column: str = "thought"
    """Column of the thought, which rows may lack. Columns within columns are written
    `outer.inner`."""
    reward: str = "exact"
    """Reward of an answer: exact, math (equality by math-verify) or `package.module:function`."""
    reward_style: str = "auto"
    """Signature of that function: trl, verl, reasoning_gym; auto detects it by parameter names."""
    reward_seconds: float = bounded(10.0, above=0)
    """Time limit of that function per answer in seconds; an answer that takes longer is worth 0."""
    right_at: float = bounded(1.0, at_least=-1e9)
    """Minimum reward of a right answer."""

    def build(self) -> "Rows":
        if not self.source:
            raise ValueError(
                "task.source must be a .jsonl or .parquet file, a folder or a hub id, got "
                f"{self.source!r}"
            )
        if not 0 < self.test_share < 1:
            raise ValueError(f"task.test_share must be between 0 and 1, got {self.test_share}")
        if self.num_test < 1:
            raise ValueError(f"task.num_test must be at least 1, got {self.num_test}")
        if not math.isfinite(self.right_at):
            raise ValueError(f"task.right_at must be a finite number, got {self.right_at}")
        return Rows(self)


class Rows(Task):
    """Problems from rows, see the module."""

    def __init__(self, config: RowsConfig):
        assert config.source is not None
        self.config = config
        self.is_listed = True
        self.name = f"rows/{Path(config.source).name}"
        self.right_at = config.right_at
        self._reward = load_reward(config.reward, config.reward_style, config.reward_seconds)
        rows = load_rows(config.source, config.subset, config.train_split, "task.source")
        train = self._examples(rows, config.source)
        if config.test_source is None and config.test_split is None:
            held_out = {f for f, _ in train if in_test_share(f, config.test_share)}
            test = [pair for pair in train if pair[0] in held_out]
            hint = "change task.test_share or add rows"
        else:
            source = config.test_source or config.source
            split = config.test_split or "test"
            rows = load_rows(source, config.subset, split, "task.test_source")
            test = self._examples(rows, source)
            held_out = {f for f, _ in test}
            hint = "give other test rows"
            dropped = sum(f in held_out for f, _ in train)
            if dropped:
                _log.warning(
                    "%s: dropped %d of %d training rows whose question is in the test rows",
                    self.name,
                    dropped,
                    len(train),
                )
        self._train = [example for f, example in train if f not in held_out]
        self._test = [example for _, example in sorted(test, key=lambda pair: pair[0])]
        self._test = self._test[: config.num_test]
        for split, examples in (("train", self._train), ("test", self._test)):
            if not examples:
                raise ValueError(
                    f"task {self.name} needs at least one {split} row, got none of {len(train)}; "
                    + hint
                )

    def size(self, split: Split) -> int:
        return len(self._test if split == "test" else self._train)

    def example(self, split: Split, index: int) -> Example:
        return (self._test if split == "test" else self._train)[index]

    def score(self, example: Example, answer: str) -> float:
        """The reward's value."""
        return self._reward(example, answer)

    def _examples(self, rows: Sequence[dict[str, Any]], source: str) -> list[tuple[str, Example]]:
        """(fingerprint, example) of every row."""
        out = []
        for index, row in enumerate(rows):
            example = to_example(row, self.config, f"row {index} of {source}")
            out.append((fingerprint(example), example))
        return out


def in_test_share(question_hash: str, share: float) -> bool:
    """True if a question, by its hexadecimal hash, is in the held-out share."""
    return int(question_hash[:13], 16) < share * 16**13


def to_example(row: dict[str, Any], config: RowsConfig, where: str) -> Example:
    """A row as an example; columns hold the whole row. Raises ValueError naming key and row."""
    prompt = _text(_prompt(_column(row, config, "prompt_column", where)), "prompt_column", where)
    answer = _text(_column(row, config, "answer_column", where), "answer_column", where)
    if not prompt:
        raise ValueError(f"task.prompt_column must hold text, got an empty prompt in {where}")
    thought = _find(row, config.thought_column)
    if thought is not None:
        thought = _text(thought, "thought_column", where)
    return Example(prompt, answer, thought, dict(row), where)


def _find(row: Any, path: str) -> Any:
    """row["a"]["b"] for the path `a.b`; None if it is not there."""
    if isinstance(row, dict) and path in row:
        return row[path]
    outer, dot, inner = path.partition(".")
    return _find(row[outer], inner) if dot and isinstance(row, dict) and outer in row else None


def _column(row: dict[str, Any], config: RowsConfig, key: str, where: str) -> Any:
    path = getattr(config, key)
    value = _find(row, path)
    if value is None:
        raise ValueError(
            f"task.{key} must name a filled column, got {path!r}, but {where} has "
            f"{sorted(k for k, v in row.items() if v is not None)}"
        )
    return value


def _prompt(value: Any) -> Any:
    """The content of a list of one user message; anything else as it is."""
    single = isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)
    return value[0].get("content") if single and value[0].get("role") == "user" else value


def _text(value: Any, key: str, where: str) -> str:
    """Text or a number, stripped. Whole numbers get no decimal point, no number an exponent."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise ValueError(
            f"task.{key} must hold text or numbers, got {value!r:.80} in {where}"
            + ("; a prompt may be one user message, no more" if key == "prompt_column" else "")
        )
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            raise ValueError(
                f"task.{key} must hold finite numbers, got {value} in {where}; correct or drop "
                "the row"
            )
        # A float's shortest digits that identify it: 1e16, not its exact value
        value = f"{Decimal(repr(value) if isinstance(value, float) else value):f}"
        value = value.rstrip("0").rstrip(".") if "." in value else value
        value = "0" if value == "-0" else value
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"task.{key} must hold Unicode text, got the lone surrogate {text[error.start]!r} in "
            f"{where}; correct the row"
        ) from None
    return text


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
