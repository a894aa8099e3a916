"""Memory and time of an RL step from the sizes of model, text and machine; nothing is run."""
