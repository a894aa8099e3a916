"""Crash-safe checkpoints that detect their own damage.

A checkpoint is one safetensors file. Its tensors are the model's and the optimizers'; everything
else is JSON in the file's header, so reading one cannot run code. The header also holds the SHA-256
of the file, computed with the digest itself set to zeros.

`checkpoints/step_<global step>.safetensors` holds the state within a stage or at its end. The last
two are kept, and `checkpoints/best.safetensors` is the one with the best accuracy of the current
stage. `stages/<name>/` is the model at the end of a stage, in Hugging Face's layout; later stages
read their frozen references from there.
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..common.files import TEMPORARY, _link, _remove, save_atomically

FORMAT = "mtp-checkpoint-1"
SUFFIX = ".safetensors"
BEST = "best"

_NO_DIGEST = "0" * 64


def save_checkpoint(folder: Path, global_step: int, state: dict[str, Any], is_best: bool) -> Path:
    """Write a checkpoint into `folder` and remove all but the last two and the best.

    Args:
        folder: the run's `checkpoints/`.
        global_step: names the file; a checkpoint of the same step is replaced.
        state: a tree of dicts, lists and tuples whose leaves are tensors, numbers, text or None.
        is_best: also keep it as `best`.
    """
    path, best = path_of(folder, global_step), folder / f"{BEST}{SUFFIX}"
    if is_best:  # first, since the step's state says that its accuracy is the best so far
        save_atomically(best, lambda file: write_state(file, state))
        save_atomically(path, lambda file: _link(best, file))
    else:
        save_atomically(path, lambda file: write_state(file, state))
    for old in checkpoints(folder)[:-2]:
        old.unlink()
    return path


def path_of(folder: Path, global_step: int) -> Path:
    """Path of the checkpoint of a step."""
    return folder / f"step_{global_step:08d}{SUFFIX}"


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints sorted by global step, without the best."""
    return sorted(folder.glob(f"step_*{SUFFIX}"))


def continue_from(checkpoint: Path, global_step: int) -> None:
    """Make the checkpoint that a run continues from, of this step, the last one of its folder."""
    folder, last = checkpoint.parent, path_of(checkpoint.parent, global_step)
    if checkpoint != last:  # the best one, whose step may be gone
        save_atomically(last, lambda file: _link(checkpoint, file))
    for path in checkpoints(folder):
        if path > last:
            path.unlink()


def choose_checkpoint(folder: Path, resume: bool | str) -> Path | None:
    """The checkpoint that `resume` names: `true` and `auto` the last, else a file's name.

    None if `auto` finds none. Raises ValueError if the named one is missing or damaged; the error
    offers an earlier one.
    """
    for path in list(folder.glob(f".*{TEMPORARY}")):
        _remove(path)
    found = checkpoints(folder)
    if resume in (True, "auto"):
        if not found:
            _check_missing(folder, resume)
            return None
        path = found[-1]
    else:
        path = folder / f"{str(resume).removesuffix(SUFFIX)}{SUFFIX}"
        if not path.is_file():
            names = [p.stem for p in (*found, *folder.glob(f"{BEST}{SUFFIX}"))]
            raise ValueError(
                f"resume must be true, false, auto or a checkpoint in {folder} "
                f"({', '.join(names) or 'it holds none'}), got {resume!r}"
            )
    damage = damage_of(path)
    if damage is not None:
        others = [p for p in reversed(found) if p != path] + list(folder.glob(f"{BEST}{SUFFIX}"))
        good = next((p for p in others if p != path and damage_of(p) is None), None)
        remedy = (
            "no other checkpoint is whole; use overwrite=true to start again"
            if good is None
            else f"use resume={good.stem} to continue from {_where(good)}"
        )
        raise ValueError(f"checkpoint {path} is damaged ({damage}); {remedy}")
    return path


def _where(path: Path) -> str:
    progress = read_state(path)["progress"]
    return f"step {progress['step']} of stage {progress['stage'] + 1}"


def _check_missing(folder: Path, resume: bool | str) -> None:
    """Raises ValueError unless a missing checkpoint is correct."""
    if (folder / "last.ckpt").is_file():
        raise ValueError(
            f"{folder / 'last.ckpt'} was written by an earlier version of mtp as a pickle, which "
            "can run code when it is read, so it is not opened; use overwrite=true to start "
            "again, or model.source=<run>/stages/<name> to begin from a finished stage"
        )
    if resume is True:
        raise ValueError(
            f"resume=true needs a checkpoint in {folder}, which holds none; start the run without "
            "resume, or use resume=auto"
        )


def write_state(file: Path, state: dict[str, Any]) -> None:
    """Write a state as safetensors with its own checksum in the header."""
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "", tensors, {})
    metadata = {"format": FORMAT, "sha256": _NO_DIGEST, "state": json.dumps(tree)}
    save_file(tensors, file, metadata=metadata)
    at, digest = _digest(file)
    with file.open("r+b") as out:
        out.seek(at)
        out.write(digest.encode())


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint whose `damage_of` is None, on the CPU."""
    with safe_open(path, framework="pt", device="cpu") as file:
        tree = json.loads(file.metadata()["state"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = _unpack(tree, tensors)
    assert isinstance(state, dict)
    return state


def damage_of(path: Path) -> str | None:
    """Description of a checkpoint's damage; None if every byte is as it was written."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        return f"it cannot be read: {str(error).splitlines()[0]}"
    if metadata.get("format") != FORMAT:
        return f"its format is {metadata.get('format')!r}, expected {FORMAT!r}"
    try:
        _, digest = _digest(path)
    except ValueError as error:
        return str(error)
    if digest != metadata.get("sha256"):
        return "its checksum differs from its content"
    return None


def _digest(path: Path) -> tuple[int, str]:
    """Position of the digest in the header, and the SHA-256 of the file with it set to zeros."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = file.read(8)
        header = file.read(struct.unpack("<Q", size)[0])
        key = b'"sha256":"'
        begin = header.find(key) + len(key)
        if begin < len(key):
            raise ValueError("its header holds no checksum")
        end = begin + len(_NO_DIGEST)
        digest.update(size + header[:begin] + _NO_DIGEST.encode() + header[end:])
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return 8 + begin, digest.hexdigest()


def _pack(node: Any, name: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> Any:
    """The node as JSON; its tensors are added to `tensors`, shared ones only once."""
    if isinstance(node, Tensor):
        where = (node.data_ptr(), node.shape, node.stride(), node.dtype)
        if node.numel() == 0 or where not in seen:
            seen[where] = name
            own = node.detach().to("cpu").contiguous()
            # safetensors refuses tensors that share memory, such as a part of another one.
            memory = own.untyped_storage()
            place = ("memory", memory.data_ptr())
            is_shared = place in seen or memory.nbytes() != own.numel() * own.element_size()
            seen[place] = name
            tensors[name] = own.clone() if is_shared else own
        return {"tensor": seen[where]}
    if isinstance(node, dict):
        items = [[k, _pack(v, f"{name}/{k}", tensors, seen)] for k, v in node.items()]
        return {"dict": items}
    if isinstance(node, list | tuple):
        items = [_pack(v, f"{name}/{i}", tensors, seen) for i, v in enumerate(node)]
        return {"tuple": items} if isinstance(node, tuple) else items
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(f"a checkpoint cannot hold {type(node).__name__} (at {name})")


def _unpack(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_unpack(value, tensors) for value in node]
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unpack(value, tensors) for value in content)
    return {key: _unpack(value, tensors) for key, value in content}
