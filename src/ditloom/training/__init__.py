"""The trainer: objectives, checkpoints, averages of the weights, precision and parallelism."""
