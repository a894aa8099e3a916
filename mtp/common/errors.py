"""A user's mistake as one line: the key, the expected value, the given value and the closest match.

Unexpected errors are left out: `one_line` returns None for them, and they keep their traceback.
"""

import difflib
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from .conf import CONF, options_of

PLUGINS = {
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
    "ray": "hydra-ray-launcher",
    "optuna": "hydra-optuna-sweeper",
}
"""Launchers of conf/sweep and sweepers of conf/sweeper that are separate packages."""


IN_A_FILE = "write a new one into an experiment, a file of conf/experiment"
"""Remedy for an entry that holds keys of its own, such as a stage, and is not there yet."""

OURS = ("__main__", "hydra", "mtp", "mtp_kernels")
"""Packages whose ValueError is meant for the user; a module that is run directly is `__main__`."""


def one_line(error: BaseException) -> str | None:
    """Message for the user; None if the error is no mistake of theirs.

    Mistakes are the errors of Hydra and OmegaConf, a ValueError that Hydra or this project raises
    itself, and errors of the machine: files, memory, encodings and packages. A ValueError from
    another library is none.
    """
    if isinstance(error, OmegaConfBaseException):
        return _of_omegaconf(error, None)
    if type(error).__module__ == "hydra.errors":
        return _of_hydra(error)
    if isinstance(error, ValueError) and _raised_in(error) in OURS:
        return " ".join(str(error).split("\n"))
    return _of_machine(error)


def read_json(path: Path) -> Any:
    """Content of a JSON file. Raises ValueError naming the file if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of the encoding, or of the grammar
        raise ValueError(f"{path} is not JSON: {error}; write it again or remove it") from None


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Add the name of a folder or file to errors that a library raises while it reads it.

    A damaged file can fail in any of the libraries and with any error. Raises ValueError; errors of
    this project, of memory and of packages pass unchanged.
    """
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        is_ours = isinstance(error, ValueError) and _raised_in(error) in OURS
        if is_ours and not isinstance(error, UnicodeError):
            raise
        if isinstance(error, MemoryError | ModuleNotFoundError) or _is_out_of_memory(error, text):
            raise
        raise ValueError(f"{what} could not be read: {text[:300]}") from error


def _raised_in(error: BaseException) -> str:
    """The top-level package of the function that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return name.partition(".")[0]


def _of_machine(error: BaseException) -> str | None:
    """Message for an error of a file, of memory, of an encoding, or of a missing package."""
    text = " ".join(str(error).split())
    if isinstance(error, UnicodeDecodeError):
        return f"text that is not {error.encoding} was read: {text}; save the file as UTF-8"
    if isinstance(error, UnicodeEncodeError):
        shown = ascii(error.object[error.start : error.end])
        return f"the encoding {error.encoding} cannot write {shown}; set PYTHONIOENCODING=utf-8"
    if isinstance(error, OSError):
        reason = error.strerror or text or type(error).__name__
        return reason if error.filename is None else f"{error.filename}: {reason}"
    if isinstance(error, MemoryError) or _is_out_of_memory(error, text):
        reason = text.partition(". ")[0] or "MemoryError"
        keys = "batch_size, micro_batch_size, group_size or max_new_tokens"
        return f"there is not enough memory ({reason}); lower {keys}"
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        if package not in ("mtp", "mtp_kernels"):
            return f"the package {package} is not installed; install it with: pip install {package}"
    return None


def _is_out_of_memory(error: BaseException, text: str) -> bool:
    if type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):
        return "out of memory" in text
    return isinstance(error, RuntimeError) and "can't allocate memory" in text


def _of_hydra(error: BaseException) -> str:
    """Message for an error of composing the config."""
    text = str(error)
    options = getattr(error, "options", None)
    if options is not None:
        where = match[1] if (match := _IN_FILE.match(text)) else None
        return _place(where) + _unknown_choice(str(getattr(error, "missing_cfg_file", "")), options)
    override = getattr(error, "override", None)
    if override is not None:
        lines = [line for line in text.splitlines() if not line.startswith("Error parsing")]
        reason = f" ({lines[0].strip()})" if lines else ""
        return f"{override!r} could not be read as key=value{reason}{_quoted(override)}"
    if match := re.match(r"Ambiguous value for argument '(.*)'", text):
        key, _, values = match[1].partition("=")
        return f"{match[1]} gives several values: add -m for a sweep, or write '{key}=[{values}]'"
    if match := re.match(r"Sweep parameters '(.*)' requires --multirun", text):
        return f"{match[1]} gives several values: add -m for a sweep"
    cause = error.__cause__ or error.__context__
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    where = match[1] if (match := _IN_FILE.match(text)) else None
    added = re.match(r"Error merging override \+\+?([\w.]+)=", text)
    if cause is not None and added and "is not a subclass of" in str(cause):
        parts = added[1].split(".")
        key = ".".join(parts[: parts.index(cause.key) + 1]) if cause.key in parts else added[1]
        return f"{key} cannot be added on the command line; {IN_A_FILE}"
    if cause is not None:
        return _of_omegaconf(cause, where)
    if match := re.match(r"Could not override '(.*?)'\.", text):
        given = text.rpartition("use +")[2]
        return f"unknown key {match[1]!r}, got {given}; write key=value"
    return " ".join(text.split())


def _quoted(override: str) -> str:
    """Remedy for an override that Hydra cannot read: its value in quotes, ready to paste."""
    key, equals, value = override.partition("=")
    quoted = f"{key}={in_quotes(value)}"
    if not (equals and _KEY.fullmatch(key)):
        return "; write key=value, with quotes around a value that has special characters"
    return f"; quote the value: {shlex.quote(quoted)}"


def in_quotes(value: str) -> str:
    """A quoted text, which Hydra reads literally."""
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', value)
    at_the_end = escaped[len(escaped.rstrip("\\")) :]
    return f'"{escaped}{at_the_end}"'


def _unknown_choice(path: str, options: Iterable[str]) -> str:
    """Message for an unknown option of a config group; `path` is group/option."""
    group, _, option = path.rpartition("/")
    if group in ("hydra/launcher", "hydra/sweeper") and option in PLUGINS:
        key = "sweep" if group == "hydra/launcher" else "sweeper"
        return (
            f"{key}={option} needs the package {PLUGINS[option]}; install the launchers and "
            "sweepers with: pip install '.[sweep]'"
        )
    first, _, rest = path.partition("/")
    if not (CONF / first).is_dir():
        shown = [name for name in options if not name.endswith("_schema")]
        return f"{group}={option} is not a choice{_closest(option, shown)}"
    # Hydra's options are those of one folder, and an option may be in a folder of its own.
    names = options_of(CONF / first)
    parts = [name.partition("/") for name in names]
    shown = list(dict.fromkeys(f"{part}/..." if slash else part for part, slash, _ in parts))
    return f"{first}={rest} is not a choice{_closest(rest, names, shown)}"


def _of_omegaconf(error: OmegaConfBaseException, where: str | None) -> str:
    """Message for an error of a key; `where` is the config file that holds it, None: the command
    line.
    """
    key = error.full_key or (str(error.key) if error.key is not None else "")
    place = _place(where)
    if isinstance(error, MissingMandatoryValue):
        return f"{place}{key} must be set: {key}=..."
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        parent = error.parent_node
        known = [str(name) for name in parent] if isinstance(parent, DictConfig) else []
        remedy = _closest(key.rpartition(".")[2], known)
        if is_open_mapping(parent):
            is_plain = not is_dataclass(parent._metadata.element_type)
            remedy += f"; +{key}=... adds it" if is_plain else f"; {IN_A_FILE}"
        return f"{place}unknown key {key}{remedy}"
    text = str(error.msg or error).splitlines()[0]
    for pattern, meaning in _WRONG_VALUE:
        if match := re.match(pattern, text):
            found = {name: _TYPES.get(value, value) for name, value in match.groupdict().items()}
            return f"{place}{meaning.format(key=key, **found)}"
    return f"{place}{key}: {text}" if key and key not in text else f"{place}{text}"


def is_open_mapping(node: object) -> bool:
    """True for a mapping that may have any key, such as `decoding.phases`."""
    return isinstance(node, DictConfig) and node._metadata.object_type in (dict, None)


def _place(where: str | None) -> str:
    """Name of the file with the mistake; empty if it must be on the command line."""
    if where is None or where == "train" or where.startswith("hydra/"):
        return ""
    return f"conf/{where}.yaml: "


_KEY = re.compile(r"(\+\+?)?[A-Za-z_][\w./-]*")
"""A key that Hydra reads, whatever its value is."""
_IN_FILE = re.compile(r"In '(.*?)': ")
_WRONG_VALUE = (
    (
        r"Value (?P<value>.*) of type '.*' could not be converted to (?P<wanted>\w+)$",
        "{key} must be {wanted}, got {value}",
    ),
    (
        r"Value (?P<value>.*?)(?: of type '.*')? is incompatible with type hint '(?P<wanted>.*)'$",
        "{key} must be {wanted}, got {value}",
    ),
    (
        r"Value (?P<value>.*) is not a valid bool",
        "{key} must be true or false, got {value}",
    ),
    (r".* is not a ListConfig", "{key} must be a list, such as {key}=[...]"),
    (r".* is not a subclass of \w+", "{key} holds keys of its own: set {key}.KEY=..."),
    (r"field .* is not Optional", "{key} must not be null"),
)
"""Patterns of OmegaConf's messages about a value, and the messages for the user."""
_TYPES = {
    "Integer": "a whole number",
    "Float": "a number",
    "Union[bool, str]": "true, false or a word",
}


def _closest(given: str, known: list[str], shown: list[str] | None = None) -> str:
    """`; did you mean ...?`, or all known names, or `shown` in their place, if none is close."""
    if not known:
        return ""
    close = difflib.get_close_matches(given, known, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; there {'is' if len(known) == 1 else 'are'} {', '.join(shown or known)}"
