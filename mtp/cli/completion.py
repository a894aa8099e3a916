"""Completion of the shell: `mtp completion bash` prints a script, made by shtab.

The script knows commands, options and choices by itself. Overrides of `mtp train` are completed by
Hydra, which the script asks through `mtp train -sc query=bash`; the choices of a group are read
from conf/ alone, which takes a fraction of the time.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from ..common.conf import options_of

SHELLS = ("bash", "zsh")
OVERRIDES = "_mtp_complete_overrides"
"""Function of the shell that completes an override."""
QUERY = "query=bash"
"""Argument of Hydra that asks for the completions of the line in COMP_LINE."""

PREAMBLE = {
    # bash splits words at "=", unless COMP_WORDBREAKS says otherwise: then only the part after it
    # is completed.
    "bash": f"""
{OVERRIDES}() {{
  local line="${{COMP_LINE:0:$COMP_POINT}}"
  local word="${{line##* }}" choice
  compopt -o nospace +o filenames 2>/dev/null
  for choice in $(COMP_LINE="mtp ${{line#*train }}" mtp train -sc {QUERY} 2>/dev/null); do
    [[ "$choice" == "$word"* ]] || continue
    if [[ "$COMP_WORDBREAKS" == *=* && "$word" == *=* ]]; then choice="${{choice#*=}}"; fi
    printf '%s\\n' "$choice"
  done
}}
""",
    "zsh": f"""
{OVERRIDES}() {{
  local line="${{BUFFER:0:$CURSOR}}"
  local -a found
  found=(${{=$(COMP_LINE="mtp ${{line#*train }}" mtp train -sc {QUERY} 2>/dev/null)}})
  compadd -S '' -a found
}}
""",
}


def complete_overrides(sub: argparse.ArgumentParser) -> None:
    """Give the parser of `mtp train` its overrides, for completion: Hydra parses them."""
    overrides: Any = sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    overrides.complete = {shell: OVERRIDES for shell in SHELLS}


def add_completion(commands: Any, parser: argparse.ArgumentParser) -> None:
    """Add the command to those of `mtp`, whose parser it describes to the shell."""
    text = "print the script that completes mtp's commands in a shell"
    sub = commands.add_parser(
        "completion", help=text, description=f'{text}: eval "$(mtp completion bash)".'
    )
    sub.add_argument("shell", choices=SHELLS)
    sub.set_defaults(run=lambda arguments: print(script(parser, arguments.shell)))


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for a shell."""
    import shtab

    preamble: Any = PREAMBLE  # its annotation leaves out the dict that it documents
    return str(shtab.complete(parser, shell, preamble=preamble))


def choices_of_group(arguments: list[str], conf: Path) -> str | None:
    """Completions of the last word of COMP_LINE, as Hydra prints them, if it chooses in a group.

    None if `arguments` do not ask for completions, or if Hydra must answer.
    """
    if QUERY not in arguments:
        return None
    word = os.environ.get("COMP_LINE", "").rpartition(" ")[2]
    group, equals, option = word.partition("=")
    if not (equals and group.isidentifier() and (conf / group).is_dir()):
        return None
    return " ".join(
        f"{group}={name}" for name in options_of(conf / group) if name.startswith(option)
    )
