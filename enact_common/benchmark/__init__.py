"""Measure what the models cost and what ENACT saves, on your machine.

docs/results/benchmarks.md describes how each is measured, docs/use/export.md covers `runtimes` and `agreement`.
"""
