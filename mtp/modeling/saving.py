"""The files of a checkpoint: main's weights as its family has them, the head's in a file apart.

    model.safetensors, or shards and their index      main alone
    mtp_head/model.safetensors                        the head
    model.safetensors.index.mtp.json                  an index of both

Loaders of the family open main and find nothing that they do not know. transformers calls the
second index a `variant` of the checkpoint; `from_pretrained` here asks for it where it is there.
Checkpoints with the head among main's weights open too.

Ships with checkpoints: imports torch, transformers and safetensors only.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file

from .contract import stock_class
from .versions import remember_code

HEAD = "mtp_head."
"""Beginning of the names of the head's weights."""
HEAD_FILE = "mtp_head/model.safetensors"
VARIANT = "mtp"
INDEX = f"model.safetensors.index.{VARIANT}.json"
"""transformers' name of the index of a variant."""

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
"""Arguments of `from_pretrained` that say where a checkpoint's files are."""


class MTPFilesMixin:
    """`from_pretrained` and `save_pretrained` with the head in a file of its own."""

    _keys_to_ignore_on_save: Any

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, new_head: bool = False, **kwargs: Any
    ) -> Any:
        """transformers' `from_pretrained`.

        Args:
            pretrained_model_name_or_path: a folder or a hub id.
            args: as in transformers.
            new_head: the head may be missing; it is then initialised.
            kwargs: as in transformers.

        Raises ValueError if weights are missing, but for those of a `new_head`.
        """
        where = pretrained_model_name_or_path
        if kwargs.get("variant") is None and kwargs.get("gguf_file") is None and where is not None:
            options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
            found = cached_file(
                where,
                INDEX,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                **options,
            )
            if found is not None:
                kwargs["variant"] = VARIANT
        told = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(  # type: ignore[misc]
            where, *args, output_loading_info=True, **kwargs
        )
        missing = sorted(n for n in info["missing_keys"] if not (new_head and n.startswith(HEAD)))
        if missing and not told:
            of_head = missing[0].startswith(HEAD)
            whose = "the head's" if of_head else "main's"
            instead = "open main alone without trust_remote_code, or " if of_head else ""
            raise ValueError(
                f"{where} must hold {whose} weights, but {missing[0]} is missing (and "
                f"{len(missing) - 1} more); {instead}give the whole export, {HEAD_FILE} and "
                f"{INDEX} included"
            )
        remember_code(type(model))
        return (model, info) if told else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """transformers' `save_pretrained`; `config.json` names the stock class.

        A folder written by a model that was opened with `trust_remote_code=True` holds the code
        too, so it opens as it was opened. Raises ValueError for `push_to_hub`, which would upload
        before the head is written, and for `variant`, under which main would not be found.
        """
        if kwargs.get("variant") is not None:
            raise ValueError(
                f"variant must be left out of save_pretrained, got {kwargs['variant']!r}: loaders "
                f"find main and head by the variant {VARIANT!r}; choose the folder's name instead"
            )
        if push_to_hub:
            raise ValueError(
                "push_to_hub must be left out of save_pretrained, which writes the head last; "
                "upload the folder, as by huggingface_hub.upload_folder"
            )
        if getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(  # type: ignore[misc]
                save_directory, is_main_process, state_dict, **kwargs
            )
            return
        state = dict(self.state_dict() if state_dict is None else state_dict)  # type: ignore[attr-defined]
        head = {name: _whole(name, w) for name, w in state.items() if name.startswith(HEAD)}
        ignored = self._keys_to_ignore_on_save
        # Set on the model, because a quantizer makes the state anew.
        self._keys_to_ignore_on_save = [*(ignored or []), *head]
        try:
            super().save_pretrained(save_directory, is_main_process, state, **kwargs)  # type: ignore[misc]
        finally:
            self._keys_to_ignore_on_save = ignored
        if is_main_process:
            write_head(Path(save_directory), head, stock_class(type(self)).__name__)


def _whole(name: str, tensor: Any) -> Any:
    """A tensor on the CPU, gathered from all processes if it is sharded."""
    if tensor.is_meta:
        raise ValueError(f"{name} must be in memory to be saved; load the model without offloading")
    gather = getattr(tensor, "full_tensor", None)
    return (tensor if gather is None else gather()).detach().cpu().contiguous()


def write_head(folder: Path, head: dict[str, Any], architecture: str) -> None:
    """Write the head's file beside main's, the index of both, and the stock class's name."""
    path = folder / HEAD_FILE
    path.parent.mkdir(exist_ok=True)
    save_file(head, path, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map(folder)}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    config = folder / "config.json"
    content = json.loads(config.read_text()) | {"architectures": [architecture]}
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def weight_map(folder: Path) -> dict[str, str]:
    """The file of each weight: main's, and the head's."""
    index = folder / "model.safetensors.index.json"
    single = ["model.safetensors"]
    files = (
        sorted({*json.loads(index.read_text())["weight_map"].values()}) if index.is_file() else []
    )
    files = single if (folder / single[0]).is_file() else files
    found: dict[str, str] = {}
    for file in [*files, HEAD_FILE]:
        with safe_open(folder / file, framework="pt") as weights:
            found |= dict.fromkeys(weights.keys(), file)
    return found
