"""The folder of a run: who may write there, which files may be removed, and which settings may
change.

A run writes only into a folder that is new, empty, or marked as a run's. It removes only files that
a run wrote, and only when that run is replaced. While a process writes, it holds a lock that the
system releases when the process ends, in any way.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any, TextIO

from ..common.errors import read_json
from ..common.files import remove_temporary, save_text
from ..common.lock import LOCK, this_process
from ..reports.loggers import SINKS
from ..reports.measures import FOLDER as MEASURES
from .checkpoint import choose_checkpoint
from .export import check_replaceable

MARK = ".mtp-run"
"""File that marks a folder as a run's."""
FOLDERS = ("checkpoints", "stages", "start", "export", "not_finite", MEASURES)
FILES = ("config.yaml", "curves.png", "report.html", "summary.json")
BESIDE = ("job.json", MARK, LOCK)
"""Files that may lie in the folder of a run that has not begun."""
REPLACED = ".mtp-replaced"
"""Folder in a run's folder with the run that it replaces, until the new one trains."""
DISCARDED = ".mtp-discarded"
"""The same while it is removed."""
_WHOLE = ".whole"
"""File in `REPLACED`: all of the replaced run is there, so what lies beside it is the new run's."""


def check_name(name: str) -> None:
    """Raises ValueError unless `name` is a path that stays below `runs/`."""
    path = Path(name)
    parts = name.split("/")
    if path.is_absolute() or any(part.strip() in ("", ".", "..") for part in parts):
        raise ValueError(
            f"name must be a folder below runs/, such as mine or study/mine, got {name!r}; "
            "use run_dir=... for another place"
        )


def names_of_a_run() -> list[str]:
    """Names of the files and folders that a run writes, without its mark."""
    return [*FILES, *FOLDERS, *(name for kind in SINKS.values() for name in kind.writes)]


START_ANEW = "use name=... for another run, or resume=false overwrite=true to replace this one"
"""The remedy where a run can be neither continued nor taken as ended."""


class RunFolder:
    """A run's folder, for the process that writes there."""

    def __init__(self, path: Path, *, is_dry_run: bool = False):
        self.path, self.is_dry_run = path, is_dry_run
        self._lock: TextIO | None = None
        self._made: list[Path] = []  # folders that were missing, the innermost first

    @property
    def is_marked(self) -> bool:
        """True if a run wrote this folder (earlier versions left no mark, but a config)."""
        config = self.path / "config.yaml"
        if (self.path / MARK).is_file():
            return True
        return config.is_file() and config.read_bytes()[:10] == b"task_name:"

    def check(self) -> None:
        """Raises ValueError if the folder holds files that no run wrote, or cannot hold a run."""
        here, target = Path.cwd().resolve(), self.path.resolve()
        if here == target or target in here.parents:
            raise ValueError(
                f"run_dir must be a folder of its own, got {str(self.path)!r}, which is the "
                "working folder or above it; use run_dir=runs/NAME"
            )
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(
                f"run_dir must be a folder, got {str(self.path)!r}, which is a file; use "
                "run_dir=runs/NAME"
            )
        if self.is_dry_run and self.is_marked and not self._is_of_a_dry_run():
            raise ValueError(
                f"{self.path} holds a run, which a dry run would remove; use name=... to give the "
                "dry run another folder"
            )
        if not self.path.exists() or self.is_marked or (self.path / REPLACED).is_dir():
            return
        names = sorted(p.name for p in self.path.iterdir())
        foreign = [name for name in names if name not in BESIDE]
        if foreign:
            raise ValueError(
                f"{self.path} holds files that no run wrote ({', '.join(foreign[:3])}); use "
                "name=... or run_dir=... to give the run a folder of its own"
            )

    def lock(self) -> None:
        """Make the folder if it is missing and claim it for this process.

        Raises ValueError if another process that still runs has claimed it.
        """
        missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._made = missing
        file = self.path / LOCK
        while True:
            lock = file.open("a+", encoding="utf-8")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                owner = lock.read().strip() or "another process"
                lock.close()
                raise ValueError(
                    f"{self.path} is in use by {owner}; wait until it ends, or use name=... to "
                    "start another run"
                ) from None
            # Its owner may have removed the file between our opening and locking it.
            if file.exists() and os.fstat(lock.fileno()).st_ino == file.stat().st_ino:
                break
            lock.close()
        lock.truncate(0)
        lock.write(f"{this_process()}\n")
        lock.flush()
        self._lock = lock

    def release(self) -> None:
        """Release the folder. One that `lock` made and that is still empty is removed."""
        if self._lock is None:
            return
        (self.path / LOCK).unlink(missing_ok=True)
        self._lock.close()
        self._lock = None
        for path in self._made:
            if any(path.iterdir()):
                break
            path.rmdir()

    def begin(self) -> None:
        """Set the files of an earlier run aside, and mark the folder as that of a new one."""
        if self.is_marked:
            replaced = self.path / REPLACED
            replaced.mkdir()
            for name in (MARK, *names_of_a_run()):
                if os.path.lexists(self.path / name):
                    (self.path / name).rename(replaced / name)
            save_text(replaced / _WHOLE, "")
        save_text(self.path / MARK, json.dumps(self._mark()) + "\n")

    def _is_of_a_dry_run(self) -> bool:
        """True if what a dry run left, when it was killed, is all that the folder holds."""
        mark = self.path / MARK
        return mark.is_file() and bool(read_json(mark).get("dry_run"))

    def _mark(self) -> dict[str, Any]:
        return {"format": 1} | ({"dry_run": True} if self.is_dry_run else {})

    def check_stays(self, key: str, path: str) -> None:
        """Raises ValueError naming the key if a new run here would remove what it reads."""
        folder, source = self.path.resolve(), Path(path).resolve()
        if source.is_relative_to(folder) and self.is_marked:
            raise ValueError(
                f"{key}={path} belongs to the run that this one would replace; use name=... to "
                "give the new run a folder of its own"
            )

    def discard_replaced(self) -> None:
        """Remove the run that was set aside: the new one trains."""
        if (self.path / REPLACED).is_dir():
            (self.path / REPLACED).rename(self.path / DISCARDED)
            shutil.rmtree(self.path / DISCARDED)

    def restore_replaced(self) -> None:
        """Put the run back that was set aside, if there is one, in place of one that has not
        trained.
        """
        replaced = self.path / REPLACED
        if not replaced.is_dir():
            return
        if (replaced / _WHOLE).is_file():
            self.remove()
            (replaced / _WHOLE).unlink()
        for name in (*names_of_a_run(), MARK):
            if os.path.lexists(replaced / name):
                (replaced / name).rename(self.path / name)
        remove_temporary(replaced)
        replaced.rmdir()

    def remove(self) -> None:
        """Remove the files that a run wrote, if one did, and no others."""
        if not self.is_marked:
            return
        for name in names_of_a_run():
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name)
            else:
                (self.path / name).unlink(missing_ok=True)
        # Last, so that an interrupted removal can be repeated.
        (self.path / MARK).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Mend what a process that was killed left: temporary files, a run that was set aside."""
        if (self.path / DISCARDED).is_dir():
            shutil.rmtree(self.path / DISCARDED)
        self.restore_replaced()
        for folder in (self.path, *(self.path / name for name in FOLDERS)):
            if folder.is_dir():
                remove_temporary(folder)


DECIDES = (
    "seed",
    "model",
    "head",
    "channel",
    "task",
    "decoding",
    "stages",
    "evaluation",
    "kernels",
    "fabric.precision",
    "fabric.device_type",
)
"""Settings that determine a run's numbers."""
ORDERED = ("stages", "decoding.phases")
"""Settings whose entries have an order."""
PER_START = ("resume", "overwrite", "dry_run", "experiment")
"""Settings that affect one start of the program only."""


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of dicts as one dict from dotted keys to leaves."""
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    return {
        key: value
        for name, child in node.items()
        for key, value in leaves(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def order_of(settings: dict[str, Any], key: str) -> list[str]:
    """Names of the entries below a dotted key, in their order."""
    node: Any = settings
    for name in key.split("."):
        node = node.get(name, {})
    return list(node)


def changed_settings(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings of a resumed run that differ from the checkpoint's, as (then, now) by key.

    Args:
        saved: the checkpoint's settings, as JSON gives them back.
        now: the settings of this start, in the same form.

    Raises:
        ValueError: naming the keys, if one of them decides the run's numbers.
    """
    then, today = leaves(saved), leaves(json.loads(json.dumps(now)))
    for key in ORDERED:
        then[f"the order of {key}"] = order_of(saved, key)
        today[f"the order of {key}"] = order_of(now, key)
    absent = "not set"
    changed = {
        key: (then.get(key, absent), today.get(key, absent))
        for key in dict.fromkeys([*then, *today])
        if then.get(key, absent) != today.get(key, absent)
        and not any(key == name or key.startswith(f"{name}.") for name in PER_START)
    }
    deciding = {
        key: pair
        for key, pair in changed.items()
        if any(key == name or key.startswith(f"{name}.") for name in DECIDES)
        or key.startswith("the order of ")
    }
    if deciding:
        shown = [
            f"{key} was {was!r} and is now {is_now!r}" for key, (was, is_now) in deciding.items()
        ]
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        raise ValueError(
            "a resumed run must keep the settings that decide its numbers, but "
            f"{'; '.join(shown[:3])}{more}; use the run's settings, or name=... to start another"
        )
    return changed


def claim(folder: RunFolder, resume: bool | str, overwrite: bool) -> str | None:
    """Claim the run's folder and return the checkpoint to continue from; None for a new run.

    Raises ValueError if the folder belongs to something else, is in use, or holds a run that is
    neither continued nor replaced.
    """
    folder.check()
    folder.lock()
    try:
        folder.tidy()
        if resume:
            found = choose_checkpoint(folder.path / "checkpoints", resume)
            if found is not None:
                return str(found)
            has_ended = (folder.path / "summary.json").is_file()
            if not has_ended and any((folder.path / "stages").glob("*/config.json")):
                raise ValueError(
                    f"{folder.path} holds a run without its checkpoints, so it cannot be "
                    f"continued; {START_ANEW}"
                )
        if folder.is_marked and not (overwrite or resume):
            raise ValueError(
                f"{folder.path} already holds a run; use resume=true to continue it, "
                "overwrite=true to replace it, or name=... to start another"
            )
        check_replaceable(folder.path / "export")
    except BaseException:
        folder.release()
        raise
    return None
