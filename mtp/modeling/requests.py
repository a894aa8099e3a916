"""Options of `generate` with `mtp_mode`: every option of transformers, by name.

`OPTIONS` holds each field of a `GenerationConfig` and each argument of `generate`. It states
whether the pass loop supports the option, whether a processor of transformers implements it, or
whether it is refused unless it is set to a neutral value. A test fails if a field is missing, so no
option is ignored silently.

Ships with checkpoints: imports torch, transformers and siblings only.

Shapes: B rows, T prompt.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    TypicalLogitsWarper,
)

from .compiled import Compiler
from .decode_options import DecodeOptions
from .decode_state import Stops
from .phases import PhasePlan
from .sampler import Sampler

DEFAULT_NEW_TOKENS = 256
STOCK = "stock"
"""Value of `mtp_mode` for transformers' own `generate`, which overrides the generation config."""


class Kind(Enum):
    """Treatment of an option."""

    SUPPORTED = "read by the pass loop"
    PROCESSED = "implemented by transformers' own processor, as in the stock `generate`"
    REFUSED = "an error unless its value is neutral"
    SAMPLING = "an error if tokens are sampled and its value is not neutral; ignored if greedy"
    IDLE = "ignored: it only modifies options that are refused"


class Option(NamedTuple):
    """An option of `generate`."""

    kind: Kind
    neutral: tuple[Any, ...] = (None,)
    """Values without effect; None always is one. The first is the default."""
    remedy: str = "call generate with mtp_mode='stock' for it"


def _each(names: str, option: Option) -> dict[str, Option]:
    return dict.fromkeys(names.split(), option)


PROCESSOR = "give a logits_processor that does it"
BEAMS = "model.search(..., config={'method': 'beam'}) searches with the head"
NO_LOGITS = "return_dict_in_generate=True gives the log-probability of every token"

OPTIONS: dict[str, Option] = {
    # Length and end.
    **_each("max_new_tokens max_length", Option(Kind.SUPPORTED)),
    **_each("eos_token_id pad_token_id max_time stop_strings", Option(Kind.SUPPORTED)),
    "min_length": Option(Kind.PROCESSED, (0,)),
    "min_new_tokens": Option(Kind.PROCESSED, (None, 0)),
    **_each("forced_bos_token_id forced_eos_token_id", Option(Kind.PROCESSED)),
    "exponential_decay_length_penalty": Option(Kind.PROCESSED),
    # The distribution. By default transformers samples from the 50 likeliest tokens.
    "do_sample": Option(Kind.SUPPORTED, (False,)),
    "temperature": Option(Kind.SUPPORTED, (1.0,)),
    "top_k": Option(Kind.SUPPORTED, (50,)),
    "top_p": Option(Kind.SUPPORTED, (1.0,)),
    "repetition_penalty": Option(Kind.PROCESSED, (1.0,)),
    "no_repeat_ngram_size": Option(Kind.PROCESSED, (0,)),
    "remove_invalid_values": Option(Kind.PROCESSED, (False,)),
    **_each("bad_words_ids sequence_bias", Option(Kind.PROCESSED)),
    **_each("suppress_tokens begin_suppress_tokens", Option(Kind.PROCESSED)),
    "renormalize_logits": Option(Kind.IDLE),  # the sampler's distributions always sum to 1
    "min_p": Option(Kind.SUPPORTED, (None, 0.0)),
    "typical_p": Option(Kind.SUPPORTED, (1.0,)),
    **_each("epsilon_cutoff eta_cutoff", Option(Kind.SUPPORTED, (0.0,))),
    "top_h": Option(Kind.SAMPLING, (None,), PROCESSOR),
    "encoder_repetition_penalty": Option(Kind.REFUSED, (1.0,), PROCESSOR),
    "encoder_no_repeat_ngram_size": Option(Kind.REFUSED, (0,), PROCESSOR),
    "guidance_scale": Option(Kind.REFUSED, (None, 1)),
    "watermarking_config": Option(Kind.REFUSED),
    "prefix_allowed_tokens_fn": Option(Kind.REFUSED, (None,), PROCESSOR),
    **_each("negative_prompt_ids negative_prompt_attention_mask", Option(Kind.REFUSED)),
    "token_healing": Option(Kind.REFUSED, (False,)),
    # Decoding algorithms.
    "num_beams": Option(Kind.REFUSED, (1,), BEAMS),
    "num_beam_groups": Option(Kind.REFUSED, (1,), BEAMS),
    "diversity_penalty": Option(Kind.REFUSED, (0.0,), BEAMS),
    **_each("constraints force_words_ids", Option(Kind.REFUSED)),
    **_each("early_stopping length_penalty", Option(Kind.IDLE)),  # of beams
    "penalty_alpha": Option(Kind.REFUSED, (None, 0.0)),
    "dola_layers": Option(Kind.REFUSED),
    "low_memory": Option(Kind.REFUSED, (None, False)),
    "use_mtp": Option(Kind.REFUSED, (None, False), "mtp_mode='verified' drafts with the head"),
    **_each(
        "assistant_model assistant_early_exit prompt_lookup_num_tokens speculation_type",
        Option(Kind.REFUSED, (None,), "mtp_mode='verified' drafts with the head"),
    ),
    "is_assistant": Option(Kind.REFUSED, (None, False)),
    **_each(
        "num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold "
        "max_matching_ngram_size assistant_lookbehind target_lookbehind "
        "assistant_ensemble_weight assistant_tokenizer",
        Option(Kind.IDLE),  # of an assistant
    ),
    "custom_generate": Option(Kind.REFUSED),
    "trust_remote_code": Option(Kind.IDLE),  # of custom_generate
    # The cache and the machine.
    "use_cache": Option(Kind.IDLE, (True,)),  # the pass loop has its own; the text is the same
    "cache_implementation": Option(Kind.SUPPORTED, (None,)),
    **_each("cache_config max_cache_len prefill_chunk_size", Option(Kind.REFUSED)),
    "continuous_batching_config": Option(Kind.REFUSED),
    "compile_config": Option(Kind.SUPPORTED),
    "disable_compile": Option(Kind.SUPPORTED, (None, False)),
    "synced_gpus": Option(Kind.REFUSED, (None, False), "each process decodes for itself"),
    # Inputs and outputs.
    "num_return_sequences": Option(Kind.SUPPORTED, (1,)),
    "return_dict_in_generate": Option(Kind.SUPPORTED, (False,)),
    **_each("output_scores output_logits", Option(Kind.REFUSED, (None, False), NO_LOGITS)),
    **_each("output_attentions output_hidden_states", Option(Kind.REFUSED, (None, False))),
    **_each("inputs input_ids generation_config attention_mask", Option(Kind.SUPPORTED)),
    **_each("logits_processor stopping_criteria streamer tokenizer", Option(Kind.SUPPORTED)),
    **_each("bos_token_id decoder_start_token_id", Option(Kind.IDLE)),  # of a call without prompts
    "transformers_version": Option(Kind.IDLE),
}

OF_MTP = ("mtp_mode", "mtp_k", "max_thought_tokens")
"""Arguments of mtp that a generation config may hold too."""

WARPERS = {
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}
"""transformers' warpers of options that drop tokens by their probabilities alone, in its order."""

BY_ROW = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)
"""Stopping criteria of transformers that need no other rows."""

KEEPS_ROWS = (
    "PrefixConstrainedLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
)
"""Processors of transformers that take the i-th row of their input for row i of the batch."""
KEEPS_STATE = (
    "ClassifierFreeGuidanceLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
)
"""Processors that rely on one call per token, with the whole batch in each."""


class Wanted:
    """The options that a call sets: its arguments, else a given config's, else the model's."""

    def __init__(self, given: dict[str, Any], *configs: GenerationConfig | None):
        self.given = given
        self.configs = [vars(config) for config in configs if config is not None]

    def __getitem__(self, name: str) -> Any:
        if name in self.given:
            return self.given[name]
        found = [layer[name] for layer in self.configs if layer.get(name) is not None]
        return found[0] if found else OPTIONS[name].neutral[0]

    def is_neutral(self, name: str) -> bool:
        """True if an option's value has no effect."""
        value = self[name]
        is_plain = isinstance(value, bool | int | float | str)
        return value is None or (is_plain and value in OPTIONS[name].neutral)

    def asked(self, kind: Kind) -> list[str]:
        """Names of the options of a kind whose values are not neutral."""
        return [n for n, o in OPTIONS.items() if o.kind is kind and not self.is_neutral(n)]

    def check(self) -> None:
        """Raises ValueError for options that the pass loop does not support."""
        unknown = sorted(n for n, v in self.given.items() if n not in OPTIONS and v is not None)
        if unknown:
            taken = [n for n, o in OPTIONS.items() if o.kind in (Kind.SUPPORTED, Kind.PROCESSED)]
            raise ValueError(
                f"generate with mtp_mode does not support {unknown}; use some of {taken}"
            )
        refused = self.asked(Kind.REFUSED) + (
            self.asked(Kind.SAMPLING) if self["do_sample"] else []
        )
        for name in refused:
            option, where = OPTIONS[name], "" if name in self.given else "generation_config."
            raise ValueError(
                f"{where}{name} must be {option.neutral[-1]} with mtp_mode, got {self[name]}; "
                f"{option.remedy}"
            )

    def max_new_tokens(self, width: int | None) -> int:
        """Maximum number of new tokens of a text that continues prompts of a width.

        If both limits are set in one place `max_new_tokens` takes precedence, as in transformers; a
        limit among the arguments takes precedence over one in a config. With width None, raises
        ValueError for `max_length`, which includes the prompt and has no meaning without one width.
        """
        for layer in (self.given, *self.configs):
            if layer.get("max_new_tokens") is not None:
                return int(layer["max_new_tokens"])
            most = layer.get("max_length")
            if most is None:
                continue
            if width is None:
                raise ValueError(
                    f"max_length={most} must be left out where a text has several contexts; give "
                    "max_new_tokens, the limit of a segment"
                )
            if most <= width:
                raise ValueError(
                    f"max_length must be above the {width} tokens of the prompts, which it "
                    f"includes, got {most}; or give max_new_tokens"
                )
            return int(most) - width
        return DEFAULT_NEW_TOKENS

    def sampler(self) -> Sampler:
        """The distribution that the options define."""
        if not self["do_sample"]:
            return Sampler(temperature=0.0)
        temperature, top_k, top_p = (self[name] for name in ("temperature", "top_k", "top_p"))
        return Sampler(
            temperature=1.0 if temperature is None else temperature,
            top_k=0 if top_k is None else top_k,
            top_p=1.0 if top_p is None else top_p,
            warpers=tuple(
                warper(self[name]) for name, warper in WARPERS.items() if not self.is_neutral(name)
            ),
        )

    def compiler(self) -> Compiler | None:
        """The compiler of the passes, from transformers' `CompileConfig`; None: no `compile_config`
        is set, or `disable_compile` is.

        Raises ValueError for settings under which passes would not be compiled once.
        """
        config, cache = self["compile_config"], self["cache_implementation"]
        if config is None or self["disable_compile"]:
            return None
        if cache not in (None, "static"):
            raise ValueError(
                f"cache_implementation must be static with compile_config, got {cache!r}; leave it "
                "out"
            )
        given = config if isinstance(config, dict) else vars(config)
        for name in ("dynamic", "options"):
            if given.get(name):
                raise ValueError(
                    f"compile_config.{name} must be left out with mtp_mode, got {given[name]}: "
                    "passes are compiled for fixed shapes, whole; set backend and mode only"
                )
        return Compiler(**{n: given[n] for n in ("backend", "mode") if given.get(n) is not None})

    def stops(self, num_rows: int, in_step: bool) -> Stops | None:
        """The stopping criteria that are called after every token of a batch.

        in_step: criteria of other origin than transformers' receive all rows at once; without it,
        rows of one length, as they come.
        """
        criteria = self.criteria()
        others = [c for c in criteria if not isinstance(c, BY_ROW)]
        if in_step and num_rows > 1 and others:
            each = StoppingCriteriaList([c for c in criteria if isinstance(c, BY_ROW)])
            return Stops(each or None, StoppingCriteriaList(others))
        return Stops(criteria, None) if criteria else None

    def criteria(self) -> StoppingCriteriaList:
        """All stopping criteria, given or made of options, called after every token."""
        out = StoppingCriteriaList(self["stopping_criteria"] or [])
        if self["max_time"] is not None:
            out.append(MaxTimeCriteria(self["max_time"]))
        if self["stop_strings"] is not None:
            if self["tokenizer"] is None:
                raise ValueError(
                    f"stop_strings={self['stop_strings']!r} needs tokenizer=, which maps tokens "
                    "to text; give the model's"
                )
            out.append(StopStringCriteria(self["tokenizer"], self["stop_strings"]))
        return out

    def stock_config(self, eos_ids: list[int], pad_id: int | None, device: Any) -> GenerationConfig:
        """Config for transformers' own helpers, which infer a mask and build processors."""
        names = self.asked(Kind.PROCESSED)
        out: Any = GenerationConfig(**{name: self[name] for name in names})
        if self["min_new_tokens"] is not None:
            out.min_length = None  # as in transformers, the number of new tokens counts

        def ids(values: list[int]) -> Tensor:
            return torch.tensor(values, device=device)

        pad_id = eos_ids[0] if pad_id is None and eos_ids else pad_id
        out._eos_token_tensor = ids(eos_ids) if eos_ids else None
        out._pad_token_tensor = None if pad_id is None else ids([pad_id])[0]
        return out


class Request(NamedTuple):
    """A call of `generate`, as `decode` takes it."""

    given: Tensor
    """[B, T] prompts as they were given."""
    wanted: Wanted
    """The options that the call and its configs set."""
    prompts: Tensor
    """[B, T] the prompts padded on the right."""
    prompt_lengths: Tensor
    """[B] tokens of each prompt."""
    plans: list[PhasePlan]
    """[B] plan of each prompt."""
    options: DecodeOptions
    """Sampler, limits and the rest."""
    num_return_sequences: int
    """Continuations of each prompt."""
    streamer: Any
    """transformers' streamer, or None."""


def token_ids(value: Any) -> list[int]:
    """Ids given as one number, several or a tensor; None: none."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        value = value.tolist()
    return [value] if isinstance(value, int) else list(value)


def read_prompts(inputs: Tensor | None, input_ids: Tensor | None) -> Tensor:
    """[B, T] prompts of a call, given by either of the two names."""
    if inputs is not None and input_ids is not None:
        raise ValueError("input_ids must be left out if inputs is given; give one of them")
    prompts = input_ids if inputs is None else inputs
    if prompts is None:
        raise ValueError("input_ids must be given to generate with mtp_mode")
    if prompts.ndim != 2 or 0 in prompts.shape or prompts.is_floating_point():
        raise ValueError(
            f"input_ids must be token ids of at least one prompt and token, [B, T], got "
            f"{prompts.dtype} {list(prompts.shape)}"
        )
    return prompts


def read_mask(model: Any, given: Tensor | None, prompts: Tensor, stock: GenerationConfig) -> Tensor:
    """[B, T] int64: 1 where a prompt has a token; if not given, inferred as in transformers.

    stock: transformers' own config of the call. Raises ValueError for a mask that does not
    belong to the prompts.
    """
    if given is None:
        given = model._prepare_attention_mask_for_generation(prompts, stock, {})
    mask = given.to(prompts.device).ne(0).long()
    if mask.shape != prompts.shape:
        raise ValueError(
            f"attention_mask must have the shape of the prompts, {list(prompts.shape)}, got "
            f"{list(mask.shape)}"
        )
    if not bool(mask.any(1).all()):
        raise ValueError("attention_mask leaves a row without a token; give every row a prompt")
    return mask


def first_set(name: str, *layers: Any) -> Any:
    """The first value of a name that is not None; each layer holds names as attributes."""
    found = (getattr(layer, name, None) for layer in layers)
    return next((value for value in found if value is not None), None)


def check_own(given: GenerationConfig | None, own: GenerationConfig) -> None:
    """Raises ValueError for a field of mtp in a given config that no option reads."""
    if given is None:
        return
    known = [*OF_MTP, *(name for name in vars(own) if name.startswith("mtp_"))]
    known += ["mtp_phases", "mtp_segments"]
    for name, value in vars(given).items():
        if name.startswith("mtp_") and name not in known and value is not None:
            raise ValueError(f"generation_config.{name} is no setting; there are {sorted(known)}")


def check_processors(processors: Sequence[Any], num_rows: int) -> None:
    """Raises ValueError for a processor of transformers that the pass loop does not support."""
    for processor in processors:
        names = {cls.__name__ for cls in type(processor).__mro__}
        if names & set(KEEPS_STATE):
            raise ValueError(
                f"logits_processor {type(processor).__name__} relies on one call per token, and "
                "a pass samples several; call generate with mtp_mode='stock'"
            )
        if num_rows > 1 and names & set(KEEPS_ROWS):
            raise ValueError(
                f"logits_processor {type(processor).__name__} identifies rows by number, and "
                f"a pass gives it some of {num_rows}; decode one sequence at a time"
            )


def read_processors(
    model: Any,
    wanted: Wanted,
    prompts: Tensor,
    mask: Tensor,
    stock: GenerationConfig,
    one_context: bool,
) -> LogitsProcessorList:
    """The given processors, and transformers' own for the options that they implement.

    A repetition penalty counts no padding. Raises ValueError for options that do not suit the
    prompts.
    """
    found = LogitsProcessorList(wanted["logits_processor"] or [])
    asked = wanted.asked(Kind.PROCESSED)
    if asked and not one_context:
        raise ValueError(
            f"{asked[0]} must be left out where a text has several contexts, got "
            f"{wanted[asked[0]]}; give a logits_processor that handles them"
        )
    if asked:
        found = model._get_logits_processor(
            stock,
            input_ids_seq_length=prompts.shape[1],
            encoder_input_ids=prompts,
            logits_processor=found,
            device=prompts.device,
            model_kwargs={},
        )
    if bool(mask.all()):
        return found
    return LogitsProcessorList(
        UnpaddedRepetitionPenalty(one) if isinstance(one, RepetitionPenaltyLogitsProcessor) else one
        for one in found
    )


class UnpaddedRepetitionPenalty:
    """transformers' repetition penalty, which does not count the padding before a prompt."""

    def __init__(self, penalty: Any):
        """penalty: transformers' processor."""
        self.penalty = penalty

    def __call__(self, input_ids: Tensor, scores: Tensor, padding: Tensor) -> Tensor:
        """Token ids [B, T], scores [B, V] and the padded columns of each row [B] -> scores."""
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        first = input_ids.gather(1, padding[:, None])
        # A token that occurs twice is punished once, so the first may replace the padding.
        return self.penalty(torch.where(columns < padding[:, None], first, input_ids), scores)
