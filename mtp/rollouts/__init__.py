"""Prompts, sampling, rewards, advantages and how readable thoughts are."""
