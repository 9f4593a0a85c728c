"""The training loop, which the worker's child runs; `run.train` reads from top to bottom."""
