"""Plots of runs: `curves` of loss, AP and learning rate, and `precision-recall` of each class."""
