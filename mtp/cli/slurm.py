"""Jobs of a sweep on Slurm: a job that is asked to end, whenever that is, is queued again.

Slurm asks with a signal: SIGTERM when the job is preempted or requeued, SIGUSR2 before its time is
over. A run that trains saves a checkpoint after its step and ends with exit code 128 + signal. A
process that still starts has nothing to save: the signal ends it at once, and srun reports the same
code. In both cases the job's script, which gets no signal, queues the job again (`QUEUE_AGAIN`).

submitit has a handler of SIGUSR2, which counts how often a job has run out of time, and then queues
it again. Its handler of SIGTERM only prints a line. It is in place while Hydra composes the job's
config, so `note_signals` notes what comes in the meantime, and `end_if_asked` acts on it.
"""

import os
import signal

QUEUE_AGAIN = r"""
queue_again() {
  case $1 in $((128 + 10)) | $((128 + 12)) | $((128 + 15))) ;; *) exit "$1" ;; esac
  # A job that was cancelled or queued again by others is no longer running.
  [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ] || exit "$1"
  echo "the job has ended with code $1, by a signal, and is queued again" >&2
  scontrol requeue "$SLURM_JOB_ID"
  sleep 600 # until Slurm ends this script
}
trap 'queue_again $?' EXIT
""".strip()
"""Lines of a job's script before it starts its processes, for bash. Signals 10, 12 and 15 are
SIGUSR1, SIGUSR2 and SIGTERM."""


def is_job() -> bool:
    """True in a process that submitit has started on Slurm."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def note_signals() -> int:
    """From now on note every signal that has a handler. Returns the descriptor to read them from,
    a byte each.
    """
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader


def end_if_asked(noted: int) -> None:
    """Let SIGTERM end this process at once from now on, and now if it has come before.

    noted: what `note_signals` returned.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.close(signal.set_wakeup_fd(-1))
    with os.fdopen(noted, "rb", buffering=0) as reader:
        if signal.SIGTERM in (reader.read() or b""):
            signal.raise_signal(signal.SIGTERM)
