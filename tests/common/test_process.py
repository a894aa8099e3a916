"""The end of a command: exit codes, one line, and quietly for Ctrl-C, closed streams and pipes."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import config, tiny_model

import mtp.trainer as trainer
from mtp.common.errors import in_quotes, one_line, reading
from mtp.common.process import run_command
from mtp.rollouts.new_tokenizers import character_tokenizer
from mtp.training.runtime import NotFinite, check_writable, naming_what_is_not_finite

ROOT = Path(__file__).parents[2]


def raiser(error: BaseException):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("seed must be 1"), 2, "error: seed must be 1\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
        (OSError(errno.ENOSPC, "No space left", "a/b"), 2, "error: a/b: No space left\n"),
        (MemoryError(), 2, "error: there is not enough memory (MemoryError); lower batch_size, "),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            2,
            "error: there is not enough memory",
        ),
        (ModuleNotFoundError("no", name="wandb.x"), 2, "error: the package wandb is not installed"),
    ],
)
def test_a_command_ends_with_a_code_and_at_most_one_line(monkeypatch, capsys, error, code, said):
    monkeypatch.setattr("mtp.common.errors.OURS", ("test_process",))
    before = signal.getsignal(signal.SIGINT)
    assert run_command(raiser(error)) == code
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == bool(said)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("a"), ValueError("theirs")])
def test_what_is_unexpected_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_command(raiser(error))


def test_a_mistakes_traceback_is_shown_on_request(monkeypatch):
    monkeypatch.setenv("MTP_TRACEBACK", "1")
    with pytest.raises(OSError, match="full"):
        run_command(raiser(OSError("full")))


def test_an_error_that_a_library_makes_of_ctrl_c_is_quiet(capsys):
    def command():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ImportError("numpy could not be imported") from None

    assert run_command(command) == 130
    assert capsys.readouterr().err == ""


def test_text_in_another_encoding_is_one_line(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError) as caught:
        (tmp_path / "a").read_text(encoding="utf-8")
    assert "text that is not utf-8 was read" in (one_line(caught.value) or "")
    with pytest.raises(UnicodeEncodeError) as written:
        "2é".encode("ascii")
    line = one_line(written.value)
    assert line == "the encoding ascii cannot write '\\xe9'; set PYTHONIOENCODING=utf-8"


def test_ctrl_c_is_quiet_while_the_libraries_are_imported():
    command = [sys.executable, "-c", "import runpy; print(1, flush=True); " + RUN_TRAIN]
    job = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert job.stdout is not None and job.stdout.readline() == "1\n"
    time.sleep(0.4)
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 130 and said == ""


RUN_TRAIN = "runpy.run_path('train.py', run_name='__main__')"


def test_a_full_or_missing_disk_is_found_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "build_model", None)
    (tmp_path / "file").write_text("mine")
    for folder, reason in (
        ("/dev/null", "not a folder"),
        (tmp_path / "file" / "a" / "b", "not a folder"),
        (tmp_path / ("x" * 300) / "a", "a name in it is too long"),
    ):
        with pytest.raises(ValueError, match=f"^run_dir={folder} cannot be written: {reason} "):
            trainer.train(config(Path(folder)))

    def full(**given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(ValueError, match="^run_dir=.* cannot be written: No space left on device"):
        trainer.train(config(tmp_path / "new" / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_writable_folder_is_left_as_it_was(tmp_path):
    check_writable(tmp_path / "a" / "b", "run_dir")
    check_writable(tmp_path, "run_dir")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_within_a_step_pass_and_a_gradient_gets_its_place():
    model = tiny_model()
    with pytest.raises(RuntimeError, match="^of another kind$"):  # noqa: SIM117
        with naming_what_is_not_finite(model, lambda: "stage x, step 1"):
            raise RuntimeError("of another kind")
    with pytest.raises(NotFinite, match="^stage x, step 1: the gradient is; lower"):  # noqa: SIM117
        with naming_what_is_not_finite(model, lambda: "stage x, step 1"):
            raise NotFinite("the gradient is")


@pytest.mark.parametrize("delimiter", ["<eos>", "<pad>", "7", ""])
def test_a_delimiter_is_a_token_of_its_own(delimiter):
    with pytest.raises(ValueError, match=f"delimiter '{delimiter}' must be a token of its own"):
        character_tokenizer("0123456789", ["<think>", delimiter])


@pytest.mark.parametrize("text", ["a", 'a"b', 'a\\"b', "a\\", "it's", "a=b, [x] {y}", '"', "${x}"])
def test_quotes_make_any_text_a_value(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(f"key={in_quotes(text)}")
    assert parsed.value() == text


def test_a_damaged_file_is_named_whatever_the_library_raises():
    with pytest.raises(ValueError, match=r"^runs/a could not be read: 'model'$"):  # noqa: SIM117
        with reading("runs/a"):
            {}["model"]  # noqa: B018
    with pytest.raises(MemoryError):  # noqa: SIM117
        with reading("runs/a"):
            raise MemoryError
