"""Modules that the three detectors share, from the backbone to the losses and post-processing."""
