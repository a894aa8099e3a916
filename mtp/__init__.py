"""mtp: trains a main LLM together with a small head that reads its residual stream."""

import os

# Memory that a step frees goes back to the system, and is had anew page by page in the next one.
# PyTorch reads this at its first allocation: blocks of 2 MB and more come in large pages (Linux).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
