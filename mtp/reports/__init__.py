"""Logs, tables, curves, comparisons and sweeps."""
