"""The model card of an export: description, loading, metrics and limits."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache
from yaml import YAMLError

from ..evaluation.evaluate import decode_all, held_out
from ..modeling.contract import head_is_trained
from ..modeling.phases import MODES as PHASE_MODES
from ..reports.metrics import Metric, by_test_set, measured
from ..rollouts.prompt_format import PromptFormat
from ..training.examples import fit_task
from ..training.optimizers import num_parameters
from .build import ModelConfig, source_folder

CARD = "README.md"
TAG = "mtp-eavesdrop"
"""Tag of every card, which identifies an export."""
MODES = ("fast", "slow")
"""Modes of the card's example; plain `generate` on main writes the text of `slow`."""
OLDEST_TRANSFORMERS = "5.0"
"""Oldest version that opens main with its head, the bound of pyproject.toml."""
NUM_TRIED = 8
"""Held-out problems among which the example is chosen."""


def model_card(model: Any, fmt: PromptFormat, summary: dict[str, Any], config: Any) -> str:
    """README.md of main with its head: how to open it, metrics, provenance, limits.

    If no stage trained the head, it is that of main alone.
    """
    if not head_is_trained(model.config):
        return main_card(model, fmt, summary, config, untrained=True)
    counts = num_parameters(model)
    modes = {mode: [n for n, p in fmt.phases.items() if p.mode == mode] for mode in PHASE_MODES}
    verified = modes["verified"]
    checked = f" In a verified phase ({_listed(verified)}) main checks them." if verified else ""
    slots = model.block_size
    prompt, wrong = sample_prompt(model, fmt, config)
    caveat = [
        f"This prompt is the best of {NUM_TRIED} that were tried, and the answer of "
        f"{_listed(wrong)} mode to it is wrong."
    ]
    caveat = caveat if wrong else []
    parts = [
        _front_matter(config, "multi-token-prediction", "custom_code"),
        f"# {config.name}: a language model with an eavesdropping head",
        f"A causal language model (**main**, {counts['main']:,} parameters, `"
        f"{model.config.model_type}`) that writes one token per forward pass, and a small **head** "
        f"({counts['head']:,} parameters, `{model.mtp_settings.type}`) that reads main's "
        f"residual stream after layers {model.mtp_taps} and writes the next {slots - 1} tokens of "
        f"the same pass. In a fast phase ({_listed(modes['fast'])}) all of them are kept, up to "
        f"{slots} tokens a pass; in a slow phase ({_listed(modes['slow'])}) only main's own token "
        f"is kept.{checked}",
        "## Use",
        "Main alone, with nothing but transformers.",
        _snippet(fmt, prompt, head=False),
        f"Main with its head. The code is in this folder, so no package but transformers "
        f"{OLDEST_TRANSFORMERS} or newer is needed.",
        _snippet(fmt, prompt, head=True),
        *caveat,
        "`fast` decodes each phase in its own mode, `slow` all of them one token per pass, "
        "`verified` gives main's own text in fewer passes: the head proposes and main decides. "
        f"{_without_mode(model)} "
        '`model.search(**given, config={"method": "best_of_n", "n": 8}, do_sample=True)` looks for '
        "the likeliest of several texts; `beam` and `mcts` are the other methods, and `scorer`, a "
        "function of the branches, ranks them by another score.",
        *_segments(fmt, head=True),
        "## Measured",
        _table(summary),
        "## Provenance",
        _provenance(fmt, summary, config),
        "## Fine-tuning",
        FINE_TUNING,
        "## Limitations",
        "\n".join([*UNVERIFIED, *_limitations(config), *GENERATE]),
    ]
    return "\n\n".join(parts) + "\n"


def gguf_card(model: Any, fmt: PromptFormat, summary: dict[str, Any], config: Any) -> str:
    """README.md of main in one GGUF file."""
    return main_card(model, fmt, summary, config, "model.gguf")


def main_card(
    model: Any,
    fmt: PromptFormat,
    summary: dict[str, Any],
    config: Any,
    gguf_file: str | None = None,
    with_mtp_layer: bool = False,
    untrained: bool = False,
) -> str:
    """README.md of main alone, or with its family's MTP layer: how to open it, metrics, provenance,
    limits. untrained: the folder has a head that no stage trained.
    """
    role = (
        "It was trained as the main LLM of a model whose small head reads its residual stream and "
        "writes further tokens of each forward pass. "
    )
    where_head_is = (
        "The head is not in this folder: this model writes one token per pass, as in the slow mode "
        "of the whole."
    )
    if untrained:
        role = "It is the main LLM of a model with a small head. "
        where_head_is = (
            "No stage up to this model trained the head, which is in this folder to begin a "
            "training with (`model.source`). This model writes one token per pass: slow mode."
        )
    elif with_mtp_layer:
        where_head_is = (
            "The head is this model's MTP layer: transformers drafts a token of each pass with it "
            "(`use_mtp=True`) and keeps it if main would have written it, so the text is that of "
            "slow mode."
        )
    prompt, wrong = sample_prompt(model, fmt, config)
    caveat = [f"The answer to this prompt, the best of {NUM_TRIED} that were tried, is wrong."]
    parts = [
        _front_matter(config),
        f"# {config.name}: main of a language model with an eavesdropping head",
        f"A causal language model ({num_parameters(model)['main']:,} parameters, `"
        f"{model.config.model_type}`). {role}{where_head_is}",
        "## Use",
        *(["`llama-cli -m model.gguf`, or with transformers 5.18 or newer:"] if gguf_file else []),
        _snippet(fmt, prompt, head=False, gguf_file=gguf_file, with_mtp_layer=with_mtp_layer),
        *(caveat if "slow" in wrong else []),
        *_segments(fmt, head=False),
        "## Measured",
        *(
            []
            if untrained
            else [
                "Slow accuracy and slow passes are those of this folder; fast and verified mode "
                "need the head."
            ]
        ),
        _table(summary),
        "## Provenance",
        _provenance(fmt, summary, config),
        "## Limitations",
        "\n".join(_limitations(config)),
    ]
    return "\n\n".join(parts) + "\n"


def native_mtp_card(model: Any, fmt: PromptFormat, summary: dict[str, Any], config: Any) -> str:
    """README.md of main with its head as the MTP layer of its family."""
    return main_card(model, fmt, summary, config, with_mtp_layer=True)


def draft_card(model: Any, fmt: PromptFormat, summary: dict[str, Any], config: Any) -> str:
    """README.md of the head alone, as a draft model: what it belongs to, how servers open it."""
    slots = model.block_size - 1
    speculative = json.dumps(
        {"method": "eagle3", "model": "path/to/this/folder", "num_speculative_tokens": slots}
    )
    parts = [
        _front_matter(config, "speculative-decoding", "eagle3"),
        f"# {config.name}: an EAGLE-3 draft model",
        f"The head of a language model ({num_parameters(model)['head']:,} parameters), trained "
        f"with its main LLM. A server lets it propose the next {slots} tokens of each pass; main "
        "checks them, and the text is main's own. It reads main's hidden states after layers "
        f"{model.mtp_taps} (Hugging Face `hidden_states`) and belongs to this main only: "
        f"{base_model(config.model)[0]} as the run left it, which `mtp export --format main` "
        "writes.",
        "## Use",
        f"```\nvllm serve path/to/main --speculative-config '{speculative}'\n"
        "python -m sglang.launch_server --model-path path/to/main --speculative-algorithm EAGLE3 "
        f"--speculative-draft-model-path path/to/this/folder --speculative-num-steps {slots} "
        f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {slots + 1}\n```",
        "vLLM opens both formats, SGLang `--format eagle3`.",
        "## Measured",
        "Accepted by slot and tokens per pass of verified mode are those of this head under mtp's "
        "own decoding.",
        _table(summary),
        "## Provenance",
        _provenance(fmt, summary, config),
        "## Limitations",
        "\n".join(_limitations(config)),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(config: Any, *tags: str) -> str:
    """Metadata of a card for the Hub."""
    _, hub_id, licence = base_model(config.model)
    meta = ["library_name: transformers", "pipeline_tag: text-generation"]
    meta += [f"license: {licence}"] if licence else []
    meta += [f"base_model: {hub_id}"] if hub_id else []
    meta += ["tags:", *(f"- {tag}" for tag in (TAG, *tags))]
    return "---\n" + "\n".join(meta) + "\n---"


def _without_mode(model: Any) -> str:
    """The mode of `generate` where a call names none."""
    mode = getattr(model.generation_config, "mtp_mode", None)
    if mode is None:
        return "Without `mtp_mode`, `generate` is the stock one on main."
    return f"Without `mtp_mode`, `generate` writes in `{mode}` mode; `stock` is the one on main."


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none here"


def _snippet(
    fmt: PromptFormat,
    prompt: str,
    *,
    head: bool,
    gguf_file: str | None = None,
    with_mtp_layer: bool = False,
) -> str:
    """Python that loads the folder, with or without its head, and answers a prompt."""
    file = "" if gguf_file is None else f", gguf_file={json.dumps(gguf_file)}"
    drafting = ", use_mtp=True" if with_mtp_layer else ""
    if not fmt.uses_template:
        tokenizer: Any = fmt.tokenizer
        shown, special = prompt + (fmt.opener or ""), ""
        if not fmt.leading_ids or tokenizer.encode(shown) != fmt.prompt_ids(prompt):
            shown, special = (
                tokenizer.decode(fmt.leading_ids) + shown,
                ", add_special_tokens=False",
            )
        quoted = json.dumps(shown, ensure_ascii=False)
        inputs = [f'inputs = tokenizer({quoted}, return_tensors="pt"{special})']
    else:
        messages = [{"role": "user", "content": prompt}]
        inputs = [
            f"messages = {json.dumps(messages, ensure_ascii=False)}",
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "path/to/this/folder"',
        f"tokenizer = AutoTokenizer.from_pretrained(folder{file})",
        *inputs,
        'given = {name: inputs[name] for name in ("input_ids", "attention_mask")}',
    ]
    if head:
        lines += [
            "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
            f"for mode in ({', '.join(map(json.dumps, MODES))}):",
            "    out = model.generate(**given, mtp_mode=mode, return_dict_in_generate=True)",
            "    print(mode, int(out.passes[0]), tokenizer.decode(out.sequences[0]))",
        ]
    else:
        lines += [
            f"model = AutoModelForCausalLM.from_pretrained(folder{file})",
            f"print(tokenizer.decode(model.generate(**given{drafting})[0]))",
        ]
    return "\n".join(["```python", *lines, "```"])


def _segments(fmt: PromptFormat, *, head: bool) -> list[str]:
    """Parts of a card about text in segments, with the head or without; none if it is not used."""
    settings = fmt.segments
    if settings.max_segments == 1:
        return []
    said = (
        f"It was trained to think in up to {settings.max_segments} segments: a summary edits a "
        f"memory file of at most {settings.memory_tokens} tokens, and thinking continues with the "
        f"prompt, that file and the last {settings.recent_tokens} tokens of the thought."
    )
    if not head:
        return [
            said + " `generate` writes the first segment alone, which may lack an answer. "
            "`generate_segments` of an export with the head (`mtp export --format huggingface`) "
            "writes all of them."
        ]
    shared = (
        " Problems of a project share the file: `memories=[memory.passed_on()]` gives the next "
        "one the last `memory` of the one before."
    )
    return [
        said + shared * settings.is_shared,
        "```python\nsegments = model.generate_segments(**given, tokenizer=tokenizer)\n"
        "print(tokenizer.decode(segments.out.completion(-1)))  # the last, with the answer\n"
        "print(segments.memories[-1].text)\n```",
    ]


def sample_prompt(model: Any, fmt: PromptFormat, config: Any) -> tuple[str, list[str]]:
    """A held-out prompt for the card, and the modes that answer it wrong.

    It is the first of a few prompts that every mode answers right, else the first that most do.
    Prompts that need earlier messages or problems are left out, since the card shows one message.
    """
    try:
        stages = config.active_stages()
        task = fit_task(config.task.build(), config.decoding, stages, model, fmt)
        examples = held_out(task, NUM_TRIED * task.project_size)
    except (
        ImportError,
        OSError,
        ValueError,
    ):  # its data may be missing on the machine of the export
        return "Hello", []
    examples = [e for e in examples if not (e.has_context or e.place)]
    if not examples:
        return "Hello", []
    wrong: list[list[str]] = [[] for _ in examples]
    # An export may be written where the run's kernels do not run.
    impl = config.kernels if next(model.parameters()).is_cuda else "auto"
    for mode in MODES if task.has_verifier else ():
        (batch,) = decode_all(model, fmt, examples, mode, config.decoding, NUM_TRIED, impl=impl)
        for row, example in enumerate(examples):
            ids = batch.completion(row)
            answer = fmt.answer_text(ids)
            if answer is None or not task.outcome(example, answer, ids):
                wrong[row].append(mode)
    best = min(range(len(examples)), key=lambda row: len(wrong[row]))
    return examples[best].prompt, wrong[best]


def _table(summary: dict[str, Any]) -> str:
    """The metrics in Markdown, one row per stage, and their meaning."""
    stages = summary["stages"]
    if not stages:
        return "Nothing was measured: the run had not ended when this was exported."
    metrics = measured("run", stages)
    rows = [["stage", *(m.title for m in metrics)], ["---"] + ["---:"] * len(metrics)]
    for split, measured_stages in by_test_set(stages).items():
        suffix = f" ({split})" if split else ""
        rows += [
            [s["name"] + suffix, *(m.cell(s.get(m.name)) for m in metrics)] for s in measured_stages
        ]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines += [
        "",
        f"{stages[-1]['num_problems']} held-out problems, greedy decoding, seed {summary['seed']}; "
        "one row per training stage, the last is this model.",
        "",
        *(_explained(metric) for metric in metrics if metric.meaning),
    ]
    return "\n".join(lines)


def _released(package: str) -> str:
    """The package and its released version, such as "torch 2.13.0".

    Its build (`+cu130`, `+cpu`) is left out: other machines may be unable to install it, and some
    indexes do not record it.
    """
    try:
        return f"{package} {version(package).partition('+')[0]}"
    except PackageNotFoundError:
        return f"{package} (not installed as a package)"


def _explained(metric: Metric) -> str:
    """A list item that explains a metric."""
    better = f"; {metric.better} is better" if metric.better else ""
    return f"- {metric.title[0].upper()}{metric.title[1:]}: {metric.meaning}{better}."


def _provenance(fmt: PromptFormat, summary: dict[str, Any], config: Any) -> str:
    """Origin of the weights: base model, task, settings and stages."""
    base, _, licence = base_model(config.model)
    versions = [_released(package) for package in ("mtp-eavesdrop", "torch", "transformers")]
    head = ", ".join(f"{key} {value}" for key, value in sorted(vars(config.head).items()))
    task = ", ".join(f"{key} {value}" for key, value in sorted(vars(config.task).items()))
    phases = ", ".join(
        f"{name} ({p.mode}{f', opened by `{p.opened_by}`' if p.opened_by else ''})"
        for name, p in fmt.phases.items()
    )
    lines = [
        f"- Base model: {base}; licence: {licence or 'not recorded'}",
        f"- Task: {type(config.task).__name__.removesuffix('Config')} ({task})",
        f"- Head: {head}",
        f"- Phases: {phases}; at most {config.decoding.max_new_tokens} new tokens",
        f"- Seed {config.seed}, precision {config.fabric.precision}",
        f"- Versions: {', '.join(versions)}",
    ]
    taken = {stage["name"]: stage.get("steps") for stage in summary["stages"]}
    for name, stage in config.active_stages().items():
        steps = f"{stage.steps} steps"
        if taken.get(name) not in (None, stage.steps):
            steps = f"{taken[name]} of at most {steps}"
        trained = [part for part in ("main", "head") if getattr(stage, f"train_{part}")]
        rates = ", ".join(f"{part} {stage.optimizer_of(part).lr:g}" for part in trained)
        weights = ", ".join(f"{k} {t.weight:g}" for k, t in stage.objective.active().items())
        lines.append(
            f"- Stage `{name}`: {stage.kind}, {steps}, learning rates {rates}; "
            f"objective {weights}; channel gradient {stage.channel_gradient:g}"
        )
    return "\n".join(lines)


UNVERIFIED = [
    "- **In fast mode nobody verifies the head's tokens.** They are the model's own output, not "
    "proposals that main checks: fast and slow text differ, and so may the answers. The table says "
    "how often each is right.",
]
FINE_TUNING = (
    "The head reads main's residual stream. After main is fine-tuned without it, fast mode writes "
    "what the head learnt of the earlier main, and verified mode accepts fewer of its tokens. "
    "Three ways to keep the head: fine-tune main and head together, with `trust_remote_code=True` "
    "and `model.config.mtp_loss_weight = 1.0`, which adds the head's loss to that of "
    "`model(input_ids, labels=labels)`; train the head again on main's new text; or use slow mode "
    "alone. With DistributedDataParallel and a loss weight of 0 the head gets no gradient, so set "
    "`find_unused_parameters=True` or freeze it (`model.mtp_head.requires_grad_(False)`)."
)
"""Advice for the head when main changes."""

GENERATE = [
    "- With `mtp_mode`, `generate` takes `max_new_tokens`, `max_length`, `do_sample`, "
    "`temperature`, `top_k`, `top_p`, `min_p`, `typical_p`, `epsilon_cutoff`, `eta_cutoff`, "
    "`eos_token_id`, `pad_token_id`, `stop_strings`, `max_time`, "
    "`return_dict_in_generate`, `logits_processor`, `stopping_criteria`, `streamer`, "
    "`num_return_sequences`, `cache_implementation` (dynamic or static), `mtp_k`, "
    "`max_thought_tokens` and the options that transformers implements by logits processors; "
    "any other option is an error.",
]


def _limitations(config: Any) -> list[str]:
    """Limits of every export."""
    task = type(config.task).__name__.removesuffix("Config")
    return [
        f"- The numbers hold for the task above ({task}) and its phases; nothing else was "
        "measured.",
        "- A thought that a model was rewarded for need not be a true account of how it found "
        "the answer; compare the table's true steps and thought controls.",
    ]


def base_model(config: ModelConfig) -> tuple[str, str | None, str | None]:
    """Main before training: its name, its hub id and its licence, None where unknown.

    Only files of this machine are read: the header of a GGUF file, or the model card.
    """
    if config.source is None:
        return f"none ({config.family} trained from scratch)", None, None
    folder = Path(source_folder(config.source))
    if not folder.is_dir():
        card = try_to_load_from_cache(config.source, CARD)
        return config.source, config.source, _card_licence(card)
    name = config.source if config.source.startswith("package:") else folder.name
    if config.gguf_file is not None:
        from gguf import GGUFReader

        entry = GGUFReader(folder / config.gguf_file).get_field("general.license")
        return f"{name}, {config.gguf_file}", None, entry.contents() if entry else None
    return name, None, _card_licence(folder / CARD)


def _card_licence(card: Any) -> str | None:
    """The licence field of a model card; None if there is no such file or field, or if the file is
    no model card: a run must not end without its export for that.
    """
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    try:
        return ModelCard(Path(card).read_text(), ignore_metadata_errors=True).data.get("license")
    except (ValueError, YAMLError):
        return None
