"""Comparison of runs on one page: settings, metrics, costs and detections."""
