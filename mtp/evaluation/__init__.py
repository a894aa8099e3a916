"""Accuracy in every mode, with controls, and accuracy of a search."""
