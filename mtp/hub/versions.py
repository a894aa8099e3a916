"""Opening a checkpoint in the older versions of transformers."""

import inspect
from dataclasses import fields, is_dataclass
from typing import Any

import transformers


def config_fields(config_class: type) -> set[str]:
    """Names of the fields of a family's config. Before 5.4 these are arguments of `__init__`, its
    own and those of the classes that it derives from.
    """
    if is_dataclass(config_class):
        return {field.name for field in fields(config_class)}
    made_by = [vars(one)["__init__"] for one in config_class.__mro__ if "__init__" in vars(one)]
    given = [one for init in made_by for one in inspect.signature(init).parameters.values()]
    named = {one.name for one in given if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return named - {"self"}


def check_types(config_class: type, given: dict[str, Any]) -> None:
    """Raises TypeError for a field whose value is of another type than its default. From 5.4 on
    transformers checks this itself.
    """
    if is_dataclass(config_class):
        return
    defaults = config_class()
    for name, value in given.items():
        kind = type(getattr(defaults, name, None))
        if kind in (bool, int, str) and value is not None and type(value) is not kind:
            raise TypeError(f"'{name}' expected {kind.__name__}, got {type(value).__name__}")


def gguf_options() -> dict[str, Any]:
    """The arguments of `from_pretrained` that unpack the weights of a GGUF file, which makes them
    trainable.

    Raises ValueError before transformers 5.18, whose tokenizers of GGUF files split special tokens.
    """
    made = getattr(transformers, "GgufConfig", None)
    if made is None:
        raise ValueError(
            "model.gguf_file must be left out with transformers "
            f"{transformers.__version__}, which reads the tokenizer of a GGUF file wrong; pip "
            "install 'transformers>=5.18', or give a checkpoint in safetensors"
        )
    return {"quantization_config": made(dequantize=True)}
