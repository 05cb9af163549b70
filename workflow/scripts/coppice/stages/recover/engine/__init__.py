"""The training engine: micro-batches, optimizer steps, checkpoints, processes. It knows no recovery by name."""
