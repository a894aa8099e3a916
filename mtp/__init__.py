"""mtp: trains a main LLM together with a small head that reads its residual stream."""
