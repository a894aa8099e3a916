"""Stages, batches, objectives, algorithms, and one optimizer step."""
