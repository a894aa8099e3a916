"""Main with its head as the MTP layer of its family, which transformers decodes (`use_mtp=True`).

The folder is that of `--format main`, with the layer among the weights under the names that the
family's own checkpoints have, and its number in config.json. There are two layouts:

    model.layers.61.*   the layer after main's last (DeepSeek-V3, GLM-4-MoE)
    mtp.*               (Mellum)

transformers knows an MTP layer by the names that main's class leaves out when it is opened. Those
of the first layout name one depth: 61 layers for DeepSeek-V3. A main of another depth is refused,
since transformers would not find the layer.
"""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import modeling_layers

from ...modeling.contract import stock_class
from ...modeling.native_mtp import NUM_LAYERS, NativeMTPHead, with_mtp_layer
from ...modeling.saving import HEAD
from ...rollouts.prompt_format import PromptFormat
from .base import edit_json
from .main import write as write_main

BLOCK = "mtp_block."
"""Beginning of the names of the decoder layer within the MTP layer."""
AFTER_LAST = {"post_norm": "shared_head.norm"}
"""Module of the MTP layer -> its name in the first layout, where it is another."""
APART = {
    "eh_proj": "fc",
    "enorm": "pre_fc_norm_embedding",
    "hnorm": "pre_fc_norm_hidden",
    "post_norm": "norm",
}
"""The same in the second."""


def write(model: Any, fmt: PromptFormat, folder: Path, config: Any) -> None:
    """Write main's weights with the MTP layer, configs and tokenizer.

    Raises ValueError for a model whose layer transformers would not open.
    """
    head = model.mtp_head
    if not isinstance(head, NativeMTPHead):
        raise ValueError(
            f"--format native_mtp must be given a model with head.type=native_mtp, got "
            f"{model.mtp_settings.type}, which is no layer of main's family; use --format "
            "huggingface"
        )
    main = model.main_config
    state = {name: w for name, w in model.state_dict().items() if not name.startswith(HEAD)}
    write_main(model, fmt, folder, config, state | layer_weights(model))
    found = with_mtp_layer(main)
    number = main.attribute_map.get(NUM_LAYERS, NUM_LAYERS)
    fields = (number, "mtp_layer_types", "mtp_mlp_layer_types")
    values = {name: getattr(found, name) for name in fields if hasattr(found, name)}
    edit_json(folder / "config.json", **values)


def layer_weights(model: Any) -> dict[str, Tensor]:
    """The weights of the MTP layer by the names of the family's checkpoints.

    Raises ValueError if transformers knows none of the layouts for a main of this depth.
    """
    known = modeling_layers.MtpModel.get_mtp_weights_regex(model)
    depth = model.main_config.num_hidden_layers
    after_last, apart = f"model.layers.{depth}.", "mtp."
    if known.search(f"{apart}fc.weight"):
        prefix, block, renamed = apart, f"{apart}layers.0.", APART
    elif known.search(f"{after_last}eh_proj.weight"):
        prefix, block, renamed = after_last, after_last, AFTER_LAST
    else:
        name = stock_class(type(model)).__name__
        raise ValueError(
            f"--format native_mtp must be given a main whose MTP layer transformers finds: it "
            f"knows those of {name} as {known.pattern}, got {after_last}* for a main of {depth} "
            "layers; use --format huggingface"
        )
    found = {}
    for name, weight in model.mtp_head.layer.state_dict().items():
        if name.startswith(BLOCK):
            found[block + name.removeprefix(BLOCK)] = weight
        else:
            module, _, kind = name.partition(".")
            found[f"{prefix}{renamed.get(module, module)}.{kind}"] = weight
    return found
