"""The `mtp` command, and Hydra's side of train.py."""
