"""Training: one loop for all stages, with its optimizers, checkpoints, precision and data parallelism."""
