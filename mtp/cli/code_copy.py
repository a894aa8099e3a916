"""A copy of the code and of conf/ in a sweep's folder, from which all of its jobs run.

A job that waits in a queue, or comes after others, would otherwise import files that were edited
after the sweep was submitted, and compose its config from them. The copy is named by a digest of
its content, so a later submission of the same sweep has its own, and jobs of the earlier one keep
theirs. It is about 2 MB.

Left out: installed packages, modules of your own outside of `mtp` and `mtp_kernels`, the files of
`--config-dir`, data and models. They are read when a job needs them.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PACKAGES = ("mtp", "mtp_kernels")
FOLDER = ".code"
"""Folder of the copies within a sweep's folder."""
VERSION = "version.json"
"""File of a copy that names where it is from."""


def this_code() -> Path:
    """The folder that this process imports `mtp` from."""
    return Path(__file__).resolve().parents[2]


def run_from_copy(sweep: Path, arguments: list[str]) -> None:
    """Start this command again from a copy of its code; return if this is the copy.

    arguments: those of `mtp train`.
    """
    folder = sweep.resolve() / FOLDER
    if this_code().parent == folder:
        return
    # Modules beside the script and in the working folder stay importable, after the copy.
    after = [os.environ.get("PYTHONPATH", ""), *([] if sys.flags.safe_path else sys.path[:1])]
    found = [str(copy_code(folder)), *after, os.getcwd()]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in found if path))
    # Without it Python looks into the script's or the working folder first.
    os.environ["PYTHONSAFEPATH"] = "1"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "mtp.cli.main", "train", *arguments])


def copy_code(folder: Path) -> Path:
    """Copy the packages into a folder of `folder` that is named by their digest, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = {name: _source(name) for name in PACKAGES}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as new:
        for name, source in sources.items():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, Path(new) / name, ignore=ignored)
        # The copy's digest, since the source may be edited while it is copied.
        copy = folder / _digest(Path(new))
        if not copy.is_dir():
            noted = json.dumps(version(sources["mtp"]), indent=2) + "\n"
            (Path(new) / VERSION).write_text(noted, encoding="utf-8")
            made = Path(new) / "copy"
            made.mkdir()
            for name in (*PACKAGES, VERSION):
                (Path(new) / name).rename(made / name)
            try:
                made.rename(copy)
            except OSError:  # another submission was faster
                if not copy.is_dir():
                    raise
    return copy


def version(source: Path) -> dict[str, Any]:
    """Source of a package's code: its folder, git's commit, and whether files of the checkout
    differ from it; None without git.
    """

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(source), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {
        "from": str(source),
        "commit": commit,
        "is_changed": None if commit is None or changes is None else bool(changes),
    }


def check_code(submitted: str) -> None:
    """Raise ValueError if this process imports other code than the sweep was submitted with.

    submitted: name of the copy, which is its digest. A launcher may have moved it, as Ray does.
    """
    imported = _digest(this_code())
    if imported != submitted:
        raise ValueError(
            f"a job must run the code of its submission, {FOLDER}/{submitted} in the sweep's "
            f"folder, got {this_code()}; let the job's machine see the sweep's folder under the "
            "same path, and pass PYTHONPATH and PYTHONSAFEPATH to the job"
        )


def _source(name: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found is not None and found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations)))


def _digest(folder: Path) -> str:
    """Digest of the packages in a folder."""
    digest = hashlib.sha256()
    found = [path for name in PACKAGES for path in (folder / name).rglob("*") if path.is_file()]
    for path in sorted(path for path in found if path.suffix != ".pyc"):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]
