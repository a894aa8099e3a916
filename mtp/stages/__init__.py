"""One stage of a run: its loop, its evaluations, its checkpoints and its dry run."""
