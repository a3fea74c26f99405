"""A training or an evaluation: the run, its loop, the optimizer and its logs."""
