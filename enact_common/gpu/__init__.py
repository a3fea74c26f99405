"""Checks and benchmarks of the project on a GPU, and a page of their results."""
