"""The training engine: batches, steps, checkpoints, processes. Knows no recovery by name."""
