"""Where numbers go, and what a person sees: logs, tables, curves, comparisons, sweeps."""
