"""Files of a checkpoint's weights: main's where every loader looks, the head's in a folder below.

    model.safetensors                       main; a large one is in several files, with their index
    mtp_head/model.safetensors              the head
    mtp_head/whole.safetensors.index.json   the file of each weight of both

A loader that knows main's family reads the files beside config.json and finds main alone, so one
that accepts no unknown weight, as vLLM's, opens the folder. The classes of this library read the
index. Earlier versions wrote all weights beside config.json; such a folder opens too.

Ships with checkpoints: imports torch, transformers and siblings only.
"""

import json
from copy import copy
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

HEAD = "mtp_head."
"""Prefix of the names of the head's weights."""
HEAD_FOLDER = "mtp_head"
HEAD_FILE = f"{HEAD_FOLDER}/model.safetensors"
INDEX = f"{HEAD_FOLDER}/whole.safetensors.index.json"

OF_THE_HUB = (
    *("cache_dir", "force_download", "proxies"),
    *("local_files_only", "token", "revision", "subfolder"),
)
"""Arguments of `from_pretrained` that say where files are."""


def stock_class(cls: type) -> type:
    """The class of transformers for main alone, of which a class with a head is derived."""
    return next(
        base
        for base in cls.__mro__
        if issubclass(base, PreTrainedModel) and not issubclass(base, MTPFilesMixin)
    )


class MTPFilesMixin:
    """`from_pretrained` and `save_pretrained` of a model with a head."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Transformers' `from_pretrained`, with the head's weights from their own folder."""
        source, index = pretrained_model_name_or_path, None
        where = {name: kwargs[name] for name in OF_THE_HUB if kwargs.get(name) is not None}
        if source is not None and kwargs.get("gguf_file") is None:
            index = cached_file(
                source,
                INDEX,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                **where,
            )
        opened: Any = super()
        if index is None:
            return opened.from_pretrained(source, *args, config=config, **kwargs)
        if not isinstance(config, PretrainedConfig):
            dtypes = {n: kwargs.pop(n) for n in ("dtype", "torch_dtype") if n in kwargs}
            config, kwargs = cls.config_class.from_pretrained(  # type: ignore[attr-defined]
                source if config is None else config, return_unused_kwargs=True, **kwargs
            )
            kwargs |= where | dtypes
        config = copy(config)
        config.transformers_weights = INDEX  # the name that transformers reads
        out = opened.from_pretrained(source, *args, config=config, **kwargs)
        model = out[0] if isinstance(out, tuple) else out
        del model.config.transformers_weights
        return out

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Transformers' `save_pretrained`, with the head's weights in their own folder.

        config.json names the stock class of main, which every tool knows; `auto_map` names this one
        if the code lies beside it. Adapters and quantized weights are saved as transformers does.
        """
        model: Any = self
        save: Any = super().save_pretrained  # type: ignore[misc]
        options = {"is_main_process": is_main_process, **kwargs}
        if (
            getattr(model, "_hf_peft_config_loaded", False)
            or getattr(model, "hf_quantizer", None) is not None
            or kwargs.get("distributed_checkpoint")
        ):
            save(save_directory, state_dict=state_dict, push_to_hub=push_to_hub, **options)
            return
        if push_to_hub:
            raise ValueError(
                "push_to_hub must be False in save_pretrained, which would upload main without its "
                "head; use model.push_to_hub(repo_id)"
            )
        weights = model.state_dict() if state_dict is None else state_dict
        main = {name: weight for name, weight in weights.items() if not name.startswith(HEAD)}
        save(save_directory, state_dict=main, **options)
        if not is_main_process:
            return
        folder = Path(save_directory)
        head = {name: w.contiguous() for name, w in weights.items() if name.startswith(HEAD)}
        if head:
            (folder / HEAD_FOLDER).mkdir(exist_ok=True)
            save_file(head, folder / HEAD_FILE, metadata={"format": "pt"})
            places = _places_of_main(folder) | dict.fromkeys(head, HEAD_FILE)
            size = sum(w.numel() * w.element_size() for w in weights.values())
            _write(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["architectures"] = [stock_class(type(self)).__name__]
        if not model.is_remote_code():
            config.pop("auto_map", None)
        _write(folder / "config.json", config)


def _places_of_main(folder: Path) -> dict[str, str]:
    """The file of each of main's weights."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return places
    name = "model.safetensors"
    with safe_open(folder / name, framework="pt") as file:
        return dict.fromkeys(file.keys(), name)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
