"""`mtp doctor`: what this machine and environment can do, what would be slow, and why.

Each check gives findings of one of four levels:

    ok      as it should be
    note    worth knowing, such as a sink that is not installed
    slow    works, but slower than it could; the finding says why
    broken  a run would fail; the command then ends with exit code 1

Left out: timings (`benchmarks/`) and the network.
"""

import argparse
import importlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

GIB = 2**30
DISTRIBUTION = "mtp-eavesdrop"
IMPORTED = ("torch", "transformers", "lightning.fabric", "hydra", "datasets", "mtp_kernels")
"""Modules that a run imports."""
NEWEST_TESTED = {"torch": "2.13", "triton": "3.7", "transformers": "5.23"}
"""Newest versions that all tests run with, of the libraries that change the most."""
LITTLE_DISK = 1 * GIB
SCARCE_DISK = 20 * GIB
"""Bytes free below which checkpoints of a tiny model, or of a small pretrained one, may not fit."""
LITTLE_MEMORY = 4 * GIB
LITTLE_SHARED = 1 * GIB
NETWORK = ("nfs", "nfs4", "lustre", "cifs", "smb3", "fuse.sshfs", "9p", "beegfs", "gpfs")
"""File systems on which flushing a checkpoint to disk takes long."""

Level = Literal["ok", "note", "slow", "broken"]
STYLES: dict[Level, str] = {"ok": "green", "note": "blue", "slow": "yellow", "broken": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    topic: str
    text: str


def add_doctor(commands: Any) -> None:
    """Add the command to those of `mtp`."""
    text = "check this machine and environment: what works, and what would be slow"
    sub = commands.add_parser("doctor", help=text, description=f"{text}.")
    sub.set_defaults(run=doctor)
    sub.add_argument("--json", action="store_true", help="print a JSON list")
    sub.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="folder that runs are written to; default: runs",
    )


def doctor(arguments: argparse.Namespace) -> int:
    """`mtp doctor`; the exit code is 1 if something is broken."""
    findings = list(examine(arguments.runs))
    if arguments.json:
        import json

        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        show(findings)
    return int(any(finding.level == "broken" for finding in findings))


def show(findings: list[Finding]) -> None:
    """Print the findings and a line that sums them up."""
    from rich.table import Table
    from rich.text import Text

    from ..reports.progress import make_console

    console = make_console()
    if console.is_terminal:
        table = Table.grid(padding=(0, 2))
        for one in findings:
            table.add_row(Text(one.level, style=STYLES[one.level]), one.topic, Text(one.text))
        console.print(table)
    else:
        for one in findings:
            print(f"{one.level:<8}{one.topic:<15}{one.text}")
    number = {level: sum(one.level == level for one in findings) for level in STYLES}
    broken = f"{number['broken']} broken" if number["broken"] else "nothing is broken"
    console.print(f"{broken}; {number['slow']} slow")


def examine(runs: Path) -> Iterator[Finding]:
    """All findings. A check that fails itself is a finding too."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("packages", packages),
        ("imports", imports),
        ("processor", processor),
        ("GPU", gpu),
        ("kernels", kernels),
        ("writing", lambda: writing(runs)),
        ("disk", lambda: disk(runs)),
        ("memory", memory),
        ("shared memory", shared_memory),
        ("Slurm", slurm),
        ("hub", hub),
    ]
    for topic, check in checks:
        try:
            yield from check()
        except Exception as error:  # whatever it is, it is what the user wants to know
            yield Finding("broken", topic, first_line(error))


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def packages() -> Iterator[Finding]:
    """Python and the packages that mtp declares, against the versions that it asks for."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    yield Finding("ok", "Python", f"{platform.python_version()}, {sys.executable}")
    try:
        declared = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        text = f"{DISTRIBUTION} is not installed, so versions are not checked; pip install ."
        yield Finding("note", "packages", text)
        return
    shown = [f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}"]
    extras: dict[str, list[str]] = {}
    for one in declared:
        in_extra = extra_of(one)
        if one.marker and not one.marker.evaluate({"extra": in_extra}):
            continue
        version = installed(one.name)
        fits = version is not None and one.specifier.contains(version, prereleases=True)
        if in_extra:
            if not fits:
                extras.setdefault(in_extra, []).append(one.name)
        elif version is None:
            text = f"{one.name} is not installed; pip install '{one.name}{one.specifier}'"
            yield Finding("broken", "packages", text)
        elif not fits:
            text = f"{one.name} must be {one.specifier}, got {version}; "
            text += f"pip install '{one.name}{one.specifier}'"
            yield Finding("broken", "packages", text)
        else:
            shown.append(f"{one.name} {version}")
            newest = NEWEST_TESTED.get(one.name)
            if newest and Version(str(version)).release[:2] > Version(newest).release:
                text = f"{one.name} {version} is newer than all that mtp was tested with; if "
                text += f"something fails, pip install '{one.name}=={newest}.*' (docs/stacks.md)"
                yield Finding("note", "packages", text)
    yield Finding("ok", "packages", ", ".join(shown))
    for extra, missing in extras.items():
        if extra != "dev":
            text = f"[{extra}] is not installed: {', '.join(missing)} missing; "
            yield Finding("note", "extras", text + f"pip install '{DISTRIBUTION}[{extra}]'")


def extra_of(requirement: Any) -> str:
    """The extra of mtp that asks for a package; empty if mtp itself does."""
    marker = requirement.marker
    if marker is None or marker.evaluate({"extra": ""}):
        return ""
    extras = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    return next((extra for extra in extras if marker.evaluate({"extra": extra})), "")


def installed(name: str) -> str | None:
    """Version of a package; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def imports() -> Iterator[Finding]:
    """The modules of a run, imported one after the other."""
    failed = False
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:
            failed = True
            yield Finding("broken", "imports", f"{name}: {first_line(error)}")
    if not failed:
        yield Finding("ok", "imports", ", ".join(IMPORTED))


def processor() -> Iterator[Finding]:
    """Cores, threads and vector instructions."""
    import torch

    from ..training.runtime import cpu_has_bfloat16

    usable, threads = usable_cores(), torch.get_num_threads()
    vector = torch.backends.cpu.get_cpu_capability()
    text = f"{usable:g} of {os.cpu_count()} cores, threads: {threads}, {vector}"
    if not cpu_has_bfloat16():
        text += ", no bfloat16 (fabric.precision=32-true is faster)"
    if threads > max(1, usable):
        text += (
            f": more threads than cores wait for each other; set fabric.num_threads={usable:.0f}"
        )
        yield Finding("slow", "processor", text)
    elif threads < int(usable) and "OMP_NUM_THREADS" in os.environ:
        text += f": OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} leaves cores unused"
        yield Finding("slow", "processor", text)
    elif vector == "DEFAULT":
        yield Finding("slow", "processor", text + ": no vector instructions that torch uses")
    else:
        yield Finding("ok", "processor", text)


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Cores that this process may use: its affinity, or the quota of its container if less."""
    try:
        cores = float(len(os.sched_getaffinity(0)))
    except AttributeError:  # not Linux
        cores = float(os.cpu_count() or 1)
    try:
        quota, period = cgroup.read_text().split()
        return cores if quota == "max" else min(cores, int(quota) / int(period))
    except (OSError, ValueError):
        return cores


def gpu() -> Iterator[Finding]:
    """The devices that torch can use, or why it can use none."""
    import torch

    if not torch.cuda.is_available():
        yield no_gpu(torch.__version__, torch.version.cuda, Path("/dev/nvidia0").exists())
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        text = f"{about.name}, {about.total_memory / GIB:.0f} GiB, {about.major}.{about.minor}"
        if torch.cuda.is_bf16_supported():
            yield Finding("ok", "GPU", text + ", bfloat16: fabric.precision=bf16-mixed")
        else:
            yield Finding("slow", "GPU", text + ": without bfloat16 a run needs 32-true")


def no_gpu(version: str, cuda: str | None, has_device: bool) -> Finding:
    """Finding where torch can use no GPU. cuda: the version that torch was built for."""
    if has_device and cuda is None:
        text = f"there is a GPU, but torch {version} was built without CUDA; install torch with it"
    elif has_device:
        text = f"there is a GPU, but its driver does not fit CUDA {cuda}; update the driver"
    else:
        text = "none: tiny models train in minutes on a CPU, pretrained ones take days"
    return Finding("slow", "GPU", text)


def kernels() -> Iterator[Finding]:
    """The output-layer kernels that `kernels: auto` chooses, run once against their definition."""
    import torch
    from mtp_kernels import linear_loss
    from mtp_kernels.dispatch import (
        TRITON_INSTALLED,
        compiler_found,
        resolve_impl,
        triton_interpreted,
    )

    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    generator = torch.Generator().manual_seed(0)
    # Large enough for the kernels: smaller problems run as plain PyTorch.
    hidden = torch.randn(300, 32, generator=generator).to(device)
    weight = torch.randn(32000, 32, generator=generator).to(device)
    target = torch.randint(32000, (300,), generator=generator).to(device)
    impl = resolve_impl("auto", hidden)
    try:
        found = float(linear_loss(hidden, weight, target).loss)
    except Exception as error:
        hint = "; Triton needs a C compiler and Python's headers" if impl == "triton" else ""
        yield Finding("broken", "kernels", f"{impl} on {device}: {first_line(error)}{hint}")
    else:
        expected = float(linear_loss(hidden, weight, target, impl="reference").loss)
        if abs(found - expected) > 1e-3 * abs(expected):
            text = f"{impl} on {device} gives a loss of {found:.6g}, expected {expected:.6g}"
            yield Finding("broken", "kernels", f"{text}; set kernels=torch")
        else:
            yield Finding("ok", "kernels", f"kernels=auto is {impl} on {device}, values checked")
    if has_gpu and not TRITON_INSTALLED:
        yield Finding("slow", "Triton", "not installed, so the GPU runs plain torch kernels")
    elif triton_interpreted():
        text = "TRITON_INTERPRET=1 is set: Triton's kernels run in its interpreter"
        yield Finding("slow" if has_gpu else "note", "Triton", text)
    elif TRITON_INSTALLED:
        text = f"{installed('triton') or 'installed'}" + ("" if has_gpu else ", not used on a CPU")
        yield Finding("ok", "Triton", text)
    if compiler_found():
        named = next(c for c in (os.environ.get("CXX", "g++"), "clang++", "c++") if shutil.which(c))
        yield Finding("ok", "compiler", str(shutil.which(named)))
    else:
        text = "no C++ compiler: output layers of large vocabularies run uncompiled; install g++"
        yield Finding("slow", "compiler", text)


def writing(runs: Path) -> Iterator[Finding]:
    """Folders that a run writes to, and the caches of its libraries."""
    from huggingface_hub import constants

    from ..training.runtime import check_writable

    try:
        check_writable(runs, "--runs")
    except ValueError as error:
        yield Finding("broken", "writing", str(error))
    else:
        yield Finding("ok", "writing", f"{runs.resolve()} can be written")
    home = Path.home()
    caches = {
        "models (HF_HOME)": (Path(constants.HF_HUB_CACHE), "models cannot be downloaded"),
        "Triton (TRITON_CACHE_DIR)": (
            Path(os.environ.get("TRITON_CACHE_DIR", home / ".triton")),
            "kernels are compiled again at each start",
        ),
    }
    for name, (folder, meaning) in caches.items():
        try:
            check_writable(folder, name)
        except ValueError as error:
            yield Finding("slow", "cache", f"{error}: {meaning}")


def disk(runs: Path, mounts: Path = Path("/proc/mounts")) -> Iterator[Finding]:
    """Free space where runs are written, and the kind of file system."""
    place = existing(runs)
    free = shutil.disk_usage(place).free
    text = f"{free / GIB:.1f} GiB free at {place}"
    if free < LITTLE_DISK:
        yield Finding("broken", "disk", text + ": too little for checkpoints; free some")
    elif free < SCARCE_DISK:
        text += ": a run keeps three checkpoints, each three times its weights"
        yield Finding("note", "disk", text)
    else:
        yield Finding("ok", "disk", text)
    kind = file_system(place, mounts)
    if kind in NETWORK:
        text = f"{place} is on {kind}: each checkpoint waits for the network"
        yield Finding("slow", "disk", text + "; raise checkpoint_minutes if they are large")


def existing(path: Path) -> Path:
    """The path, or its first parent that exists."""
    path = path.resolve()
    return next(p for p in (path, *path.parents) if p.exists())


def file_system(path: Path, mounts: Path) -> str | None:
    """Kind of the file system that holds a path; None if it is not known."""
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return None
    holding = [(len(at), kind) for _, at, kind, *_ in lines if path.is_relative_to(at)]
    return max(holding)[1] if holding else None


def memory(
    meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")
) -> Iterator[Finding]:
    """Memory that is available, within the limit of a container."""
    try:
        values = dict(line.split(":") for line in meminfo.read_text().splitlines())
        total, left = (int(values[k].split()[0]) * 1024 for k in ("MemTotal", "MemAvailable"))
    except (OSError, ValueError, KeyError):
        yield Finding("note", "memory", "not known on this system")
        return
    text = f"{left / GIB:.1f} of {total / GIB:.1f} GiB available"
    try:
        most = int(limit.read_text())
    except (OSError, ValueError):
        most = total
    if most < total:
        text, left = f"{text}, limited to {most / GIB:.1f} GiB", min(left, most)
    if left < LITTLE_MEMORY:
        text += ": enough for tiny models; lower batch_size if a process is killed"
        yield Finding("note", "memory", text)
    else:
        yield Finding("ok", "memory", text)


def shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Shared memory, through which the processes of one machine exchange gradients."""
    if not folder.is_dir():
        yield Finding("note", "shared memory", f"{folder} does not exist")
        return
    size = shutil.disk_usage(folder).total
    text = f"{size / GIB:.2f} GiB at {folder}"
    if size < LITTLE_SHARED:
        text += ": several processes need more; docker run --shm-size=8g"
        yield Finding("note", "shared memory", text)
    else:
        yield Finding("ok", "shared memory", text)


def slurm() -> Iterator[Finding]:
    """Slurm, and the launchers of `sweep=`."""
    launchers = find_spec("hydra_plugins") is not None and all(
        find_spec(f"hydra_plugins.hydra_{name}_launcher") for name in ("submitit", "joblib")
    )
    job = os.environ.get("SLURM_JOB_ID")
    command = shutil.which("sbatch")
    if command is None:
        text = "no sbatch here; sweeps run on this machine"
        yield Finding("note", "Slurm", text + (f" (job {job})" if job else ""))
        return
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=30)
    text = done.stdout.strip() or command
    text += f", in job {job}" if job else ""
    if launchers:
        yield Finding("ok", "Slurm", text + ", sweep=submitit_slurm")
    else:
        text += f"; sweep=submitit_slurm needs pip install '{DISTRIBUTION}[sweep]'"
        yield Finding("note", "Slurm", text)


def hub() -> Iterator[Finding]:
    """Access to the Hugging Face Hub, as far as the environment decides it."""
    offline = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name)]
    if offline:
        text = f"{' and '.join(offline)} set: models must be in the cache"
        yield Finding("note", "hub", text)
