"""Files and folders that are replaced in one step."""

import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from runs import content
from safetensors.torch import save_file

from mtp.common.errors import one_line
from mtp.common.files import save_atomically


def test_a_replaced_folder_is_always_there(tmp_path):
    """Another process looks for the folder while it is replaced many times."""
    target = tmp_path / "out"

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "file").write_text("x" * 100)

    save_atomically(target, write)
    code = (
        "import os, sys, time\n"
        "print('looking', flush=True)\n"
        "end = time.monotonic() + 2\n"
        "print(sum(not os.path.isdir(sys.argv[1]) for _ in iter(lambda: time.monotonic() < end, "
        "False)))"
    )
    watcher = subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True
    )
    assert watcher.stdout is not None and watcher.stdout.readline() == "looking\n"
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        save_atomically(target, write)
    assert watcher.communicate()[0].strip() == "0"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_whose_replacement_was_cut_short_is_put_back(tmp_path, monkeypatch):
    """If names cannot be exchanged in one step, a crash between two renames is repaired."""
    import mtp.common.files as files

    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    target = tmp_path / "out"

    def write(text: str):
        def make(folder: Path) -> None:
            folder.mkdir()
            (folder / "file").write_text(text)

        return make

    save_atomically(target, write("old"))
    target.rename(tmp_path / ".out.mtp-old")  # as a crash between the renames leaves it
    (tmp_path / ".out.mtp-tmp").mkdir()
    files.remove_temporary(tmp_path)
    assert content(tmp_path) == {"out/file": b"old"}
    save_atomically(target, write("new"))
    assert content(tmp_path) == {"out/file": b"new"}


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "a.txt"

    def write(text: str) -> None:
        for _ in range(50):
            save_atomically(path, lambda file: file.write_text(text))

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, ("one", "two", "three")))
    assert content(tmp_path) in [{"a.txt": text} for text in (b"one", b"two", b"three")]


def test_what_a_dead_writer_left_is_removed(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          stdout=subprocess.PIPE, text=True)  # fmt: skip
    (tmp_path / f".a.txt.{dead.stdout.strip()}-1.mtp-tmp").write_text("half")
    (tmp_path / f".b.txt.{dead.stdout.strip()}-1.mtp-tmp").write_text("half")
    save_atomically(tmp_path / "a.txt", lambda file: file.write_text("new"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [
        f".b.txt.{dead.stdout.strip()}-1.mtp-tmp"
    ]


def test_a_file_beside_an_export_is_left_alone(tmp_path):
    for name in ("out.tmp", "out.old"):
        (tmp_path / name).write_text("mine")
    save_atomically(tmp_path / "out", lambda file: file.write_text("new"))
    assert content(tmp_path) == {"out": b"new", "out.old": b"mine", "out.tmp": b"mine"}


def test_a_full_disk_names_the_file_whichever_library_writes(tmp_path):
    """Made by a limit on the size of files; safetensors has errors of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "a.safetensors"
    path.write_text("earlier")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError) as raised:
            save_atomically(path, lambda file: save_file({"w": torch.ones(1000)}, file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert one_line(raised.value) == f"{path}: File too large"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "earlier"
