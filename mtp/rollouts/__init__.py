"""Prompts, sampling, rewards, advantages and legibility of thoughts."""
