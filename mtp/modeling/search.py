"""Search over thoughts: the best of n texts, a beam of branches, the choice among the results.

A text is a chain of passes, and each pass samples discrete tokens from known distributions. A text
can therefore be branched at any pass boundary, identical branches can be recognised, answers can be
counted, and every branch has an exact log-probability. `branches.py` has branches and their
settings, `mcts.py` the tree search.

`model.search` is a method of the mixin. Search within a block is left out: blocks are sampled,
never enumerated.

Ships with checkpoints: imports torch, transformers and siblings only.

Shapes: B prompts, T prompt, L new tokens.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from .branches import (
    AnswerOf,
    Branch,
    BranchLoop,
    Scorer,
    SearchConfig,
    SearchRequest,
    give_scores,
    padded,
)
from .decode_options import DecodableModel, DecodeOptions
from .generation import MTPGenerationMixin
from .mcts import mcts
from .phases import PhasePlan
from .records import Decoded


@dataclass
class Searched:
    """Result of a search for B prompts."""

    chosen: list[Branch]
    """[B] text chosen for each prompt."""
    out: Decoded
    """The chosen texts as a record of the pass loop, B rows. `passes` counts the passes of the text
    alone."""
    scores: Tensor
    """[B] float64 scores of the chosen texts."""
    texts: list[list[Branch]]
    """[B] all texts that were found for a prompt, sorted by falling score. `best_of_n`: its n
    samples. `beam`: the last beam. `mcts`: the ends of its simulations."""
    passes: Tensor
    """[B] int64 forward passes of main that the search took; a shared one counts once."""
    tokens_read: Tensor
    """[B] int64 tokens that main read, of the prompt and of all branches."""


def search(
    model: DecodableModel,
    prompts: Tensor,
    prompt_lengths: Tensor,
    plan: PhasePlan | Sequence[PhasePlan],
    options: DecodeOptions,
    config: SearchConfig,
    *,
    scorer: Scorer | None = None,
    answer_of: AnswerOf | None = None,
) -> Searched:
    """Look for the best continuation of each prompt.

    Args:
        model: an `MTPMixin` model.
        prompts: [B, T] int64, padded on the right.
        prompt_lengths: [B] int64, at least 1.
        plan: phases, one for all prompts or one for each, as in `decode`. A search covers one
            segment: no summary closes it.
        options: as in `decode`, without a static cache; log-probabilities are under its sampler.
        config: method and settings.
        scorer: scoring function of branches, many at once: a reward, or the value of unfinished
            text. It is called with ended texts (`best_of_n`, `mcts` with rollouts) or with every
            branch (`beam`, `mcts` without). None: the mean log-probability, see `length_penalty`.
        answer_of: maps an output to the answer that `choose=majority` counts.

    Raises ValueError, before any pass, for settings that cannot be followed, and later for scores
    that are not finite.
    """
    config.check(options.sampler, scorer, answer_of)
    plans = [plan] * len(prompts) if isinstance(plan, PhasePlan) else list(plan)
    request = SearchRequest(
        model=model,
        prompts=prompts,
        prompt_lengths=prompt_lengths,
        plans=[plan.as_last_segment() for plan in plans],
        options=options,
    )
    request.check()
    method = {"best_of_n": best_of_n, "beam": beam, "mcts": mcts}[config.method]
    found = [sorted(texts, key=rank) for texts in method(request, config, scorer)]
    chosen = [choose(texts, config, answer_of) for texts in found]
    return Searched(
        chosen=chosen,
        out=decoded(chosen, options.pad_id, prompts.device),
        scores=torch.tensor([branch.score for branch in chosen], dtype=torch.float64),
        texts=found,
        passes=torch.tensor(request.spent.passes),
        tokens_read=torch.tensor(request.spent.tokens),
    )


def read_config(values: dict[str, Any]) -> SearchConfig:
    """Settings by name. Raises ValueError for an unknown name."""
    known = [field.name for field in fields(SearchConfig)]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(f"a search's config must not hold {unknown}; use some of {known}")
    return SearchConfig(**values)


@torch.no_grad()
def best_of_n(
    request: SearchRequest, config: SearchConfig, scorer: Scorer | None
) -> list[list[Branch]]:
    """n sampled texts of each prompt, which is read once for all of them."""
    loop = BranchLoop(request, request.roots(), config.n)
    found: list[list[Branch]] = [[] for _ in request.prompts]
    goes_on = True
    while goes_on:
        grown = loop.step()
        for branch in grown:
            if not branch.is_open:
                found[branch.prompt].append(branch)
        goes_on = any(branch.is_open for branch in grown)
    give_scores(config, scorer, [branch for texts in found for branch in texts])
    return found


@torch.no_grad()
def beam(request: SearchRequest, config: SearchConfig, scorer: Scorer | None) -> list[list[Branch]]:
    """The n branches of each prompt that are left when all have ended.

    After every pass a beam keeps the n best of the new branches and of its ended texts, which keep
    their place until better ones displace them. Of branches with the same tokens the likeliest is
    kept.
    """
    beams: list[list[Branch]] = [[] for _ in request.prompts]
    loop = BranchLoop(request, request.roots(), config.expand)
    while True:
        known = [{tuple(b.text()): b for b in kept if not b.is_open} for kept in beams]
        new = []
        for branch in sorted(loop.step(), key=lambda branch: -branch.logprob):
            text = tuple(branch.text())
            if text not in known[branch.prompt]:
                known[branch.prompt][text] = branch
                new.append(branch)
        give_scores(config, scorer, new)
        beams = [sorted(branches.values(), key=rank)[: config.n] for branches in known]
        growing = [branch for branches in beams for branch in branches if branch.is_open]
        if not growing:
            return beams
        loop.fork(growing, config.expand)


def rank(branch: Branch) -> float:
    """Sort key with the highest score first."""
    return -branch.score


def choose(texts: list[Branch], config: SearchConfig, answer_of: AnswerOf | None) -> Branch:
    """One of the texts, which are sorted by score.

    A text without an answer has no vote. The best text is chosen if none has an answer, and the
    better one if answers are equally frequent.
    """
    if config.choose == "score":
        return texts[0]
    assert answer_of is not None
    answers: list[Hashable | None] = [answer_of(branch.text()) for branch in texts]
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return texts[0]
    most = max(votes.values())
    return next(
        branch
        for branch, answer in zip(texts, answers, strict=True)
        if answer is not None and votes[answer] == most
    )


def decoded(branches: list[Branch], pad_id: int, device: torch.device) -> Decoded:
    """Branches as a record of the pass loop, one row each."""
    fills = {"tokens": pad_id, "slots": -1, "accepted": 0, "logprobs": 0.0}
    columns = {
        name: torch.tensor(padded([branch.whole(name) for branch in branches], fill), device=device)
        for name, fill in fills.items()
    }
    return Decoded(
        **columns,
        lengths=torch.tensor([branch.num_tokens for branch in branches], device=device),
        passes=torch.tensor([branch.num_passes for branch in branches], device=device),
        finished=torch.tensor([branch.finished for branch in branches], device=device),
    )


@dataclass
class MTPSearchOutput(ModelOutput):
    """Output of `search(...)`: for each prompt the chosen text, and all that were found."""

    sequences: Tensor | None = None
    """[B, T + L] the prompt as given and the chosen text, padded on the right."""
    slots: Tensor | None = None
    """[B, L] as in `MTPGenerateOutput`; the next three fields too."""
    logprobs: Tensor | None = None
    accepted: Tensor | None = None
    finished: Tensor | None = None
    scores: Tensor | None = None
    """[B] float64 scores of the chosen texts."""
    texts: list[list[Branch]] | None = None
    """[B] all texts that were found for a prompt, sorted by falling score."""
    passes: Tensor | None = None
    """[B] forward passes of main that the search took; a shared one counts once."""
    tokens_read: Tensor | None = None
    """[B] tokens that main read."""


class MTPSearchMixin(MTPGenerationMixin):
    """`generate` with `mtp_mode`, and `search`."""

    def search(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        config: SearchConfig | dict[str, Any],
        mtp_mode: str | Sequence[str] | None = None,
        scorer: Scorer | None = None,
        answer_of: AnswerOf | None = None,
        mtp_k: int | None = None,
        max_thought_tokens: int | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> MTPSearchOutput:
        """Look for the best continuation of each prompt among sampled branches.

        Args:
            inputs: as in `generate`; so are generation_config, mtp_mode (default `fast`), mtp_k,
                max_thought_tokens, generator and kwargs. streamer, num_return_sequences and a
                static cache_implementation are not supported.
            config: method and settings; a dict of `SearchConfig` fields is accepted too.
            scorer: scores branches (a list of `Branch`), many at once; see `search.search`.
            answer_of: ids of an output -> its final answer or None, which `majority` counts.

        Raises ValueError, before any pass, for unsupported options.
        """
        if isinstance(config, dict):
            config = read_config(config)
        request = self._read_request(
            inputs, generation_config, mtp_mode, mtp_k, max_thought_tokens, generator, kwargs
        )
        if request.streamer is not None:
            raise ValueError(
                "search does not support streamer: no text is final until it ends; leave it out"
            )
        if request.num_return_sequences > 1:
            raise ValueError("search does not support num_return_sequences; set n in its config")
        if request.options.static_cache:
            raise ValueError("search does not support cache_implementation=static; leave it out")
        if request.options.compiler is not None:
            raise ValueError("search does not support compile_config; leave it out")
        found = search(
            self,  # type: ignore[arg-type]
            request.prompts,
            request.prompt_lengths,
            request.plans,
            request.options,
            config,
            scorer=scorer,
            answer_of=answer_of,
        )
        out = found.out
        return MTPSearchOutput(
            sequences=torch.cat([request.given, out.tokens], 1),
            slots=out.slots,
            logprobs=out.logprobs,
            accepted=out.accepted,
            finished=out.finished,
            scores=found.scores,
            texts=found.texts,
            passes=found.passes,
            tokens_read=found.tokens_read,
        )
