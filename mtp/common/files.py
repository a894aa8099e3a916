"""Files that survive a crash: temporary names, flushed to disk, moved into place."""

import ctypes
import glob
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from .lock import is_alive

TEMPORARY = ".mtp-tmp"
"""Suffix of an unfinished file or folder; its name begins with a dot."""


REPLACED = ".mtp-old"
"""Suffix of a folder while another replaces it; its name begins with a dot."""


_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


def save_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file or folder under a temporary name, then move it into place.

    A crash, even of the machine, leaves either the old one or the new one, complete. Files get the
    permissions of the user's umask. The parent folder is made if it is missing.

    Raises OSError naming the path for an error of the file system, whichever library `write` calls.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    # Of this process and thread alone: another one may write the same file at the same time.
    writer = f"{os.getpid()}-{threading.get_native_id()}"
    temporary = path.with_name(f".{path.name}.{writer}{TEMPORARY}")
    _remove(temporary)
    try:
        write(temporary)
        _settle(temporary)
        if path.is_dir():
            _replace_folder(temporary, path)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        _remove(temporary)
        # Libraries written in Rust, such as safetensors, raise errors of their own.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is not None and not isinstance(error, OSError):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise


def is_hidden(path: Path) -> bool:
    """True if a part of a path begins with a dot, as the folder of a run that is replaced does."""
    return any(part.startswith(".") for part in path.parts)


def save_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    save_atomically(path, lambda file: _write_text(file, text))


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def recover(path: Path) -> None:
    """Repair what a crash left of `save_atomically(path)`: a temporary file, a replaced folder."""
    replaced = path.with_name(f".{path.name}{REPLACED}")
    if replaced.exists():
        if path.exists():
            _remove(replaced)
        else:
            replaced.rename(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY}"):
        writer = re.fullmatch(r".*\.(\d+)-\d+", left.name.removesuffix(TEMPORARY))
        if writer is None or not is_alive(int(writer[1])):
            _remove(left)


def remove_temporary(folder: Path) -> None:
    """Remove unfinished results of `save_atomically` calls directly in a folder, where no other
    process writes.
    """
    for path in list(folder.glob(f".*{REPLACED}")):
        recover(path.with_name(path.name[1 : -len(REPLACED)]))
    for path in list(folder.glob(f".*{TEMPORARY}")):
        _remove(path)


def _replace_folder(new: Path, path: Path) -> None:
    """Replace the folder `path` by `new`; the path exists at every moment."""
    if _exchange(new, path):
        _remove(new)
        return
    # A filesystem without an atomic exchange: `recover` repairs a crash between the two renames.
    replaced = path.with_name(f".{path.name}{REPLACED}")
    _remove(replaced)
    path.rename(replaced)
    try:
        new.rename(path)
    except OSError:
        replaced.rename(path)
        raise
    _remove(replaced)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step; False if the system does not support it."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done = rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    return bool(done == 0)


def _settle(path: Path) -> None:
    """Give a new file or folder the umask's permissions and flush it to disk."""
    umask = os.umask(0o077)
    os.umask(umask)
    for root, _, names in os.walk(path) if path.is_dir() else ():
        for name in names:
            os.chmod(Path(root) / name, 0o666 & ~umask)
            _sync(Path(root) / name)
        os.chmod(root, 0o777 & ~umask)
        _sync(Path(root))
    if path.is_file():
        os.chmod(path, 0o666 & ~umask)
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _link(path: Path, file: Path) -> None:
    """A second name for a file, or a copy if the filesystem has no hard links."""
    try:
        os.link(path, file)
    except OSError:
        shutil.copyfile(path, file)
