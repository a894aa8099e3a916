"""A user's mistake as one line: which key, what was expected, what was given, what is close.

Left out: anything unexpected. `one_line` returns None for it, and it keeps its traceback.
"""

import difflib
import re
from collections.abc import Iterable

from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

LAUNCHERS = {
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
}
"""Launchers of conf/sweep that are packages of their own."""


def one_line(error: BaseException) -> str | None:
    """What to tell the user; None if the error is not theirs.

    Theirs are the errors of Hydra and OmegaConf, and a ValueError that Hydra or this project raises
    itself; one that comes out of another library is not.
    """
    if isinstance(error, OmegaConfBaseException):
        return _of_omegaconf(error, None)
    if type(error).__module__ == "hydra.errors":
        return _of_hydra(error)
    if isinstance(error, ValueError) and _raised_in(error) in ("hydra", "mtp", "mtp_kernels"):
        return " ".join(str(error).split("\n"))
    return None


def _raised_in(error: BaseException) -> str:
    """The top-level package of the function that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return name.partition(".")[0]


def _of_hydra(error: BaseException) -> str:
    """An error of composing the config."""
    text = str(error)
    options = getattr(error, "options", None)
    if options is not None:
        where = match[1] if (match := _IN_FILE.match(text)) else None
        return _place(where) + _unknown_choice(str(getattr(error, "missing_cfg_file", "")), options)
    override = getattr(error, "override", None)
    if override is not None:
        lines = [line for line in text.splitlines() if not line.startswith("Error parsing")]
        reason = f" ({lines[0].strip()})" if lines else ""
        return f"{override!r} could not be read as key=value{reason}; quote special characters"
    if match := re.match(r"Ambiguous value for argument '(.*)'", text):
        key, _, values = match[1].partition("=")
        return f"{match[1]} gives several values: add -m for a sweep, or write '{key}=[{values}]'"
    if match := re.match(r"Sweep parameters '(.*)' requires --multirun", text):
        return f"{match[1]} gives several values: add -m for a sweep"
    cause = error.__cause__ or error.__context__
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    where = match[1] if (match := _IN_FILE.match(text)) else None
    if cause is not None:
        return _of_omegaconf(cause, where)
    if match := re.match(r"Could not override '(.*?)'\.", text):
        return f"unknown key {match[1]}"
    return " ".join(text.split())


def _unknown_choice(path: str, options: Iterable[str]) -> str:
    """An option of a config group that is not there; `path` is group/option."""
    group, _, option = path.rpartition("/")
    if group == "hydra/launcher" and option in LAUNCHERS:
        return (
            f"sweep={option} needs the package {LAUNCHERS[option]}; install the launchers with: "
            "pip install '.[sweep]'"
        )
    shown = [name for name in options if not name.endswith("_schema")]
    return f"{group}={option} is not a choice{_closest(option, shown)}"


def _of_omegaconf(error: OmegaConfBaseException, where: str | None) -> str:
    """An error of a key; `where` is the config file that holds it, None: the command line."""
    key = error.full_key or (str(error.key) if error.key is not None else "")
    place = _place(where)
    if isinstance(error, MissingMandatoryValue):
        return f"{place}{key} must be set: {key}=..."
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        parent = error.parent_node
        known = [str(name) for name in parent] if isinstance(parent, DictConfig) else []
        return f"{place}unknown key {key}{_closest(key.rpartition('.')[2], known)}"
    text = str(error.msg or error).splitlines()[0]
    for pattern, meaning in _WRONG_VALUE:
        if match := re.match(pattern, text):
            found = {name: _TYPES.get(value, value) for name, value in match.groupdict().items()}
            return f"{place}{meaning.format(key=key, **found)}"
    return f"{place}{key}: {text}" if key and key not in text else f"{place}{text}"


def _place(where: str | None) -> str:
    """The file that holds a mistake; nothing if it can only be the command line's."""
    if where is None or where == "train" or where.startswith("hydra/"):
        return ""
    return f"conf/{where}.yaml: "


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
"""What OmegaConf says of a value, and what the user is told."""
_TYPES = {
    "Integer": "a whole number",
    "Float": "a number",
    "Union[bool, str]": "true, false or a word",
}


def _closest(given: str, known: list[str]) -> str:
    """`; did you mean ...?`, or all that there is if nothing is close."""
    if not known:
        return ""
    close = difflib.get_close_matches(given, known, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; there {'is' if len(known) == 1 else 'are'} {', '.join(known)}"
