"""Text of main alone, token by token, after inputs that a channel has prepared."""

import torch
from torch import Tensor

from ..modeling.sampler import Sampler
from .channel import WriteOptions
from .reading import Reader, logits_of


def continue_text(
    reader: Reader,
    hidden: Tensor,
    options: WriteOptions,
    *,
    closer: int,
    ends: list[int],
    budget: tuple[int, int] | None = None,
) -> list[list[int]]:
    """Ids that main writes in each row, up to one of `ends` or `options.max_new_tokens`.

    Afterwards the reader has read all of them but the last one of each row. Tokens up to `closer`
    are sampled, and those after it are greedy unless `options.sample_answer`.

    hidden: [B, D] last hidden row of the inputs. budget: maximum number of tokens before `closer`
    or an end, and the token that follows them then; None: no limit.
    """
    device, rows = hidden.device, len(hidden)
    generator = torch.Generator(device=device).manual_seed(options.seed)
    after = options.sampler if options.sample_answer else Sampler(temperature=0)
    out: list[list[int]] = [[] for _ in range(rows)]
    thinking = torch.ones(rows, dtype=torch.bool, device=device)
    running = thinking.clone()
    ends_tensor = torch.tensor(ends, device=device)
    for number in range(options.max_new_tokens):
        logits = logits_of(reader.model, hidden)
        sampled, _ = options.sampler.sample(logits, generator)
        if budget is not None and number == budget[0]:
            sampled = torch.full_like(sampled, budget[1])
        tokens = torch.where(thinking, sampled, after.sample(logits, generator)[0])
        for b in running.nonzero()[:, 0].tolist():
            out[b].append(int(tokens[b]))
        thinking &= tokens != closer
        running &= ~torch.isin(tokens, ends_tensor)
        if not bool(running.any()) or number + 1 == options.max_new_tokens:
            break
        # An end is not read, so a caller can continue all rows from it.
        hidden = reader.read(reader.embedding(tokens)[:, None], running[:, None].long())[:, -1]
    return out
