"""Detections, segments and figures drawn, with fonts that have the texts' characters."""
