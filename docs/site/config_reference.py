"""The page of all settings, made from the config dataclasses.

`page()` is Markdown: a section for each dataclass in the tree of `RunConfig`, with the name, type,
default, bounds and docstring of each field. `python docs/site/config_reference.py` prints it.

Left out: the values that files of conf/ set, and the settings of heads and streams that code
outside the package adds.
"""

import ast
import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any

import omegaconf

from mtp.common.bounds import BOUNDS
from mtp.config import RunConfig
from mtp.reports.loggers import SINKS
from mtp.tasks import TASK_CONFIGS

PAGE = "reference/configuration.md"
"""Address of the page in the site."""
INTRODUCTION = """\
# All settings

Every key of a run, made from the dataclasses that declare them. The default is the one of the
dataclass; the files of `conf/` that a run chooses override it, and the command line overrides both
([configuration](../configuration.md)). `python train.py --cfg job` prints the values of a run.

A number without bounds may have any finite value. A key of `stages` contains the stage's name in
place of `NAME`: `stages.rl.steps=100`.
"""
CHOICES = {
    "task": TASK_CONFIGS,
    "logger.sinks": {name: kind.config for name, kind in SINKS.items()},
}
"""Keys whose dataclass depends on a choice, with the dataclass of each choice."""
SIGNS = {"at_least": "≥", "above": ">", "at_most": "≤", "below": "<"}


@dataclass(frozen=True)
class Key:
    """One setting."""

    key: str
    """Whole key, such as `stages.NAME.steps`."""
    type: str
    default: str
    """Default as YAML writes it."""
    bounds: str
    """Such as `≥ 0, < 1`; empty where no bound is declared."""
    meaning: str
    """Docstring of the field, on one line."""


@dataclass(frozen=True)
class Section:
    """The settings of one dataclass."""

    title: str
    about: str
    """Docstring of the dataclass, then that of the field that holds it."""
    source: str
    """Name of the dataclass and its module."""
    keys: list[Key]


def page() -> str:
    """The Markdown of the page."""
    return "\n".join([INTRODUCTION, *map(markdown, sections(RunConfig))])


def markdown(section: Section) -> str:
    """A section of the page."""
    lines = [f"## {section.title}", "", section.about, "", section.source, ""]
    if section.keys:
        lines += ["| key | type | default | bounds | meaning |", "|---|---|---|---|---|"]
    for key in section.keys:
        default = f"`{key.default}`" if key.default else ""
        cells = (f"`{key.key}`", f"`{key.type}`", default, key.bounds, key.meaning)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def sections(cls: type, key: str = "", about: str = "", choice: str = "") -> Iterator[Section]:
    """The section of a dataclass, and then those of the dataclasses in its fields."""
    own, below = [], []
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        name = f"{key}.{field.name}" if key else field.name
        hint, meaning = hints[field.name], field_docstring(cls, field.name)
        inner, many = config_class(hint)
        if name in CHOICES:
            if many:
                own.append(Key(name, type_name(hint), "", "", meaning))
            for option, kind in CHOICES[name].items():
                inside = f"{name}.{option}" if many else name
                below.append((kind, inside, meaning, "" if many else f"{field.name}={option}"))
        elif inner is None:
            own.append(Key(name, type_name(hint), default_of(field), bounds_of(field), meaning))
        else:
            below.append((inner, f"{name}.NAME" if many else name, meaning, ""))
    title = choice and f"{key} ({choice})" or key
    module = cls.__module__.replace(".", "/")
    yield Section(
        f"`{title}`" if title else "The run",
        " ".join(filter(None, [one_line(inspect.getdoc(cls)), about])),
        f"`{cls.__name__}` in `{module}.py`",
        own,
    )
    for inner, inside, meaning, option in below:
        yield from sections(inner, inside, meaning, option)


def config_class(hint: Any) -> tuple[type | None, bool]:
    """The dataclass that a field holds, and whether it holds many of them by name."""
    if is_dataclass(hint):
        return typing.cast(type, hint), False
    if typing.get_origin(hint) is dict and is_dataclass(typing.get_args(hint)[1]):
        return typing.get_args(hint)[1], True
    return None, False


def type_name(hint: Any) -> str:
    """A type as the source writes it."""
    if isinstance(hint, types.UnionType):
        return " | ".join(type_name(one) for one in typing.get_args(hint))
    if hint is types.NoneType:
        return "None"
    arguments = typing.get_args(hint)
    name = getattr(hint, "__name__", str(hint))
    return f"{name}[{', '.join(map(type_name, arguments))}]" if arguments else name


def default_of(field: "Field[Any]") -> str:
    """The default as YAML writes it."""
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is MISSING or value == omegaconf.MISSING:
        return ""
    if isinstance(value, str):
        return value or '""'
    written = omegaconf.OmegaConf.to_yaml(omegaconf.OmegaConf.create({"value": value}))
    return written.strip().removeprefix("value: ")


def bounds_of(field: "Field[Any]") -> str:
    """The declared bounds of a number."""
    given = [(SIGNS[bound], field.metadata[bound]) for bound in BOUNDS if bound in field.metadata]
    return ", ".join(f"{sign} {limit:.10g}" for sign, limit in given)


def field_docstring(cls: type, name: str) -> str:
    """The string below a field, in the class or in the one that it inherits the field from."""
    for one in cls.__mro__:
        if name in docstrings(one):
            return docstrings(one)[name]
    return ""


@cache
def docstrings(cls: type) -> dict[str, str]:
    """The strings below the fields of a class, by field."""
    if not is_dataclass(cls):
        return {}
    (tree,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, after in zip(tree.body, tree.body[1:], strict=False):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            found[field.target.id] = one_line(after.value.value)
    return found


def one_line(text: str | None) -> str:
    """A docstring on one line, with its vertical strokes escaped as a table needs them."""
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    print(page())
