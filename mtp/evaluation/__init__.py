"""Accuracy in every mode, with its controls, and what a search is worth."""
