"""Shared by every other folder: errors, bounds of numbers, files, exit codes, registries."""
