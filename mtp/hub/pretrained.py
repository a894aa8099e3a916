"""Open a checkpoint's config, tokenizer and weights; a damaged one gives one line that names it.

transformers reports damage in many ways: errors of the JSON, safetensors or GGUF reader, or weights
that it initialises at random with a warning. Here each is a ValueError.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers import logging as hf_logging

from ..common.errors import one_line


@contextmanager
def quiet(*, progress: bool = True, warnings: bool = False) -> Iterator[None]:
    """Context without transformers' progress bars and, with `warnings`, without its warnings."""
    level, had_bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    if progress:
        hf_logging.disable_progress_bar()
    if warnings:
        hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if had_bars:
            hf_logging.enable_progress_bar()


@contextmanager
def blame(trouble: str, remedy: str) -> Iterator[None]:
    """Turn any error of a library into the ValueError `trouble: cause; remedy`.

    Only for calls that fail because of the user's input. Errors of this project pass.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and one_line(error) is not None:
            raise
        raise ValueError(f"{trouble}: {_cause(error)}; {remedy}") from error


def _cause(error: Exception) -> str:
    """An error's text in one line, with its kind if the text alone is unclear."""
    if isinstance(error, StrictDataclassError):
        # Its own text is a heading; the cause is the `__cause__` or the text below the heading.
        return str(error.__cause__ or error).splitlines()[-1].strip()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A first line that ends in a colon heads a list, which is the cause.
    text = " ".join(lines) if lines and lines[0].endswith(":") else "".join(lines[:1])
    text = text.rstrip(".:;") or "no reason given"
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"


WHOLE = "give a hub id, a local folder or package:NAME that is whole"


def read_config(folder: str | Path, what: str, **options: Any) -> PretrainedConfig:
    """config.json of a checkpoint; `what` names it in errors."""
    if not Path(folder).is_dir() and not _is_hub_id(str(folder)):
        raise ValueError(
            f"{what} must be a folder, and there is none of this name (nor can it be a hub id); "
            "train the run that writes it first, or give another folder or a hub id"
        )
    with blame(f"{what} could not be read", WHOLE), quiet(progress=False, warnings=True):
        return AutoConfig.from_pretrained(folder, **options)


def _is_hub_id(name: str) -> bool:
    """True if a model on the hub could have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def read_tokenizer(folder: str | Path, what: str, **options: Any) -> Any:
    """The tokenizer of a checkpoint; `what` names it in errors."""
    with blame(f"the tokenizer of {what} could not be read", WHOLE):
        return AutoTokenizer.from_pretrained(folder, **options)


def read_model(
    cls: Any,
    folder: str | Path,
    what: str,
    config: PretrainedConfig,
    *,
    new_head: bool,
    dtype: torch.dtype | str,
    progress: bool = True,
    **options: Any,
) -> Any:
    """The model with all of main's weights, and all of the head's unless `new_head`.

    Raises ValueError naming `what` for weights that are damaged, missing or of another shape, and
    for weights of main that the model has no place for.
    """
    with (
        blame(f"the weights of {what} could not be read", WHOLE),
        quiet(progress=not progress, warnings=True),
    ):
        model, info = cls.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name them below
            **options,
        )
    wrong = sorted(info["mismatched_keys"])
    if wrong:
        name, found, expected = wrong[0]
        raise ValueError(
            f"the weights of {what} do not fit its config.json: {name} must have shape "
            f"{list(expected)}, got {list(found)}{_more(wrong)}; {WHOLE}"
        )
    lacking = sorted(
        name for name in info["missing_keys"] if not (new_head and name.startswith("mtp_head."))
    )
    if lacking:
        raise ValueError(
            f"{what} must hold all weights of {cls.__name__}, but {lacking[0]} is missing"
            f"{_more(lacking)}; {WHOLE}"
        )
    # Weights of other parts, such as a value head, are ignored; main's must not be.
    parts = (f"{model.base_model_prefix}.", "lm_head.", "mtp_head.")
    unused = sorted(name for name in info["unexpected_keys"] if name.startswith(parts))
    if unused:
        raise ValueError(
            f"{what} holds weights that its config.json has no place for: {unused[0]}"
            f"{_more(unused)}; {WHOLE}"
        )
    return model


def _more(names: list[Any]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def vocabulary_size(tokenizer: Any) -> int:
    """Rows that a matrix needs for all of the tokenizer's ids."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def check_vocabulary(model: Any, tokenizer: Any, what: str) -> None:
    """Raises ValueError if the tokenizer has ids that the embedding matrix has no rows for."""
    rows, size = model.get_input_embeddings().num_embeddings, vocabulary_size(tokenizer)
    if size > rows:
        beyond = [token for token, index in tokenizer.get_vocab().items() if index >= rows]
        raise ValueError(
            f"the tokenizer of {what} must have at most {rows} ids, one for each row of the "
            f"embedding matrix, got {size} (beyond them: {', '.join(sorted(beyond)[:3])}); name "
            "those in model.add_tokens to make rows for them, or give the weights' own tokenizer"
        )
