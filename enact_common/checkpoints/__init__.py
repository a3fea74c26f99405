"""Read and write checkpoints, fit weights to a model, and infer its flags."""
