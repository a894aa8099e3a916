"""A new `native_mtp` head begins as the MTP layer of its checkpoint, where that has one."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import modeling_layers
from transformers.utils import cached_file

from ..common.errors import read_json
from ..modeling.native_mtp import NativeMTPHead


@torch.no_grad()
def start_from_native(model: Any, source: str) -> None:
    """Copy the first MTP layer of a checkpoint, a folder or a hub id, into main's new head.

    Nothing is done for a head of another type, and for a checkpoint without such a layer.

    Raises RuntimeError for a checkpoint that has a part of the layer.
    """
    head = model.mtp_head
    if not isinstance(head, NativeMTPHead):
        return
    known = modeling_layers.MtpModel.get_mtp_weights_regex(model)
    if not any(known.search(name) for name in weight_names(source)):
        return
    native = modeling_layers.MtpModel.from_pretrained(model)
    head.layer.load_state_dict(native.layers[0].state_dict())


def weight_names(source: str) -> list[str]:
    """Names of the weights of a checkpoint in safetensors files; none for other files."""
    given = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(source, "model.safetensors.index.json", **given)
    if index is not None:
        return list(read_json(Path(index))["weight_map"])
    single = cached_file(source, "model.safetensors", **given)
    if single is None:
        return []
    with safe_open(single, framework="pt") as file:
        return list(file.keys())
